"""Floor of TCP: one connection, the bytes, and one byte back when they are there.

Before an operation's bytes go four that name its slot; the target then receives
straight into that slot's places.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from typing import Any

from ..case import Case
from . import OPERATION_TIMEOUT_S, allocate

SLOT = struct.Struct("<I")
ACKNOWLEDGEMENT = b"\x06"
# Linux takes so many pieces in one call.
IOV_MAX = 1024


class Target:
    """Receives on a thread."""

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None:
        self.memory = allocate(bytes_)
        self._places: list[list[memoryview]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def card(self) -> dict[str, Any]:
        """See `ends.Target`."""
        return {"port": self._listener.getsockname()[1]}

    def prepare(self, case: Case, peer: int) -> None:
        """See `ends.Target`."""
        self._places = views(self.memory, case, peer, of_source=False)

    def wait(self, operations: int) -> None:
        """See `ends.Target`."""

    def close(self) -> None:
        """See `ends.Target`."""
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        slot = bytearray(SLOT.size)
        while receive_all(connection, [memoryview(slot)]):
            if not receive_all(connection, self._places[SLOT.unpack(slot)[0]]):
                return
            connection.sendall(ACKNOWLEDGEMENT)


class Initiator:
    """Sends, and waits for the target's byte."""

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None:
        self.memory = allocate(bytes_)
        self._connections: list[socket.socket] = []
        # Of each slot and peer: the slot's name and the bytes.
        self._messages: list[list[list[memoryview]]] = []

    def connect(self, cards: list[dict[str, Any]]) -> None:
        """See `ends.Initiator`."""
        for card in cards:
            connection = socket.create_connection(
                ("127.0.0.1", card["port"]), OPERATION_TIMEOUT_S
            )
            # Python's own time limits cost a poll() per call; the kernel's do not.
            connection.settimeout(None)
            limit = struct.pack("ll", int(OPERATION_TIMEOUT_S), 0)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                connection.setsockopt(socket.SOL_SOCKET, option, limit)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(connection)

    def prepare(self, case: Case) -> None:
        """See `ends.Initiator`."""
        by_peer = [
            views(self.memory, case, peer, of_source=True)
            for peer in range(case.targets)
        ]
        self._messages = [
            [[memoryview(SLOT.pack(slot)), *pieces[slot]] for pieces in by_peer]
            for slot in range(case.window)
        ]

    def begin(self, slot: int) -> int:
        """See `ends.Initiator`."""
        messages = self._messages[slot]
        for connection, message in zip(self._connections, messages, strict=False):
            send_all(connection, message)
        return len(messages)

    def finish(self, operation: int) -> None:
        """See `ends.Initiator`."""
        for connection in self._connections[:operation]:
            if connection.recv(1) != ACKNOWLEDGEMENT:
                raise ConnectionError("the target closed the connection")

    def write(self, slot: int) -> None:
        """See `ends.Initiator`."""
        self.finish(self.begin(slot))

    def versions(self) -> dict[str, str]:
        """See `ends.Initiator`."""
        return {"python": sys.version.split()[0]}

    def close(self) -> None:
        """See `ends.Initiator`."""
        for connection in self._connections:
            connection.close()


def views(
    memory: Any, case: Case, peer: int, *, of_source: bool
) -> list[list[memoryview]]:
    """The places of each slot that a peer takes part in, in the order of sending."""
    all_ = memoryview(memory)
    found = []
    for slot in range(case.window):
        spans = [span for span in case.spans(slot) if span.peer == peer]
        begins = [span.source if of_source else span.target for span in spans]
        found.append(
            [
                all_[begin : begin + span.length]
                for begin, span in zip(begins, spans, strict=True)
            ]
        )
    return found


def send_all(connection: socket.socket, pieces: list[memoryview]) -> None:
    """Sends all bytes of all pieces, in order."""
    while pieces:
        pieces = after(pieces, connection.sendmsg(pieces[:IOV_MAX]))


def receive_all(connection: socket.socket, pieces: list[memoryview]) -> bool:
    """Fills all pieces, in order. False if the connection ends before."""
    while pieces:
        # A list of memoryviews is writable buffers; typeshed asks for a union.
        buffers: list[Any] = list(pieces[:IOV_MAX])
        received = connection.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
        if received == 0:
            return False
        pieces = after(pieces, received)
    return True


def after(pieces: list[memoryview], moved: int) -> list[memoryview]:
    """What is left of the pieces once so many bytes are done."""
    for index, piece in enumerate(pieces):
        if moved < len(piece):
            return [piece[moved:], *pieces[index + 1 :]]
        moved -= len(piece)
    return []
