"""Boxes of tiles into the bytes of a bucket, and out of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401  # so that np.dtype knows bfloat16 and its like
import numpy as np
import numpy.typing as npt

from jaxfabric.weights._buckets import BLOCK, Bucket, Move, scale_shape
from jaxfabric.weights._match import view
from jaxfabric.weights._plan import Plan
from jaxfabric.weights._quantise import quantise
from jaxfabric.weights._tiles import box_index

Bytes = npt.NDArray[np.uint8]
Tile = Callable[[int, int], npt.NDArray[Any]]  # of a leaf's number and its own


def pack(plan: Plan, bucket: Bucket, tile_of: Tile, out: Bytes) -> None:
    """Copies a bucket's boxes out of source tiles, in the target's dtypes.

    Args:
      plan: whose bucket it is.
      bucket: of `Plan.sends`.
      tile_of: gives the source rank's tile of a leaf.
      out: uint8[at least bucket.nbytes].
    """
    for move in bucket.moves:
        link = plan.links[move.link]
        tile = tile_of(link.source, move.source_tile)
        tile = tile.reshape(view(tile.shape, len(move.shape)))
        values = tile[box_index(move.source_start, move.shape)]
        payload = _box(out, move, plan.target.leaves[link.target].dtype)
        if move.scales < 0:
            payload[...] = values.astype(payload.dtype, copy=False)
        else:
            payload[...], _scales(out, move)[...] = quantise(values)


def unpack(plan: Plan, bucket: Bucket, tile_of: Tile, data: Bytes) -> None:
    """Copies a bucket's boxes into target tiles; the reverse of `pack`.

    Args:
      plan: whose bucket it is.
      bucket: of `Plan.receives`.
      tile_of: gives the target rank's tile of a leaf.
      data: uint8[at least bucket.nbytes].
    """
    for move in bucket.moves:
        link = plan.links[move.link]
        leaf = plan.target.leaves[link.target]
        tile = tile_of(link.target, move.target_tile)
        tile = tile.reshape(view(tile.shape, len(move.shape)))
        tile[box_index(move.target_start, move.shape)] = _box(data, move, leaf.dtype)
        if move.scales < 0:
            continue
        scales = tile_of(link.scales, move.target_tile)
        scales = scales.reshape(view(scales.shape, len(move.shape)))
        start = (
            *move.target_start[:-2],
            *(begin // BLOCK for begin in move.target_start[-2:]),
        )
        scales[box_index(start, scale_shape(move.shape))] = _scales(data, move)


def _box(data: Bytes, move: Move, dtype: str) -> npt.NDArray[Any]:
    part = data[move.offset : move.offset + move.nbytes]
    return part.view(np.dtype(dtype)).reshape(move.shape)


def _scales(data: Bytes, move: Move) -> npt.NDArray[Any]:
    shape = scale_shape(move.shape)
    part = data[move.scales : move.scales + 4 * math.prod(shape)]
    return part.view(np.float32).reshape(shape)
