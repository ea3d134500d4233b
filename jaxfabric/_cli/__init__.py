"""The `jaxfabric` command; `main` is its entry point."""


def main() -> None:
    """Runs the `jaxfabric` command; exits with the command's code."""
    from jaxfabric._cli import _app

    _app.app(prog_name="jaxfabric")
