"""What is measured: one kind of write at one size, and where its bytes go."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

KINDS = ("single", "paged", "scatter")
# 1 KiB to 64 MiB.
SIZES = tuple(1 << power for power in range(10, 27, 2))

# Operations in flight do not share memory, and all of it is no more than this: so
# few of the largest are in flight.
POOL_BYTES = 128 << 20
WINDOW_MIN = 2
# Even the smallest paged write has several pages.
PAGES_MIN = 4
PAGE_BYTES_MAX = 16 << 10
# The bytes repeat after a prime, so that a page in a wrong place is noticed.
PATTERN_BYTES = 65_521


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes that one write moves, contiguous on both sides."""

    peer: int
    source: int  # offset in the initiator's memory
    target: int  # offset in the peer's
    length: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of write at one size.

    Attributes:
      kind: "single" is contiguous; "paged" goes to shuffled pages of the target;
        "scatter" has one slice for each peer.
      size: bytes that one operation moves.
      peers: targets of a scatter; the other kinds write to the first.
      window: operations in flight while the rate is measured, at most. Each has a
        place of its own in memory, a slot.
      page: length of a page of a paged write; 0 for 16 KiB at most, and four pages.
      one_place: all slots are the same memory.
    """

    kind: str
    size: int
    peers: int
    window: int
    page: int = 0
    one_place: bool = False

    @property
    def bytes_(self) -> int:
        """Memory of the initiator, and of each target."""
        return self.size if self.one_place else self.window * self.size

    @property
    def page_bytes(self) -> int:
        """Length of a page of a paged write."""
        return self.page or min(PAGE_BYTES_MAX, self.size // PAGES_MIN)

    @property
    def targets(self) -> int:
        """Peers that this case writes to."""
        return self.peers if self.kind == "scatter" else 1

    @property
    def label(self) -> str:
        """As in "paged 64 KiB"."""
        if self.page:
            return f"{self.size // self.page} pages of {readable(self.page)}"
        return f"{self.kind} {readable(self.size)}"

    def target_pages(self) -> np.ndarray:
        """Page i of a paged write goes to this page of the target, int64[pages]."""
        pages = self.size // self.page_bytes
        return np.random.default_rng(self.size).permutation(pages)

    def base(self, slot: int) -> int:
        """Where the memory of an operation in this slot begins, on both sides."""
        return 0 if self.one_place else slot * self.size

    def spans(self, slot: int) -> list[Span]:
        """Where the bytes of an operation in this slot go."""
        base = self.base(slot)
        if self.kind == "single":
            return [Span(0, base, base, self.size)]
        if self.kind == "paged":
            page = self.page_bytes
            return [
                Span(0, base + i * page, base + int(to) * page, page)
                for i, to in enumerate(self.target_pages())
            ]
        edges = [self.size * peer // self.peers for peer in range(self.peers + 1)]
        return [
            Span(peer, base + begin, base, end - begin)
            for peer, (begin, end) in enumerate(itertools.pairwise(edges))
        ]

    def pattern(self) -> np.ndarray:
        """The source's bytes, uint8[bytes_]; other cases have others."""
        seed = (KINDS.index(self.kind), self.size)
        block = np.random.default_rng(seed).integers(0, 256, PATTERN_BYTES, np.uint8)
        return np.resize(block, self.bytes_)

    def wrong_bytes(self, memory: np.ndarray, peer: int) -> int:
        """How many bytes of a target are not what all its slots should hold."""
        pattern = self.pattern()
        wrong = 0
        for slot in range(self.window):
            for span in self.spans(slot):
                if span.peer == peer:
                    got = memory[span.target : span.target + span.length]
                    want = pattern[span.source : span.source + span.length]
                    if not np.array_equal(got, want):
                        wrong += int(np.count_nonzero(got != want))
        return wrong

    def to_json(self) -> dict[str, Any]:
        """For `Case(**...)` in another process."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a measurement goes on.

    Attributes:
      seconds: ends after so long,
      least: but not before so many operations,
      most: and after these in any case.
    """

    seconds: float
    least: int
    most: int


def effort(size: int, *, seconds: float) -> Effort:
    """What one measurement of operations of this size may cost.

    Small operations end by their number, since thousands say no more than that;
    huge ones by time, but for a few that must be.

    >>> effort(1 << 10, seconds=0.2)
    Effort(seconds=0.2, least=16, most=5000)
    >>> effort(64 << 20, seconds=0.2)
    Effort(seconds=0.2, least=3, most=32)
    """
    most_bytes = 2 << 30
    return Effort(
        seconds=seconds,
        least=max(3, min(16, POOL_BYTES // size)),
        most=max(3, min(5_000, most_bytes // size)),
    )


def plan(
    kinds: tuple[str, ...],
    sizes: tuple[int, ...],
    *,
    peers: int,
    window: int,
    one_place: bool = False,
) -> list[Case]:
    """All cases, kind by kind and the small sizes first."""
    return [
        Case(kind, size, peers, window_for(size, window), one_place=one_place)
        for kind in kinds
        for size in sorted(sizes)
    ]


def window_for(size: int, most: int) -> int:
    """How many operations of a size may be in flight, and ``most`` at most."""
    return max(WINDOW_MIN, min(most, POOL_BYTES // size))


@functools.cache
def readable(bytes_: int) -> str:
    """As in "64 KiB"."""
    for power, unit in ((20, "MiB"), (10, "KiB")):
        if bytes_ >= 1 << power and bytes_ % (1 << power) == 0:
            return f"{bytes_ >> power} {unit}"
    return f"{bytes_} B"


def parse_size(text: str) -> int:
    """Bytes of "64KiB", "1 MiB" or "4096".

    Raises:
      ValueError: not a power of two from 1 KiB to 64 MiB.
    """
    number = text.strip()
    factor = 1
    for unit, power in (("KiB", 10), ("MiB", 20)):
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), 1 << power
    size = int(number) * factor if number.strip().isdecimal() else 0
    if not SIZES[0] <= size <= SIZES[-1] or size & (size - 1):
        raise ValueError(
            f"{text.strip()!r} is no size: give a power of two from 1KiB to 64MiB"
        )
    return size
