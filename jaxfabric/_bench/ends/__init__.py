"""The two ends of each subject: what writes, and what is written to.

A module here has two classes, `Target` and `Initiator`, with the methods of
`Protocol`s below. They run in children and load nothing of jaxfabric but `case`
(`fabric` excepted, which is jaxfabric).
"""

from __future__ import annotations

import mmap
from typing import Any, Protocol

import numpy as np

from ..case import Case

# No single operation may take longer; it then fails its case.
OPERATION_TIMEOUT_S = 20.0


class Target(Protocol):
    """What is written to: passive, but for what its library does."""

    memory: np.ndarray  # uint8

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None: ...

    def card(self) -> dict[str, Any]:
        """What an initiator needs to write here; becomes JSON."""

    def prepare(self, case: Case, peer: int) -> None:
        """This target is number `peer` in the coming operations of `case`."""

    def wait(self, operations: int) -> None:
        """Waits until so many operations have arrived, if it can know of them."""

    def close(self) -> None:
        """Lets go of everything; nothing is under way."""


class Initiator(Protocol):
    """What writes."""

    memory: np.ndarray  # uint8

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None: ...

    def connect(self, cards: list[dict[str, Any]]) -> None:
        """The targets, whose numbers are their places."""

    def prepare(self, case: Case) -> None:
        """Whatever can be done once for all operations of `case`."""

    def write(self, slot: int) -> None:
        """One operation, from its start until the initiator knows that it is done."""

    def begin(self, slot: int) -> Any:
        """Starts an operation; what it returns goes to `finish`, in order."""

    def finish(self, operation: Any) -> None:
        """Waits until the initiator knows that it is done."""

    def versions(self) -> dict[str, str]:
        """Of the libraries that do the work."""

    def close(self) -> None:
        """Lets go of everything; nothing is under way."""


def allocate(bytes_: int) -> np.ndarray:
    """Page-aligned private memory, uint8[bytes_]; already there, not lazily."""
    memory = np.frombuffer(mmap.mmap(-1, bytes_), np.uint8)
    memory[:] = 0
    return memory
