"""One rank of a cluster as the outer pytest process sees it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from jaxfabric._cli import _processes

_MAX_OUTPUT_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which ranks of a cluster this host starts, and where they meet.

    Attributes:
      processes: ranks of the whole cluster.
      devices_per_process: JAX devices of each.
      first: number of this host's first rank.
      local: how many ranks this host starts.
      coordinator: address of JAX's coordination service.
      bind: address that the service listens on; None is JAX's default.
      own_service: the service runs outside of rank 0, so that rank 0 may die.
    """

    processes: int
    devices_per_process: int
    first: int
    local: int
    coordinator: str
    bind: str | None
    own_service: bool = False


class Worker:
    """One rank: its process, its socket, its log and its stacks."""

    def __init__(self, rank: int, layout: Layout, folder: pathlib.Path, cwd: str):
        self.rank = rank
        self._log = folder / f"rank-{rank}.log"
        self._stacks = folder / f"rank-{rank}.stacks"
        self._stacks.touch()
        self.socket, theirs = socket.socketpair()
        env = _processes.child_environment(
            layout.devices_per_process, rank - layout.first
        )
        arguments = ["-m", "jaxfabric.testing._worker", str(theirs.fileno())]
        with theirs, self._log.open("wb") as log:
            self.process = _processes.start(
                [*arguments, str(os.getpid()), str(self._stacks)],
                env,
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=log,
                cwd=cwd,
            )
        self.closed = False
        self._received = b""
        self._log_start = 0
        self._stacks_start = 0
        self.reports: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Starts a test: what was written before is not its output."""
        self.reports = []
        self._log_start = self._log.stat().st_size
        self._stacks_start = self._stacks.stat().st_size

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # its death is noticed when reading
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Iterator[dict[str, Any]]:
        """Yields the messages that have come; sets `closed` at the end of all."""
        try:
            data = self.socket.recv(1 << 20)
        except OSError:
            data = b""
        self.closed = not data
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            yield json.loads(line)

    def dead(self) -> bool:
        return self.closed or self.process.poll() is not None

    def dump_stacks(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)

    def output(self) -> str:
        return _read(self._log, self._log_start)

    def stacks(self) -> str:
        return _without_pytest(_read(self._stacks, self._stacks_start))


def _read(path: pathlib.Path, start: int) -> str:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - _MAX_OUTPUT_BYTES))
        return file.read().decode(errors="replace")


def _without_pytest(stacks: str) -> str:
    """Drops the frames from pytest's own down to the start of a thread."""
    shown: list[str] = []
    inside = False
    for line in stacks.splitlines():
        is_frame = line.startswith("  File ")
        if is_frame and not inside and f"{os.sep}_pytest{os.sep}" in line:
            inside = True
            shown.append("  (called by pytest)")
        inside = inside and is_frame
        if not inside:
            shown.append(line)
    return "\n".join(shown)
