"""Mooncake's transfer engine over TCP."""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import time
from typing import Any

from mooncake.engine import TransferEngine

from ..case import Case
from . import OPERATION_TIMEOUT_S, allocate

PACKAGE = "mooncake-transfer-engine-non-cuda"
# What its queue to a TCP peer holds; it refuses more ("queue-full").
QUEUE_PIECES = 1024


def open_engine(memory: Any) -> Any:
    """An engine with all of the memory registered."""
    engine = TransferEngine()
    if code := engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
        raise ConnectionError(f"initialize() gives {code}")
    if code := engine.register_memory(memory.ctypes.data, len(memory)):
        raise MemoryError(f"register_memory() gives {code}")
    return engine


class Target:
    """An engine whose threads answer."""

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None:
        self.memory = allocate(bytes_)
        self._engine = open_engine(self.memory)

    def card(self) -> dict[str, Any]:
        """See `ends.Target`."""
        name = f"127.0.0.1:{self._engine.get_rpc_port()}"
        return {"name": name, "base": self.memory.ctypes.data}

    def prepare(self, case: Case, peer: int) -> None:
        """See `ends.Target`."""

    def wait(self, operations: int) -> None:
        """See `ends.Target`."""

    def close(self) -> None:
        """See `ends.Target`."""


@dataclasses.dataclass
class Operation:
    """What was started for one `begin`, and may be waited for only once."""

    numbers: list[int]
    batch: bool
    pieces: int
    done: bool = False


class Initiator:
    """A write of one piece is a transfer, of several a batch for each peer.

    At most `QUEUE_PIECES` are in flight, which may be fewer operations than asked.
    """

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None:
        self.memory = allocate(bytes_)
        self._engine = open_engine(self.memory)
        self._cards: list[dict[str, Any]] = []
        # Of each slot: name, sources, targets and lengths for each peer.
        self._writes: list[list[tuple[str, list[int], list[int], list[int]]]] = []
        self._flying: collections.deque[Operation] = collections.deque()

    def connect(self, cards: list[dict[str, Any]]) -> None:
        """See `ends.Initiator`."""
        self._cards = cards

    def prepare(self, case: Case) -> None:
        """See `ends.Initiator`."""
        source = self.memory.ctypes.data
        self._flying.clear()
        self._writes = []
        for slot in range(case.window):
            writes = []
            for peer, card in enumerate(self._cards[: case.targets]):
                spans = [span for span in case.spans(slot) if span.peer == peer]
                for first in range(0, len(spans), QUEUE_PIECES):
                    some = spans[first : first + QUEUE_PIECES]
                    writes.append(
                        (
                            card["name"],
                            [source + span.source for span in some],
                            [card["base"] + span.target for span in some],
                            [span.length for span in some],
                        )
                    )
            self._writes.append(writes)

    def write(self, slot: int) -> None:
        """See `ends.Initiator`."""
        writes = self._writes[slot]
        if len({name for name, *_ in writes}) > 1:
            self.finish(self.begin(slot))
            return
        for name, sources, targets, lengths in writes:
            if len(lengths) == 1:
                code = self._engine.transfer_sync_write(
                    name, sources[0], targets[0], lengths[0]
                )
            else:
                code = self._engine.batch_transfer_sync_write(
                    name, sources, targets, lengths
                )
            if code:
                raise ConnectionError(f"a write gives {code}")

    def begin(self, slot: int) -> Operation:
        """See `ends.Initiator`."""
        writes = self._writes[slot]
        pieces = sum(len(lengths) for *_, lengths in writes)
        if pieces > QUEUE_PIECES:
            self.write(slot)
            return Operation([], batch=False, pieces=0, done=True)
        while pieces + sum(o.pieces for o in self._flying) > QUEUE_PIECES:
            self.finish(self._flying[0])
        operation = Operation([], batch=pieces > len(writes), pieces=pieces)
        for name, sources, targets, lengths in writes:
            if operation.batch:
                number = self._engine.batch_transfer_async_write(
                    name, sources, targets, lengths
                )
            else:
                number = self._engine.transfer_submit_write(
                    name, sources[0], targets[0], lengths[0]
                )
            if number <= 0:
                raise ConnectionError(f"a write cannot be started: {number}")
            operation.numbers.append(number)
        self._flying.append(operation)
        return operation

    def finish(self, operation: Operation) -> None:
        """See `ends.Initiator`."""
        if operation.done:
            return
        operation.done = True
        self._flying.remove(operation)
        if operation.batch:
            if code := self._engine.get_batch_transfer_status(operation.numbers):
                raise ConnectionError(f"a batch gives {code}")
            return
        end = time.monotonic() + OPERATION_TIMEOUT_S
        for number in operation.numbers:
            while (state := self._engine.transfer_check_status(number)) == 0:
                if time.monotonic() > end:
                    raise TimeoutError(f"not done after {OPERATION_TIMEOUT_S:g} s")
            if state < 0:
                raise ConnectionError(f"a write gives {state}")

    def versions(self) -> dict[str, str]:
        """See `ends.Initiator`."""
        return {PACKAGE: importlib.metadata.version(PACKAGE)}

    def close(self) -> None:
        """See `ends.Initiator`."""
