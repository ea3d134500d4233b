"""Packing: boxes of source tiles into a bucket, and out of it into target tiles.

A bucket is copied and checksummed in strips, as many bytes as stay in a core's cache.
Both sides cut it alike, and their threads share its strips.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # so that np.dtype knows bfloat16 and its like
import numpy as np
import numpy.typing as npt

from jaxfabric.weights._buckets import BLOCK, Bucket, Move, scale_shape
from jaxfabric.weights._match import view
from jaxfabric.weights._plan import Plan
from jaxfabric.weights._quantise import quantise_into
from jaxfabric.weights._tiles import box_index

# Checksums are of strips: both sides need the same.
STRIP_BYTES = 1 << 20

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Tile = Callable[[int, int], Array]  # of a leaf's number and its own
Index = tuple[int | slice, ...]
Work = Callable[[], object]
# Of a move: the work for a part of it, given its index in boxes and in scales.
Works = Callable[[Move], Callable[[Any, Any], Work]]


class Strip(NamedTuple):
    """What one thread does at a time.

    Attributes:
      number: in its bucket.
      works: copy it.
      data: its bytes in the bucket, in one part or two.
    """

    number: int
    works: Sequence[Work]
    data: Sequence[Bytes]

    def copy(self) -> None:
        """Copies it from its tiles, or to them."""
        for work in self.works:
            work()


def packing(plan: Plan, bucket: Bucket, tile_of: Tile, out: Bytes) -> Iterator[Strip]:
    """Strips that copy a bucket's boxes out of source tiles, in the target's dtypes.

    Args:
      plan: whose bucket it is.
      bucket: of `Plan.sends`.
      tile_of: gives the source rank's tile of a leaf.
      out: uint8[at least bucket.nbytes].
    """

    def works(move: Move) -> Callable[[Any, Any], Work]:
        tile = tile_of(plan.links[move.link].source, move.source_tile)
        values = _part_of(tile, move.source_start, move.shape)
        payload = _box(plan, out, move)
        if move.scales < 0:
            return lambda at, _: functools.partial(_copy, payload[at], values[at])
        scales = _scales(out, move)
        return lambda at, block: functools.partial(
            quantise_into, values[at], payload[at], scales[block]
        )

    return _strips(plan, bucket, out, works)


def unpacking(
    plan: Plan, bucket: Bucket, tile_of: Tile, data: Bytes
) -> Iterator[Strip]:
    """Strips that copy a bucket's boxes into target tiles; the reverse of `packing`.

    Args:
      plan: whose bucket it is.
      bucket: of `Plan.receives`.
      tile_of: gives the target rank's tile of a leaf.
      data: uint8[at least bucket.nbytes].
    """

    def works(move: Move) -> Callable[[Any, Any], Work]:
        link = plan.links[move.link]
        tile = tile_of(link.target, move.target_tile)
        place = _part_of(tile, move.target_start, move.shape)
        payload = _box(plan, data, move)
        if move.scales < 0:
            return lambda at, _: functools.partial(_copy, place[at], payload[at])
        start = (
            *move.target_start[:-2],
            *(begin // BLOCK for begin in move.target_start[-2:]),
        )
        tile = tile_of(link.scales, move.target_tile)
        scales_place = _part_of(tile, start, scale_shape(move.shape))
        scales = _scales(data, move)

        def work(at: Any, block: Any) -> Work:
            both = (place[at], payload[at]), (scales_place[block], scales[block])
            return functools.partial(_copy_all, both)

        return work

    return _strips(plan, bucket, data, works)


def pack(plan: Plan, bucket: Bucket, tile_of: Tile, out: Bytes) -> None:
    """All strips of `packing`."""
    for strip in packing(plan, bucket, tile_of, out):
        strip.copy()


def unpack(plan: Plan, bucket: Bucket, tile_of: Tile, data: Bytes) -> None:
    """All strips of `unpacking`."""
    for strip in unpacking(plan, bucket, tile_of, data):
        strip.copy()


def helpers_for(bucket: Bucket) -> int:
    """How many more threads are of use."""
    return bucket.nbytes // STRIP_BYTES


def _strips(plan: Plan, bucket: Bucket, data: Bytes, works: Works) -> Iterator[Strip]:
    """Small moves together, large ones in parts."""
    number = begin = end = 0
    small: list[Work] = []
    for move in bucket.moves:
        last = move.offset + move.nbytes
        if move.scales >= 0:
            last = move.scales + 4 * math.prod(scale_shape(move.shape))
        if small and last - begin > STRIP_BYTES:
            yield Strip(number, small, [data[begin:end]])
            number, small = number + 1, []
        work = works(move)
        if last - move.offset <= STRIP_BYTES:
            begin = begin if small else move.offset
            end = last
            small.append(work(..., ...))
            continue
        payload = _box(plan, data, move)
        for at in _cuts(move.shape, payload.itemsize, move.scales >= 0):
            parts, block = [_bytes(payload[at])], at
            if move.scales >= 0:
                block = _block(at, len(move.shape))
                parts.append(_bytes(_scales(data, move)[block]))
            yield Strip(number, [work(at, block)], parts)
            number += 1
    if small:
        yield Strip(number, small, [data[begin:end]])


def _cuts(
    shape: tuple[int, ...], itemsize: int, quantised: bool, before: Index = ()
) -> Iterator[Index]:
    """Parts of a large box that are contiguous in it; quantised, of whole blocks."""
    count = -(-math.prod(shape) * itemsize // STRIP_BYTES)
    rows = quantised and len(shape) == 2
    if count > shape[0] and not rows and len(shape) > 1:
        for number in range(shape[0]):
            yield from _cuts(shape[1:], itemsize, quantised, (*before, number))
        return
    step = -(-shape[0] // min(count, shape[0]))
    if rows:
        step = -(-step // BLOCK) * BLOCK
    for begin in range(0, shape[0], step):
        yield (*before, slice(begin, min(begin + step, shape[0])))


def _block(at: Index, dimensions: int) -> Index:
    """The scales of a part of a box."""
    rows = at[-1]
    if len(at) < dimensions - 1 or not isinstance(rows, slice):
        return at
    return (*at[:-1], slice(rows.start // BLOCK, -(-rows.stop // BLOCK)))


def _copy(place: Array, values: Array) -> None:
    place[...] = values.astype(place.dtype, copy=False)


def _copy_all(pairs: Sequence[tuple[Array, Array]]) -> None:
    for place, values in pairs:
        _copy(place, values)


def _part_of(tile: Array, start: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    tile = tile.reshape(view(tile.shape, len(shape)))
    index: Any = (*box_index(start, shape), ...)  # a view even if there is one element
    return tile[index]  # type: ignore[no-any-return]


def _box(plan: Plan, data: Bytes, move: Move) -> Array:
    leaf = plan.target.leaves[plan.links[move.link].target]
    part = data[move.offset : move.offset + move.nbytes]
    return part.view(np.dtype(leaf.dtype)).reshape(move.shape)


def _scales(data: Bytes, move: Move) -> Array:
    shape = scale_shape(move.shape)
    part = data[move.scales : move.scales + 4 * math.prod(shape)]
    return part.view(np.float32).reshape(shape)


def _bytes(part: Array) -> Bytes:
    return part.reshape(-1).view(np.uint8)
