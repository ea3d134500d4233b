"""Tiles: the parts that a sharding cuts an array into, and who holds each."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxfabric.weights._layout import LeafLayout, MeshLayout, TreeLayout

Ints = npt.NDArray[np.int64]
TilesByKey = dict[tuple[int, int], npt.NDArray[Any]]

_ALIGNMENT = 64  # of tiles, in bytes


class Tiles(NamedTuple):
    """How one array is cut.

    Attributes:
      parts: in how many each dimension is cut.
      holders: for each tile, in row-major order, the ranks that hold it, ascending.
    """

    parts: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]


def tiles_of(layout: TreeLayout, leaf: LeafLayout) -> Tiles:
    """The tiles of a leaf."""
    return _tiles(layout.meshes[leaf.mesh], leaf.spec)


@functools.lru_cache(maxsize=4096)
def _tiles(mesh: MeshLayout, spec: tuple[tuple[str, ...], ...]) -> Tiles:
    names = [name for name, _ in mesh.axes]
    sizes = dict(mesh.axes)
    cutting = [axis for axes in spec for axis in axes]
    rest = [name for name in names if name not in cutting]
    parts = tuple(math.prod(sizes[axis] for axis in axes) for axes in spec)
    ranks = np.asarray(mesh.ranks).reshape([sizes[name] for name in names])
    order = [names.index(axis) for axis in cutting + rest]
    rows = ranks.transpose(order).reshape(math.prod(parts), -1)
    return Tiles(parts, tuple(tuple(sorted(set(row))) for row in rows.tolist()))


@functools.lru_cache(maxsize=4096)
def _held(tiles: Tiles, rank: int) -> tuple[int, ...]:
    return tuple(n for n, ranks in enumerate(tiles.holders) if rank in ranks)


def tiles_held(layout: TreeLayout, leaf: LeafLayout, rank: int) -> tuple[int, ...]:
    """Numbers of the tiles of a leaf that a rank holds."""
    return _held(tiles_of(layout, leaf), rank)


def tile_shape(leaf: LeafLayout, tiles: Tiles) -> tuple[int, ...]:
    """The shape of each tile of a leaf: all have the same."""
    return tuple(size // n for size, n in zip(leaf.shape, tiles.parts, strict=True))


def empty_tiles(layout: TreeLayout, rank: int) -> TilesByKey:
    """Zeroed tiles of all that a rank holds, by number of leaf and of tile.

    Their pages are there: what comes first need not wait for them.
    """
    held = {
        (number, tile): (tile_shape(leaf, tiles_of(layout, leaf)), leaf.dtype)
        for number, leaf in enumerate(layout.leaves)
        for tile in tiles_held(layout, leaf, rank)
    }
    made = {key: _aligned(shape, dtype) for key, (shape, dtype) in held.items()}
    for values in made.values():
        values.reshape(-1).view(np.uint8).fill(0)
    return made


def aligned_copy(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A contiguous copy that JAX takes as it is.

    What does not begin at a multiple of 64 bytes it copies once more, in threads of
    its own.
    """
    copy = _aligned(values.shape, values.dtype)
    copy[...] = values
    return copy


def _aligned(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + nbytes].view(dtype).reshape(shape)


class Segments(NamedTuple):
    """Where one dimension is cut by either side; arrays of one length."""

    source_tile: Ints
    source_start: Ints  # in its tile
    target_tile: Ints
    target_start: Ints
    length: Ints


def segments(extent: int, source: tuple[int, int], target: tuple[int, int]) -> Segments:
    """Cuts a range where either side's tiles end.

    Args:
      extent: length of the range.
      source, target: where the range begins on each side, and how long a tile is.

    Example::

      segments(6, (0, 3), (0, 2)).length      # 2, 1, 1, 2
    """
    cuts = {0, extent}
    for begin, length in (source, target):
        first = length - begin % length
        cuts.update(range(first, extent, length))
    starts = np.asarray(sorted(cuts), np.int64)
    begins, ends = starts[:-1], starts[1:]
    return Segments(
        (begins + source[0]) // source[1],
        (begins + source[0]) % source[1],
        (begins + target[0]) // target[1],
        (begins + target[0]) % target[1],
        ends - begins,
    )


class Pieces(NamedTuple):
    """The boxes that lie in one tile of either side; arrays over pieces.

    Attributes:
      source_tile, target_tile: int64[p], numbers of tiles.
      source_start, target_start: int64[p, d], where the box begins in its tile.
      shape: int64[p, d].
    """

    source_tile: Ints
    source_start: Ints
    target_tile: Ints
    target_start: Ints
    shape: Ints


def pieces(
    extent: tuple[int, ...],
    source: tuple[tuple[int, int, int], ...],
    target: tuple[tuple[int, int, int], ...],
) -> Pieces:
    """Cuts a box where either side's tiles end; row-major order.

    Args:
      extent: of the box.
      source, target: for each dimension, where the box begins, how long a tile is,
        and how many tiles there are.
    """
    cut = [
        segments(size, ours[:2], theirs[:2])
        for size, ours, theirs in zip(extent, source, target, strict=True)
    ]
    indices = np.meshgrid(*(np.arange(len(c.length)) for c in cut), indexing="ij")
    chosen = [index.ravel() for index in indices]
    count = chosen[0].size if chosen else 1

    def column(name: str) -> list[Ints]:
        return [
            getattr(one, name)[index] for one, index in zip(cut, chosen, strict=True)
        ]

    def stack(name: str) -> Ints:
        columns = column(name)
        if not columns:
            return np.zeros((count, 0), np.int64)
        return np.stack(columns, axis=1)

    def number(name: str, side: tuple[tuple[int, int, int], ...]) -> Ints:
        result = np.zeros(count, np.int64)
        for values, (_, _, parts) in zip(column(name), side, strict=True):
            result = result * parts + values
        return result

    return Pieces(
        number("source_tile", source),
        stack("source_start"),
        number("target_tile", target),
        stack("target_start"),
        stack("length"),
    )


def box_index(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The slices of a box."""
    return tuple(
        slice(begin, begin + size) for begin, size in zip(start, shape, strict=True)
    )


def overlaps(starts: Ints, shapes: Ints) -> tuple[int, int] | None:
    """Two boxes that share an element, if there are any; int64[n, d] each.

    Sorted by where they begin in the dimension in which they begin at most places,
    each box is compared with those that begin before it ends.
    """
    if not len(starts) or not starts.shape[1]:
        return (0, 1) if len(starts) > 1 else None
    axis = max(range(starts.shape[1]), key=lambda d: len(np.unique(starts[:, d])))
    order = np.argsort(starts[:, axis], kind="stable")
    ends = starts + shapes
    begins = starts[order, axis]
    for place, box in enumerate(order):
        last = int(np.searchsorted(begins, ends[box, axis], side="left"))
        others = order[place + 1 : last]
        both = (starts[others] < ends[box]) & (starts[box] < ends[others])
        hit = np.flatnonzero(both.all(axis=1))
        if hit.size:
            return int(box), int(others[hit[0]])
    return None
