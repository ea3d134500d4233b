"""Floor of shared memory: plain copies into memory of another process."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np

from ..case import Case
from . import allocate


class Target:
    """Memory that others map."""

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None:
        self._descriptor = os.memfd_create("jaxfabric-bench")
        os.ftruncate(self._descriptor, bytes_)
        self.memory = np.frombuffer(mmap.mmap(self._descriptor, bytes_), np.uint8)

    def card(self) -> dict[str, Any]:
        """See `ends.Target`."""
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        return {"path": path, "bytes": len(self.memory)}

    def prepare(self, case: Case, peer: int) -> None:
        """See `ends.Target`."""

    def wait(self, operations: int) -> None:
        """See `ends.Target`."""

    def close(self) -> None:
        """See `ends.Target`."""


class Initiator:
    """Copies; an operation is done when the copy returns."""

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None:
        self.memory = allocate(bytes_)
        self._targets: list[np.ndarray] = []
        self._copies: list[list[tuple[Any, ...]]] = []

    def connect(self, cards: list[dict[str, Any]]) -> None:
        """See `ends.Initiator`."""
        for card in cards:
            descriptor = os.open(card["path"], os.O_RDWR)
            memory = mmap.mmap(descriptor, card["bytes"])
            os.close(descriptor)
            self._targets.append(np.frombuffer(memory, np.uint8))

    def prepare(self, case: Case) -> None:
        """See `ends.Initiator`."""
        self._copies = [
            [
                (
                    self._targets[span.peer][span.target : span.target + span.length],
                    self.memory[span.source : span.source + span.length],
                )
                for span in case.spans(slot)
            ]
            for slot in range(case.window)
        ]

    def write(self, slot: int) -> None:
        """See `ends.Initiator`."""
        for target, source in self._copies[slot]:
            np.copyto(target, source)

    begin = write

    def finish(self, operation: Any) -> None:
        """See `ends.Initiator`."""

    def versions(self) -> dict[str, str]:
        """See `ends.Initiator`."""
        return {"numpy": np.__version__}

    def close(self) -> None:
        """See `ends.Initiator`."""
