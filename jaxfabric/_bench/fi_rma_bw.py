"""libfabric's own benchmark, `fi_rma_bw` of fabtests, as a subject."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import IO

from .case import Case
from .child_process import CaseFailed, NotInstalled
from .figures import Measurement
from .subjects import CASE_TIMEOUT_S, Outcome

TOOL = "fi_rma_bw"
# It has no time limit of its own: so much for each second that it is given.
_BYTES_PER_SECOND = 500_000_000
_WRITES_PER_SECOND = 10_000
_LISTEN_TIMEOUT_S = 10.0
_LISTEN_STATE = "0A"  # in /proc/net/tcp


@dataclasses.dataclass
class FiRmaBw:
    """Writes of one piece, unidirectional, done when the target has the bytes.

    It tells the mean only: of many in flight, and of one after the other.

    Attributes:
      provider: libfabric's, as in "tcp".
    """

    provider: str
    medium: str
    role: str = "peer"
    kinds: tuple[str, ...] = ("single",)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{TOOL} {self.provider}"

    def measure(
        self, plan: list[Case], seconds: float
    ) -> Iterator[tuple[Case, Outcome]]:
        """See `subjects.Subject`; it does not verify bytes.

        Raises:
          NotInstalled: the tool is not on PATH.
        """
        tool = shutil.which(TOOL)
        if tool is None:
            raise NotInstalled(
                f"not installed: {TOOL} of libfabric's fabtests is not on PATH"
            )
        for case in plan:
            try:
                yield case, self._measure_case(tool, case, seconds)
            except CaseFailed as failure:
                yield case, failure

    def _measure_case(self, tool: str, case: Case, seconds: float) -> Measurement:
        rate = min(_WRITES_PER_SECOND, _BYTES_PER_SECOND / case.size)
        count = max(int(rate * seconds), case.window + 1)
        in_flight_s = self._run(tool, case.size, count, case.window)
        alone_s = self._run(tool, case.size, max(count // 4, 2), 1)
        return Measurement([], count, in_flight_s * count, mean_s=alone_s)

    def _run(self, tool: str, size: int, count: int, window: int) -> float:
        """Seconds per write."""
        port = unused_port()
        # `timeout` ends it even if this process cannot.
        command = ["timeout", "--signal=KILL", f"{CASE_TIMEOUT_S + 10:g}"]
        command += [tool, "-p", self.provider, "-e", "rdm", "-o", "writedata", "-U"]
        # Asleep while it waits: two that spin starve each other on few cores.
        command += ["-c", "sread"]
        command += ["-S", str(size), "-I", str(count), "-W", str(window)]
        command += ["-w", str(min(count, 16)), f"-E={port}"]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(tempfile.TemporaryFile())
            server = stack.enter_context(running(command, output))
            wait_until_listening(port, server)
            client = stack.enter_context(running([*command, "127.0.0.1"], output))
            try:
                code = client.wait(CASE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise CaseFailed(f"{TOOL}: not done in {CASE_TIMEOUT_S:g} s") from None
            output.seek(0)
            text = output.read().decode(errors="replace")
        if code:
            words = " ".join(text.split())[-200:]
            raise CaseFailed(f"{TOOL}: exit code {code}; it printed: ...{words}")
        return seconds_per_write(text)


def seconds_per_write(output: str) -> float:
    """The column usec/xfer of what the tool printed.

    Raises:
      CaseFailed: it printed no such table.
    """
    last = re.findall(r"^\S+ +\S+ +\S+ +[\d.]+s +[\d.]+ +([\d.]+) ", output, re.M)
    if not last or float(last[-1]) <= 0:
        words = " ".join(output.split())[-200:]
        raise CaseFailed(f"{TOOL} printed no figures: ...{words}")
    return float(last[-1]) / 1e6


@contextlib.contextmanager
def running(command: list[str], output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with what it has started."""
    process = subprocess.Popen(
        command, stdout=output, stderr=output, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def unused_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until_listening(port: int, server: subprocess.Popen[bytes]) -> None:
    """Looks into /proc, since a trial connection would be taken for the client.

    Raises:
      CaseFailed: the server ended, or does not listen in time.
    """
    end = time.monotonic() + _LISTEN_TIMEOUT_S
    pattern = re.compile(rf"^ *\d+: \w+:{port:04X} \w+:\w+ {_LISTEN_STATE} ", re.M)
    tables = [pathlib.Path("/proc/net/tcp"), pathlib.Path("/proc/net/tcp6")]
    while not any(t.exists() and pattern.search(t.read_text()) for t in tables):
        if server.poll() is not None:
            raise CaseFailed(f"{TOOL}: the server ended at once")
        if time.monotonic() > end:
            raise CaseFailed(f"{TOOL}: the server does not listen")
        time.sleep(0.01)
