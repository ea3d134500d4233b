"""Other projects' benchmarks as subjects: a server, and a client that says figures."""

from __future__ import annotations

import abc
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
from typing import IO, ClassVar

from .case import Case
from .child_process import CaseFailed, NotInstalled
from .figures import Measurement
from .subjects import CASE_TIMEOUT_S, Outcome

# Such tools have no time limit of their own: at most so much for each second given,
# and less where a trial of a few writes is slow.
_BYTES_PER_SECOND = 500_000_000
_WRITES_PER_SECOND = 10_000
_TRIAL_BYTES = 1 << 22
_TRIAL_WRITES = 100
_WRITES_MIN = 5  # all accept so few
_LISTEN_TIMEOUT_S = 10.0
_LISTEN_STATE = "0A"  # in /proc/net/tcp
_LAST_WORDS = 200  # characters of its output that are shown


@dataclasses.dataclass(kw_only=True)
class ToolPair(abc.ABC):
    """Writes of one piece, unidirectional, whose bytes are not verified.

    It tells the mean only: of many in flight, and of one after the other.

    Attributes:
      tool: the program.
      package: what it is in.
    """

    tool: ClassVar[str]
    package: ClassVar[str]
    medium: str
    role: str = "peer"
    kinds: tuple[str, ...] = ("single",)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in the tables."""
        return self.tool

    @abc.abstractmethod
    def command(self, size: int, count: int, window: int, port: int) -> list[str]:
        """The server's command line; the client's ends with an address, too."""

    @abc.abstractmethod
    def seconds_per_write(self, output: str, size: int) -> float | None:
        """What the client's output says, if it says anything."""

    def measure(
        self, plan: list[Case], seconds: float
    ) -> Iterator[tuple[Case, Outcome]]:
        """See `subjects.Subject`; it does not verify bytes.

        Raises:
          NotInstalled: the tool is not on PATH.
        """
        if shutil.which(self.tool) is None:
            raise NotInstalled(
                f"not installed: {self.tool} of {self.package} is not on PATH"
            )
        for case in plan:
            try:
                yield case, self._measure_case(case, seconds)
            except CaseFailed as failure:
                yield case, failure

    def _measure_case(self, case: Case, seconds: float) -> Measurement:
        trial = max(_WRITES_MIN, min(_TRIAL_WRITES, _TRIAL_BYTES // case.size))
        trial_s = self.run(case.size, trial, 1)
        most = seconds * min(_WRITES_PER_SECOND, _BYTES_PER_SECOND / case.size)
        alone = max(int(min(most / 4, seconds / trial_s)), _WRITES_MIN)
        # In flight they take less time than alone.
        count = max(int(min(most, 2 * seconds / trial_s)), case.window + 1, _WRITES_MIN)
        in_flight_s = self.run(case.size, count, case.window)
        alone_s = self.run(case.size, alone, 1)
        return Measurement([], count, in_flight_s * count, mean_s=alone_s)

    def run(self, size: int, count: int, window: int) -> float:
        """Seconds per write, of `count` writes of which `window` are in flight.

        Raises:
          CaseFailed: the tool fails, hangs or prints no figures.
        """
        port = unused_port()
        # `timeout` ends it even if this process cannot.
        command = ["timeout", "--signal=KILL", f"{CASE_TIMEOUT_S + 10:g}", self.tool]
        command += self.command(size, count, window, port)
        with contextlib.ExitStack() as stack:
            unread = stack.enter_context(tempfile.TemporaryFile())
            output = stack.enter_context(tempfile.TemporaryFile())
            server = stack.enter_context(running(command, unread))
            self._wait_until_listening(port, server)
            client = stack.enter_context(running([*command, "127.0.0.1"], output))
            try:
                code = client.wait(CASE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                waited = f"not done in {CASE_TIMEOUT_S:g} s"
                raise CaseFailed(f"{self.tool}: {waited}") from None
            output.seek(0)
            text = output.read().decode(errors="replace")
        last_words = f"...{' '.join(text.split())[-_LAST_WORDS:]}"
        if code:
            raise CaseFailed(f"{self.tool}: exit code {code}; it printed: {last_words}")
        found = self.seconds_per_write(text, size)
        if found is None:
            raise CaseFailed(f"{self.tool} printed no figures: {last_words}")
        return found

    def _wait_until_listening(self, port: int, server: subprocess.Popen[bytes]) -> None:
        """Looks into /proc, since a trial connection would be taken for the client."""
        end = time.monotonic() + _LISTEN_TIMEOUT_S
        pattern = re.compile(rf"^ *\d+: \w+:{port:04X} \w+:\w+ {_LISTEN_STATE} ", re.M)
        tables = [pathlib.Path("/proc/net/tcp"), pathlib.Path("/proc/net/tcp6")]
        while not any(t.exists() and pattern.search(t.read_text()) for t in tables):
            if server.poll() is not None:
                raise CaseFailed(f"{self.tool}: the server ended at once")
            if time.monotonic() > end:
                raise CaseFailed(f"{self.tool}: the server does not listen")
            time.sleep(0.01)


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
