"""Runs a script as `__main__` with jax.distributed already initialised.

`jaxfabric run` starts this module once per rank. A failure is reported through a
pipe as soon as it happens, since the process may still need long to end.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import faulthandler
import io
import json
import logging
import os
import signal
import sys
import time
import traceback
import types
from typing import Any

from jaxfabric._cli import _processes

# A pipe takes 64 KiB without a reader, so that a report never blocks the rank.
_MAX_REPORT_CHARS = 24_000
_INTERRUPTED = 128 + signal.SIGINT


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jaxfabric._cli._bootstrap")
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--launcher-pid", type=int, required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("script")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    return parser.parse_args(arguments)


def _initialize(options: argparse.Namespace) -> None:
    import jax

    jax.distributed.initialize(
        options.coordinator,
        options.processes,
        options.rank,
        cluster_detection_method="deactivate",
        coordinator_bind_address=options.coordinator,
    )

    def initialize(
        coordinator_address: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
        *_args: Any,
        **_kwargs: Any,
    ) -> None:
        """Does nothing: `jaxfabric run` has initialised jax.distributed already.

        Raises:
          RuntimeError: num_processes or process_id are not those of this process.
        """
        asked = (num_processes, process_id)
        given = (options.processes, options.rank)
        if any(a is not None and a != g for a, g in zip(asked, given, strict=True)):
            raise RuntimeError(
                "jax.distributed.initialize("
                f"num_processes={num_processes}, process_id={process_id}): "
                f"`jaxfabric run` started this process as process_id={options.rank} "
                f"of num_processes={options.processes}. Leave the arguments out, or "
                "start the script without `jaxfabric run`."
            )

    jax.distributed.initialize = initialize


def _run_script(path: str, arguments: list[str]) -> None:
    """Does what `python path arguments...` does."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=builtins)
    # Not runpy: it takes the module away again before the atexit functions run.
    sys.modules["__main__"] = main
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def _report(status_fd: int, code: int, text: str) -> None:
    text = text[-_MAX_REPORT_CHARS:]
    message = {"code": code, "time": time.monotonic(), "text": text}
    os.write(status_fd, json.dumps(message).encode() + b"\n")


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _leave_without_jax(failed: list[int]) -> None:
    """Ends a failed rank before JAX's own atexit function.

    That one waits minutes at a barrier for ranks which wait for this one.
    """
    if failed:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed[0])


def main() -> None:
    """Runs the script named on the command line as one rank."""
    options = _parse(sys.argv[1:])
    os.set_inheritable(options.status_fd, False)
    _processes.die_with_parent(options.launcher_pid)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    failed: list[int] = []
    try:
        import jax  # noqa: F401  (its atexit functions must be older than ours)

        atexit.register(_leave_without_jax, failed)
        _initialize(options)
        _run_script(options.script, options.args)
    except SystemExit as error:
        code = _exit_code(error)
        if code:
            failed.append(code)
            _report(options.status_fd, code, f"SystemExit: {error.code}")
        raise
    except BaseException as error:
        code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        failed.append(code)
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        error.__traceback__ = frames
        text = "".join(traceback.format_exception(error))
        _report(options.status_fd, code, text)
        sys.excepthook(type(error), error, frames)
        sys.exit(code)


if __name__ == "__main__":
    main()
