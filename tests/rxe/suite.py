"""All tests that need soft-RoCE, in guests that run at the same time.

    JAXFABRIC_TEST_BUILD=build/cpp python -m tests.rxe.suite

A guest has one emulated processor, so that two keep a small machine busy: one tests
`verbs` itself; the others `jit`, and after it two hosts. Exit status: 0 if all
passed; 77 if this machine cannot do it, with the reason in the last line; else 1.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from . import CannotRun, kernel
from .__main__ import CACHE, SKIPPED, end_in_order

# Plugins that nobody asked for take seconds to import in a guest.
PYTEST = ("-P", "-m", "pytest", "-p", "pytest_timeout", "-v", "--durations=5", "-rP")
# Imports and compiles what the guests' programs do.
REHEARSAL = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
sys.path.append("tests")
import jax, pytest, pytest_timeout
from fabric_cases import mesh_of_all
from primitive_cases import every_primitive
every_primitive(mesh_of_all(), "shm")
"""
REHEARSAL_TIMEOUT_S = 60
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@dataclass(frozen=True)
class Run:
    """Test files, the guests that they need, and what they may take."""

    bench: Sequence[str]
    files: Sequence[str]
    timeout_s: float  # three times what it takes on two processors


# One lane after the other would keep only one of two processors busy.
LANES = (
    (
        Run(("--rails", "4"), ("test_devices.py", "test_verbs.py"), 300),
        Run(("--accelerator", "icount"), ("test_rate.py",), 240),
    ),
    (
        # test_kv.py forks: before XLA has threads.
        Run(
            ("--rails", "1"),
            ("test_kv.py", "test_fabric.py", "test_weights.py"),
            300,
        ),
        Run(("--hosts", "2", "--rails", "2"), ("test_two_hosts.py",), 300),
    ),
)


@dataclass(frozen=True)
class Started:
    """A run under way; its output is shown at its end, not amid another's."""

    run: Run
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    begin: float

    def show(self) -> int:
        """Prints what it printed; returns its exit status."""
        code = self.process.wait()
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        took = f"{time.monotonic() - self.begin:.0f} s"
        files = " ".join(self.run.files)
        print(f"--- {files}: exit status {code}, {took}\n{text}", flush=True)
        return code


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends the process in the end, and thereby its guests."""
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def start(run: Run, stack: contextlib.ExitStack) -> Started:
    """Starts the files' guests; they end with the stack."""
    command = [sys.executable, "-m", "tests.rxe", "--timeout-s", str(run.timeout_s)]
    command += [*run.bench, "--", sys.executable, *PYTEST]
    command += [f"tests/rxe/{file}" for file in run.files]
    output = stack.enter_context(tempfile.TemporaryFile())
    process = subprocess.Popen(
        command,
        env=os.environ | NO_PLUGINS,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    stack.enter_context(ended(process))
    return Started(run, process, output, time.monotonic())


def rehearse() -> None:
    """Leaves the bytecode of all modules, which each guest would make by itself.

    Raises:
      subprocess.SubprocessError: it failed here already.
    """
    command = [sys.executable, "-P", "-c", REHEARSAL]
    subprocess.run(command, check=True, timeout=REHEARSAL_TIMEOUT_S)


def run_all() -> list[int]:
    """Exit statuses of all runs; each has a limit of its own."""
    lanes = [list(lane) for lane in LANES]
    codes = []
    with contextlib.ExitStack() as stack:
        under_way = [start(lane.pop(0), stack) for lane in lanes]
        while under_way:
            time.sleep(0.2)
            for started, lane in zip(list(under_way), list(lanes), strict=True):
                if started.process.poll() is None:
                    continue
                codes.append(started.show())
                under_way.remove(started)
                lanes.remove(lane)
                if lane:
                    under_way.append(start(lane.pop(0), stack))
                    lanes.append(lane)
    return codes


def main() -> int:
    """Returns the exit status."""
    end_in_order()
    try:
        kernel.fetch(CACHE)
    except CannotRun as reason:
        print(f"tests.rxe: {reason}", file=sys.stderr)
        return SKIPPED
    rehearse()
    codes = run_all()
    if SKIPPED in codes:
        return SKIPPED  # the bench has said why
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
