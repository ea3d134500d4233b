"""File descriptors that the processes of a host hand to each other."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxfabric._errors import DeadlineError, FabricError, PeerLostError
from jaxfabric._rendezvous import Rendezvous

_NUMBER_BYTES = 4  # of a process, which says it first
_NUMBER_S = 1.0  # who has connected says it at once
_STRANGERS_MAX = 100  # who connects to a full queue is refused at once


class Exchange:
    """One exchange: each process gives the same descriptors to all others.

    Args:
      what: is exchanged, for errors: "the heaps of a Fabric".
      me: this process.
      ranks: of each process; a process has a descriptor for each of its ranks.
      rendezvous: of the same processes.
    """

    def __init__(
        self,
        what: str,
        me: int,
        ranks: Mapping[int, Sequence[int]],
        rendezvous: Rendezvous,
    ) -> None:
        self._what, self._me, self._ranks = what, me, ranks
        self._rendezvous = rendezvous
        self._others = set(ranks) - {me}

    @contextlib.contextmanager
    def run(self, mine: Sequence[int]) -> Iterator[dict[int, list[int]]]:
        """The others' descriptors, by process; closed at the end of the block.

        Raises:
          DeadlineError: a process did not come in time.
          PeerLostError: a process has ended meanwhile.
          FabricError: it gave another number of descriptors than it has ranks.
        """
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            name = f"jaxfabric-{secrets.token_hex(16)}"
            server.bind(b"\0" + name.encode())
            server.listen(len(self._others) + _STRANGERS_MAX)
            payload = json.dumps([self._me, name]).encode()
            told = self._rendezvous.all_gather(payload)
            names = dict(json.loads(one) for one in told)
            self._began = time.monotonic()
            links = {
                process: stack.enter_context(self._connect(process, names[process]))
                for process in sorted(self._others)
            }
            self._serve(server, mine)
            found: dict[int, list[int]] = {}
            stack.callback(lambda: _close(fd for fds in found.values() for fd in fds))
            for process, link in links.items():
                found[process] = self._receive(process, link)
            yield found

    def _connect(self, process: int, name: str) -> socket.socket:
        link = socket.socket(socket.AF_UNIX)
        try:
            with self._named(process):
                self._limit(link)
                link.connect(b"\0" + name.encode())
                _refuse_strangers(link, self._what)
                link.sendall(self._me.to_bytes(_NUMBER_BYTES, "little"))
        except BaseException:
            link.close()
            raise
        return link

    def _serve(self, server: socket.socket, mine: Sequence[int]) -> None:
        """Gives ``mine`` to each of the others; who else asks is sent away."""
        missing = set(self._others)
        while missing:
            with self._named(*sorted(missing)):
                self._limit(server)
                connection = server.accept()[0]
            # Its fault is not ours: whom it comes from is still waited for.
            with connection, contextlib.suppress(OSError, FabricError):
                _refuse_strangers(connection, self._what)
                connection.settimeout(_NUMBER_S)
                number = connection.recv(_NUMBER_BYTES, socket.MSG_WAITALL)
                process = int.from_bytes(number, "little")
                if process in missing:
                    missing.remove(process)  # it has come, even if it has gone again
                    socket.send_fds(connection, [b"fds"], list(mine))

    def _receive(self, process: int, link: socket.socket) -> list[int]:
        expected = len(self._ranks[process])
        with self._named(process):
            self._limit(link)
            data, fds, _, _ = socket.recv_fds(link, 16, expected)
        if not data:
            raise self._lost(process)
        if len(fds) != expected:
            _close(fds)
            raise FabricError(
                f"{self._what}: process {process} gave {len(fds)} descriptors for its "
                f"ranks {list(self._ranks[process])}; run the same jaxfabric in all "
                "processes"
            )
        return fds

    def _limit(self, one: socket.socket) -> None:
        left = self._began + self._rendezvous.timeout_s - time.monotonic()
        one.settimeout(max(0.001, left))

    @contextlib.contextmanager
    def _named(self, *processes: int) -> Iterator[None]:
        """Failures of sockets as errors that name who is at the other end."""
        try:
            yield
        except TimeoutError:
            waited = time.monotonic() - self._began
            raise DeadlineError(
                f"{self._what}: process {self._names(processes)} did not answer in "
                f"{waited:.1f} s; is it stopped? Or raise timeout_s"
            ) from None
        except OSError:
            raise self._lost(*processes) from None

    def _lost(self, *processes: int) -> PeerLostError:
        return PeerLostError(
            f"{self._what}: process {self._names(processes)} ended "
            f"{time.monotonic() - self._began:.1f} s into the exchange; its own output "
            "says why",
            [rank for process in processes for rank in self._ranks[process]],
        )

    def _names(self, processes: Sequence[int]) -> str:
        return ", ".join(f"{p} (ranks {list(self._ranks[p])})" for p in processes)


def _refuse_strangers(link: socket.socket, what: str) -> None:
    """Memory is handed to processes of the same user only."""
    size = 12  # struct ucred: pid, uid, gid
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    uid = int.from_bytes(credentials[4:8], "little")
    if uid != os.geteuid():
        raise FabricError(
            f"{what}: a process of user {uid} takes part, and this one is user "
            f"{os.geteuid()}'s; run all processes as one user"
        )


def _close(fds: Any) -> None:
    for fd in fds:
        os.close(fd)
