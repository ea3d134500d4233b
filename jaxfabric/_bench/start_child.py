"""Starts a child by path, under any interpreter that has numpy.

The package is loaded under a name of its own: `import jaxfabric` would need jax,
which a peer's interpreter may not have.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys

NAME = "jaxfabric_bench"


def main() -> None:
    """Runs `child.main` of the package that this file is in."""
    folder = pathlib.Path(__file__).resolve().parent
    # Else `import mooncake` and the like would find this folder's modules.
    sys.path[:] = [p for p in sys.path if p != str(folder)]
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = package
    spec.loader.exec_module(package)
    importlib.import_module(f"{NAME}.child").main()


if __name__ == "__main__":
    main()
