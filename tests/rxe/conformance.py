"""Runs of the transports' conformance suite, each a process."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

# In the build folder: ranks in one process, and on two hosts.
ONE_HOST = Path("tests/cpp/verbs_test")
TWO_HOSTS = Path("tests/cpp/verbs_hosts_test")
DEVICES_VARIABLE = "JAXFABRIC_TEST_VERBS_DEVICES"
PORT = "7079"
START_TIMEOUT_S = 30
# Twice to three times what it takes on a busy machine.
TIMEOUT_S = 150


@contextlib.contextmanager
def started(
    command: Sequence[str], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process, with all that it prints in one pipe; it is killed at the end."""
    process = subprocess.Popen(
        command,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a run; fails unless all of its tests passed. Returns its output."""
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    # Without a device, or without a peer, nothing would have failed.
    assert "without a device" not in output, output
    assert "[  PASSED  ]" in output, output
    assert "[  PASSED  ] 0 tests" not in output, output
    return output


def on_devices(build: Path, *runs: Sequence[str], only: str = "*") -> None:
    """Runs the suite, once for each group of devices, all at once.

    With it go the tests of verbs alone: greetings, intruders, removals.

    Args:
      only: a pattern of tests.
    """
    command = [str(build / ONE_HOST), "--gtest_brief=1", f"--gtest_filter={only}"]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(started(command, {DEVICES_VARIABLE: ",".join(devices)}))
            for devices in runs
        ]
        for process in processes:
            finish(process)


def between(
    build: Path,
    there: Sequence[str],
    address: str,
    devices: Sequence[str],
    only: str = "*",
) -> None:
    """Runs the suite with every second Transport in processes of its own.

    Args:
      there: a command to run programs by where these processes shall be.
      address: of that host.
      devices: of both. With several only tests whose ranks take them in the same
        order can pass, since each reaches none but its own other end.
      only: a pattern of tests.
    """
    program, words = str(build / TWO_HOSTS), (address, PORT, ",".join(devices))
    with started([*there, program, "serve", *words]) as server:
        assert server.stdout is not None
        ready, _, _ = select.select([server.stdout], [], [], START_TIMEOUT_S)
        assert ready, f"no server within {START_TIMEOUT_S} s"
        assert server.stdout.readline() == "serves\n", server.communicate()[0]
        flags = ["--gtest_brief=1", f"--gtest_filter={only}"]
        with started([program, "run", *words, *flags]) as process:
            finish(process)
