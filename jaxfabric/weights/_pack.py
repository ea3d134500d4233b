"""Boxes of tiles into the bytes of a bucket, and out of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401  # so that np.dtype knows bfloat16 and its like
import numpy as np
import numpy.typing as npt

from jaxfabric.weights._buckets import BLOCK, Bucket, Move, scale_shape
from jaxfabric.weights._match import view
from jaxfabric.weights._plan import Plan
from jaxfabric.weights._quantise import quantise
from jaxfabric.weights._tiles import box_index

# What is copied and checksummed at a time: it is still in a core's L2 cache then.
_PART_BYTES = 512 << 10

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Tile = Callable[[int, int], Array]  # of a leaf's number and its own
Seen = Callable[[Bytes], object]


def pack(
    plan: Plan, bucket: Bucket, tile_of: Tile, out: Bytes, seen: Seen | None = None
) -> None:
    """Copies a bucket's boxes out of source tiles, in the target's dtypes.

    Args:
      plan: whose bucket it is.
      bucket: of `Plan.sends`.
      tile_of: gives the source rank's tile of a leaf.
      out: uint8[at least bucket.nbytes].
      seen: is called with each part of ``out`` once it is written, in order.
    """
    for move in bucket.moves:
        link = plan.links[move.link]
        tile = tile_of(link.source, move.source_tile)
        tile = tile.reshape(view(tile.shape, len(move.shape)))
        values = _part_of(tile, move.source_start, move.shape)
        payload = _box(out, move, plan.target.leaves[link.target].dtype)
        if move.scales >= 0:
            scales = _scales(out, move)
            payload[...], scales[...] = quantise(values)
            _show(seen, payload)
            _show(seen, scales)
            continue
        for part, place in _parts(values, payload):
            place[...] = part.astype(place.dtype, copy=False)
            _show(seen, place)


def unpack(
    plan: Plan, bucket: Bucket, tile_of: Tile, data: Bytes, seen: Seen | None = None
) -> None:
    """Copies a bucket's boxes into target tiles; the reverse of `pack`.

    Args:
      plan: whose bucket it is.
      bucket: of `Plan.receives`.
      tile_of: gives the target rank's tile of a leaf.
      data: uint8[at least bucket.nbytes].
      seen: is called with each part of ``data`` before it is copied, as in `pack`.
    """
    for move in bucket.moves:
        link = plan.links[move.link]
        leaf = plan.target.leaves[link.target]
        tile = tile_of(link.target, move.target_tile)
        tile = tile.reshape(view(tile.shape, len(move.shape)))
        place = _part_of(tile, move.target_start, move.shape)
        for part, where in _parts(_box(data, move, leaf.dtype), place):
            _show(seen, part)
            where[...] = part
        if move.scales < 0:
            continue
        scales = tile_of(link.scales, move.target_tile)
        scales = scales.reshape(view(scales.shape, len(move.shape)))
        start = (
            *move.target_start[:-2],
            *(begin // BLOCK for begin in move.target_start[-2:]),
        )
        found = _scales(data, move)
        _show(seen, found)
        scales[box_index(start, scale_shape(move.shape))] = found


def _parts(first: Array, second: Array) -> Iterator[tuple[Array, Array]]:
    """Walks two arrays of one shape in row-major order, a cache's worth at a time."""
    if first.ndim == 0 or first.nbytes <= _PART_BYTES:
        yield first, second
        return
    rows = _PART_BYTES // (first.nbytes // len(first))
    if rows == 0:
        for number in range(len(first)):
            yield from _parts(first[number], second[number])
        return
    for begin in range(0, len(first), rows):
        yield first[begin : begin + rows], second[begin : begin + rows]


def _part_of(tile: Array, start: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    index: Any = (*box_index(start, shape), ...)  # a view even if there is one element
    return tile[index]  # type: ignore[no-any-return]


def _show(seen: Seen | None, part: Array) -> None:
    if seen is not None:
        seen(part.reshape(-1).view(np.uint8))


def _box(data: Bytes, move: Move, dtype: str) -> Array:
    part = data[move.offset : move.offset + move.nbytes]
    return part.view(np.dtype(dtype)).reshape(move.shape)


def _scales(data: Bytes, move: Move) -> Array:
    shape = scale_shape(move.shape)
    part = data[move.scales : move.scales + 4 * math.prod(shape)]
    return part.view(np.float32).reshape(shape)
