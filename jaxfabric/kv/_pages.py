"""What a receiver gives out: pages, slots for tails, ids; each to one at a time."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence

from jaxfabric._errors import CapacityError
from jaxfabric._transfer_engine import TransferEngine

# The engine's ids are below 2**27. Those of the lower half are the user's own.
IDS_BEGIN, IDS_END = 1 << 26, 1 << 27


class FreeList:
    """Numbers 0 to ``count - 1``, the one that has been free longest first."""

    def __init__(self, what: str, count: int) -> None:
        self._what = what
        self._free = deque(range(count))
        self._taken = bytearray(count)

    @property
    def free(self) -> int:
        """How many are free."""
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """So many of them; raises CapacityError, and takes none, if there are fewer."""
        if count > len(self._free):
            raise CapacityError(
                f"jf.kv: {count} {self._what} are wanted, and {len(self._free)} of "
                f"{len(self._taken)} are free; release requests, or make more"
            )
        numbers = tuple(self._free.popleft() for _ in range(count))
        for number in numbers:
            self._taken[number] = 1
        return numbers

    def give(self, numbers: Sequence[int]) -> None:
        """Takes them back; each must have been taken, once."""
        for number in numbers:
            if not self._taken[number]:
                raise ValueError(f"jf.kv: {self._what}: {number} was freed twice")
            self._taken[number] = 0
            self._free.append(number)


class IdPairs:
    """Pairs of the engine's 27-bit ids for requests, whose own ids have 64 bits.

    A pair of a transfer that ended badly is never given out again if a part of it may
    have been counted. A pair takes a byte of memory, once it was given out.
    """

    def __init__(self, begin: int = IDS_BEGIN, end: int = IDS_END - (1 << 25)) -> None:
        self._begin = begin
        self._lock = threading.Lock()  # of two owners of an engine, one after the other
        self._next = 0  # in turn: the one that was free longest, or almost
        self._unusable = bytearray((end - begin) // 2)  # in use, or retired
        self.free = len(self._unusable)

    def take(self) -> int:
        """The first of two ids, the second of which is one more."""
        with self._lock:
            place = self._unusable.find(0, self._next)
            if place < 0:
                place = self._unusable.find(0)
            if place < 0:
                raise CapacityError(
                    "jf.kv: all ids are used up; make a new TransferEngine"
                )
            self._unusable[place] = 1
            self._next = place + 1
            self.free -= 1
            return self._begin + 2 * place

    def give(self, pair: int, *, clean: bool) -> None:
        """Takes it back, for ever unless all was counted that was sent under it."""
        if clean:
            with self._lock:
                self._unusable[(pair - self._begin) // 2] = 0
                self.free += 1


_ids: weakref.WeakKeyDictionary[TransferEngine, IdPairs] = weakref.WeakKeyDictionary()


def ids_of(engine: TransferEngine) -> IdPairs:
    """Those of an engine, which counts on for them when their receiver is closed."""
    return _ids.setdefault(engine, IdPairs())
