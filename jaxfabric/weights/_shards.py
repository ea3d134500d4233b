"""Tiles in arrays of JAX: taken out of a source's tree, and put together as a tree."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxfabric._errors import FabricError
from jaxfabric.weights._layout import LeafLayout, TreeLayout, kind_of, named_leaves
from jaxfabric.weights._tiles import (
    TilesByKey,
    aligned_copy,
    tile_shape,
    tiles_held,
    tiles_of,
)

Array = npt.NDArray[Any]
_STRUCTURES_MAX = 8  # of trees that are known to have a layout's names


def source_tiles(
    layout: TreeLayout, tree: Any, rank: int | None = None
) -> dict[tuple[int, int], Any]:
    """The tiles of a tree that this process has, as they are on their devices.

    Args:
      layout: of the tree.
      tree: of arrays.
      rank: of the layout, all tiles of which have to be there; ``None`` for any.

    Raises:
      FabricError: the tree has other names than the layout, or a leaf another shape,
        dtype or sharding; it names the leaf.
    """
    found: dict[tuple[int, int], Any] = {}
    leaves = _leaves_of("push", layout, tree)
    for number, (value, leaf) in enumerate(zip(leaves, layout.leaves, strict=True)):
        tiles = tiles_of(layout, leaf)
        shape = tile_shape(leaf, tiles)
        for index, part in _parts(leaf.name, value):
            if tuple(part.shape) != shape:
                raise FabricError(
                    f"push: {leaf.name} has shards of shape {tuple(part.shape)}, and "
                    f"tiles of {shape} in the layout: it is sharded otherwise"
                )
            found.setdefault((number, _tile(index, shape, tiles.parts)), part)
        held = () if rank is None else tiles_held(layout, leaf, rank)
        missing = [tile for tile in held if (number, tile) not in found]
        if missing:
            why = f"tile {missing[0]}, rank {rank}'s, is not on its devices"
            raise _misplaced("push", layout, value, leaf, why)
    return found


def check_like(layout: TreeLayout, like: Any, rank: int) -> None:
    """Whether `target_tree` can make a tree of a rank's tiles; nothing for ``None``.

    Raises:
      FabricError: names, shapes, dtypes or shardings are others than the layout's.
    """
    if like is None:
        return
    for leaf, value, places in _wanted(layout, like):
        held = tiles_held(layout, leaf, rank)
        missing = [tile for _, tile in places if tile not in held]
        if missing:
            why = f"tile {missing[0]} would be here, and is not rank {rank}'s"
            raise _misplaced("Receiver", layout, value, leaf, why)


def target_tree(layout: TreeLayout, like: Any, tiles: TilesByKey) -> Any:
    """A tree of new arrays, sharded like ``like``, with copies of the tiles."""
    structure = jax.tree_util.tree_structure(like)
    made: list[Any] = []
    for number, (leaf, value, places) in enumerate(_wanted(layout, like)):
        sharding = getattr(value, "sharding", None)
        if sharding is None:
            made.append(tiles[number, 0].copy())
            continue
        missing = [tile for _, tile in places if (number, tile) not in tiles]
        if missing:
            why = f"tile {missing[0]} is not this rank's"
            raise _misplaced("take", layout, value, leaf, why)
        parts = [
            # A copy of its own: JAX may use the memory that it is given.
            jax.device_put(
                aligned_copy(tiles[number, tile]),
                jax.sharding.SingleDeviceSharding(
                    device, memory_kind=sharding.memory_kind
                ),
            )
            for device, tile in places
        ]
        made.append(
            jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)
        )
    return jax.tree_util.tree_unflatten(structure, made)


def _leaves_of(what: str, layout: TreeLayout, tree: Any) -> list[Any]:
    """The leaves of a tree that has the layout's names, shapes and dtypes."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    if structure not in layout.structures:
        _check_names(what, layout, [name for name, _ in named_leaves(tree)])
        if len(layout.structures) >= _STRUCTURES_MAX:
            layout.structures.clear()
        layout.structures.add(structure)
    for value, leaf in zip(leaves, layout.leaves, strict=True):
        try:
            kind = kind_of(what, leaf.name, value)
        except ValueError as error:
            raise FabricError(str(error)) from None
        if kind != (leaf.shape, leaf.dtype):
            raise FabricError(
                f"{what}: {leaf.name} is {kind[1]}{kind[0]}, and "
                f"{leaf.dtype}{leaf.shape} in the layout"
            )
    return leaves


def _check_names(what: str, layout: TreeLayout, names: list[str]) -> None:
    """Equal shapes do not tell leaves apart: names, in order, do."""
    wanted = [leaf.name for leaf in layout.leaves]
    if names == wanted:
        return
    pairs = itertools.zip_longest(names, wanted, fillvalue="none")
    number, (ours, theirs) = next((n, p) for n, p in enumerate(pairs) if p[0] != p[1])
    raise FabricError(
        f"{what}: the tree has {len(names)} leaves, its layout {len(wanted)}, and "
        f"number {number} is {ours} in the tree and {theirs} in the layout: use a tree "
        "of the structure that TreeLayout.of was given, or make the layout of this one"
    )


def _wanted(
    layout: TreeLayout, like: Any
) -> Iterator[tuple[LeafLayout, Any, list[tuple[jax.Device, int]]]]:
    """Each leaf, what it becomes here, and which tile each device gets."""
    leaves = _leaves_of("Receiver", layout, like)
    for value, leaf in zip(leaves, layout.leaves, strict=True):
        cut = tiles_of(layout, leaf)
        shape = tile_shape(leaf, cut)
        sharding = getattr(value, "sharding", None)
        places: list[tuple[jax.Device, int]] = []
        if sharding is not None:
            shards = tuple(sharding.shard_shape(leaf.shape))
            if shards != shape:
                raise FabricError(
                    f"Receiver: {leaf.name} of like= has shards of shape {shards}, and "
                    f"tiles of {shape} in layout=: it is sharded otherwise"
                )
            indices = sharding.addressable_devices_indices_map(leaf.shape)
            places = [
                (device, _tile(_starts(index), shape, cut.parts))
                for device, index in indices.items()
            ]
        elif shape != leaf.shape:
            raise FabricError(
                f"Receiver: {leaf.name} of like= has no sharding, and tiles of {shape} "
                "in layout="
            )
        yield leaf, value, places


def _misplaced(
    what: str, layout: TreeLayout, value: Any, leaf: LeafLayout, why: str
) -> FabricError:
    axes = dict(layout.meshes[leaf.mesh].axes)
    return FabricError(
        f"{what}: {leaf.name} is sharded otherwise than in the layout, where axes "
        f"{axes} cut it by {leaf.spec}: with {getattr(value, 'sharding', 'none')} "
        f"{why}; shard it as the tree that TreeLayout.of was given, on a mesh of the "
        "same order of devices"
    )


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


def _parts(name: str, value: Any) -> list[tuple[tuple[int, ...], Any]]:
    """Where each part that is here begins, and the part."""
    if not isinstance(value, jax.Array):
        return [((0,) * value.ndim, value.copy())]  # the caller may change it
    if value.is_deleted():
        raise FabricError(
            f"push: {name} is gone: it was deleted, or donated to a program"
        )
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
