"""Tiles in arrays of JAX: taken out of a source's tree, and put together as a tree."""

from __future__ import annotations

import collections
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxfabric._errors import FabricError
from jaxfabric.weights._layout import TreeLayout
from jaxfabric.weights._tiles import (
    TilesByKey,
    aligned_copy,
    tile_shape,
    tiles_of,
)

Array = npt.NDArray[Any]


def source_tiles(layout: TreeLayout, tree: Any) -> dict[tuple[int, int], Any]:
    """The tiles of a tree that this process has, as they are on their devices.

    Raises:
      FabricError: a leaf has another shape, dtype or sharding than the layout.
    """
    leaves = jax.tree_util.tree_leaves(tree)
    if len(leaves) != len(layout.leaves):
        raise FabricError(
            f"push: the tree has {len(leaves)} leaves, its layout {len(layout.leaves)}"
        )
    found: dict[tuple[int, int], Any] = {}
    for number, (value, leaf) in enumerate(zip(leaves, layout.leaves, strict=True)):
        if tuple(value.shape) != leaf.shape or np.dtype(value.dtype).name != leaf.dtype:
            raise FabricError(
                f"push: {leaf.name} is {np.dtype(value.dtype).name}{value.shape}, and "
                f"{leaf.dtype}{leaf.shape} in the layout"
            )
        tiles = tiles_of(layout, leaf)
        shape = tile_shape(leaf, tiles)
        for index, part in _parts(value):
            if tuple(part.shape) != shape:
                raise FabricError(
                    f"push: {leaf.name} has shards of shape {tuple(part.shape)}, and "
                    f"tiles of {shape} in the layout: it is sharded otherwise"
                )
            found.setdefault((number, _tile(index, shape, tiles.parts)), part)
    return found


def target_tree(layout: TreeLayout, like: Any, tiles: TilesByKey) -> Any:
    """A tree of new arrays, sharded like ``like``, with copies of the tiles."""
    leaves, structure = jax.tree_util.tree_flatten(like)
    made: list[Any] = []
    for number, (value, leaf) in enumerate(zip(leaves, layout.leaves, strict=True)):
        cut = tiles_of(layout, leaf)
        shape = tile_shape(leaf, cut)
        sharding = getattr(value, "sharding", None)
        if sharding is None:
            made.append(tiles[number, 0].copy())
            continue
        indices = sharding.addressable_devices_indices_map(leaf.shape)
        parts = [
            # A copy of its own: JAX may use the memory that it is given.
            jax.device_put(
                aligned_copy(tiles[number, _tile(_starts(index), shape, cut.parts)]),
                device,
            )
            for device, index in indices.items()
        ]
        made.append(
            jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)
        )
    return jax.tree_util.tree_unflatten(structure, made)


class HostTiles:
    """A source's tiles in host memory, some of them at a time.

    On CPU they are the arrays' own memory. From other devices a tile is copied when
    it is asked for, and kept until there are more than ``bytes_max`` bytes.
    """

    def __init__(self, tiles: dict[tuple[int, int], Any], bytes_max: int) -> None:
        self._tiles = tiles
        self._bytes_max = bytes_max
        self._bytes = 0
        self._here: collections.OrderedDict[tuple[int, int], Array] = (
            collections.OrderedDict()
        )

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it keeps: copies, but not arrays of JAX."""
        copied = [t.nbytes for t in self._tiles.values() if isinstance(t, np.ndarray)]
        return self._bytes + sum(copied)

    def __call__(self, leaf: int, tile: int) -> Array:
        key = leaf, tile
        part = self._tiles[key]
        if not isinstance(part, jax.Array) or _on_host(part):
            return np.asarray(part)
        if key in self._here:
            self._here.move_to_end(key)
            return self._here[key]
        # Of a copy, since an array keeps what it was once read as.
        found = np.asarray(part.copy())
        self._here[key] = found
        self._bytes += found.nbytes
        while self._bytes > self._bytes_max and len(self._here) > 1:
            _, dropped = self._here.popitem(last=False)
            self._bytes -= dropped.nbytes
        return found


def _on_host(part: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in part.devices())


def _parts(value: Any) -> list[tuple[tuple[int, ...], Any]]:
    """Where each part that is here begins, and the part."""
    if not isinstance(value, jax.Array):
        return [((0,) * value.ndim, value.copy())]  # the caller may change it
    return [(_starts(shard.index), shard.data) for shard in value.addressable_shards]


def _starts(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index)


def _tile(
    starts: tuple[int, ...], shape: tuple[int, ...], parts: tuple[int, ...]
) -> int:
    number = 0
    for start, size, count in zip(starts, shape, parts, strict=True):
        number = number * count + start // size
    return number
