"""Buckets: boxes that travel between two ranks as one write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

BLOCK = 128  # of quantised leaves, in both dimensions
_ALIGNMENT = 64  # of boxes in a bucket
_BUCKETS_MIN = 4  # between two ranks, unless they are smaller than the next
_SMALLEST = 4 << 20
_SOURCES_FULL = 64  # of more, each has a smaller share of a receiver's memory


class Move(NamedTuple):
    """A box of one source tile that becomes a box of one target tile.

    Attributes:
      link: number of the `Link`.
      source_tile, target_tile: numbers of tiles, in row-major order.
      source_start, target_start, shape: of the box in its tile, in elements, with as
        many dimensions as the link.
      offset: of its first byte in its bucket.
      nbytes: of its elements in the target's dtype.
      scales: offset of its scales in the bucket; -1 where there are none.
    """

    link: int
    source_tile: int
    target_tile: int
    source_start: tuple[int, ...]
    target_start: tuple[int, ...]
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0
    scales: int = -1


class Bucket(NamedTuple):
    """Moves between two ranks that travel as one write.

    Attributes:
      moves: in the order in which they lie in it.
      nbytes: of all of it.
    """

    moves: tuple[Move, ...]
    nbytes: int


def bucket_size(nbytes: int, bucket_bytes: int, sources: int) -> int:
    """How large the buckets between two ranks are that share so many bytes.

    Some buckets for any two ranks let packing, writing and unpacking overlap; below
    some MiB the bookkeeping of each costs as much as its bytes. A receiver has slots
    for each of the ``sources`` ranks.

    >>> bucket_size(64 << 20, 32 << 20, 4) >> 20
    16
    >>> bucket_size(1 << 30, 32 << 20, 256) >> 20
    8
    """
    share = bucket_bytes * _SOURCES_FULL // max(sources, _SOURCES_FULL)
    return min(bucket_bytes, max(_SMALLEST, min(share, nbytes // _BUCKETS_MIN)))


def largest(buckets: Iterable[Bucket]) -> int:
    """Bytes of the largest, up to where another box may begin."""
    most = max((bucket.nbytes for bucket in buckets), default=0)
    return -(-most // _ALIGNMENT) * _ALIGNMENT


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a box that begins at a block."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


def in_parts(move: Move, bucket_bytes: int, quantised: bool) -> Iterator[Move]:
    """Cuts a move into moves that fit a bucket, as `boxes` does."""
    itemsize = move.nbytes // max(1, math.prod(move.shape))
    if _room(move.shape, itemsize, quantised) <= bucket_bytes:
        yield move  # as most are; there may be many
        return
    for start, shape in boxes(move.shape, itemsize, bucket_bytes, quantised):
        yield move._replace(
            source_start=_add(move.source_start, start),
            target_start=_add(move.target_start, start),
            shape=shape,
            nbytes=math.prod(shape) * itemsize,
        )


def boxes(
    shape: tuple[int, ...], itemsize: int, nbytes: int, quantised: bool
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts a box along its outer dimensions; start and shape of each part.

    Parts take about half of ``nbytes``; quantised ones are cut between blocks only.
    """
    steps = list(shape)
    for axis in range(len(steps)):
        if _room(tuple(steps), itemsize, quantised) <= nbytes:
            break
        inner = math.prod(steps[:axis] + steps[axis + 1 :]) * itemsize
        unit = BLOCK if quantised and axis >= len(steps) - 2 else 1
        # Half of it, since scales and alignment take room, too.
        fits = max(1, nbytes // 2 // (inner * unit))
        steps[axis] = min(steps[axis], fits * unit)
    for start in itertools.product(
        *(range(0, n, step) for n, step in zip(shape, steps, strict=True))
    ):
        yield (
            start,
            tuple(
                min(step, size - begin)
                for begin, size, step in zip(start, shape, steps, strict=True)
            ),
        )


def in_buckets(
    moves: Iterable[tuple[Move, bool]], bucket_bytes: int
) -> Iterator[Bucket]:
    """Fills buckets in order; each move comes with whether it is quantised."""
    filled: list[Move] = []
    used = 0
    for whole, quantised in moves:
        itemsize = whole.nbytes // max(1, math.prod(whole.shape))
        for move in in_parts(whole, bucket_bytes, quantised):
            room = _room(move.shape, itemsize, quantised)
            if filled and used + room > bucket_bytes:
                yield Bucket(tuple(filled), used)
                filled, used = [], 0
            scales = used + _aligned(move.nbytes) if quantised else -1
            filled.append(move._replace(offset=used, scales=scales))
            used += room
    if filled:
        yield Bucket(tuple(filled), used)


def _room(shape: tuple[int, ...], itemsize: int, quantised: bool) -> int:
    """Bytes that a box takes in a bucket, its scales included."""
    nbytes = _aligned(math.prod(shape) * itemsize)
    if quantised:
        nbytes += _aligned(4 * math.prod(scale_shape(shape)))
    return nbytes


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _add(start: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(start, more, strict=True))
