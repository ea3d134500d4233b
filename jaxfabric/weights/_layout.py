"""TreeLayout: what one job's parameters look like, and who holds which part."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes  # noqa: F401  # so that np.dtype knows bfloat16 and its like
import numpy as np

from jaxfabric._errors import FabricError

_TEXT_BYTES_MAX = 1 << 28
_LEAVES_MAX = 1 << 20
_RANKS_MAX = 1 << 16
_DIMENSIONS_MAX = 16
_SIZE_MAX = 1 << 40
_NAME_CHARS_MAX = 1024


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """A mesh of devices, without the devices.

    Attributes:
      axes: name and size of each axis, in the order of the mesh.
      ranks: the process of each device, the last axis running fastest.
    """

    axes: tuple[tuple[str, int], ...]
    ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LeafLayout:
    """One array of a tree.

    Attributes:
      name: its path in the tree, such as ``"layers.0.wq"``.
      shape: of the whole array.
      dtype: name of the dtype.
      mesh: which mesh of the `TreeLayout` holds it.
      spec: for each dimension, the axes of the mesh that cut it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    mesh: int
    spec: tuple[tuple[str, ...], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class TreeLayout:
    """Names, shapes, dtypes and shardings of a tree of arrays.

    Both jobs make one of their own parameters; `plan` takes the two. It holds no
    device, so that it can be sent to a job that has others.

    Attributes:
      meshes: on which the leaves are.
      leaves: in the order of the tree.

    Raises:
      ValueError: a leaf is named twice, is cut unevenly, or is on no mesh.

    Example::

      layout = jf.weights.TreeLayout.of(params)
      layout = jf.weights.TreeLayout.from_bytes(layout.to_bytes())
    """

    meshes: tuple[MeshLayout, ...]
    leaves: tuple[LeafLayout, ...]

    def __post_init__(self) -> None:
        for mesh in self.meshes:
            _check_mesh(mesh)
        names = collections.Counter(leaf.name for leaf in self.leaves)
        if len(names) < len(self.leaves):
            twice = names.most_common(1)[0][0][:_NAME_CHARS_MAX]
            raise ValueError(f"TreeLayout: two leaves have the same name, {twice}")
        kinds = set()  # many leaves are of few kinds
        for leaf in self.leaves:
            kind = leaf.shape, leaf.dtype, leaf.mesh, leaf.spec
            if kind not in kinds or len(leaf.name) > _NAME_CHARS_MAX:
                _check_leaf(leaf, self.meshes)
                kinds.add(kind)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The processes that hold something, in order."""
        return tuple(sorted({rank for mesh in self.meshes for rank in mesh.ranks}))

    @functools.cached_property
    def structures(self) -> set[Any]:
        """Tree structures whose leaves were found to have these names."""
        return set()

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, each counted once."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @classmethod
    def of(
        cls,
        tree: Any,
        ranks: Callable[[jax.Device], int] | Sequence[int] | None = None,
    ) -> TreeLayout:
        """Describes a tree.

        Args:
          tree: of ``jax.Array``, or of ``jax.ShapeDtypeStruct`` with a
            ``NamedSharding``. What has no sharding, and NumPy arrays, are whole on
            each rank.
          ranks: the rank of a device, or those of all positions of the mesh, the
            last axis running fastest (for an ``AbstractMesh``). ``None`` takes the
            device's process.

        Raises:
          ValueError: a leaf is no array of numbers, or its sharding is neither named
            nor of one device; it names the leaf.

        Example::

          TreeLayout.of(params, ranks=lambda device: device.id)   # one for each device
        """
        meshes: dict[MeshLayout, int] = {}
        leaves = []
        listed = named_leaves(tree)
        kinds = [kind_of("TreeLayout", name, leaf) for name, leaf in listed]
        placed = [_placement(name, leaf, ranks) for name, leaf in listed]
        everywhere = _on_all_ranks([place for place in placed if place])
        for (name, _), kind, place in zip(listed, kinds, placed, strict=True):
            shape, dtype = kind
            mesh, spec = place or (everywhere, ())
            number = meshes.setdefault(mesh, len(meshes))
            padded = spec + ((),) * (len(shape) - len(spec))
            leaves.append(LeafLayout(name, shape, dtype, number, padded))
        return cls(tuple(meshes), tuple(leaves))

    def to_bytes(self) -> bytes:
        """For the other job; equal layouts give equal bytes."""
        return self._bytes

    @functools.cached_property
    def _bytes(self) -> bytes:
        meshes = [(mesh.axes, mesh.ranks) for mesh in self.meshes]
        leaves = [
            (leaf.name, leaf.shape, leaf.dtype, leaf.mesh, leaf.spec)
            for leaf in self.leaves
        ]
        text = json.dumps((meshes, leaves), separators=(",", ":"))
        return zlib.compress(text.encode(), 6)

    @classmethod
    def from_bytes(cls, data: bytes) -> TreeLayout:
        """Reads what `to_bytes` gave; raises FabricError on anything else."""
        try:
            inflate = zlib.decompressobj()
            text = inflate.decompress(data, _TEXT_BYTES_MAX)
            if not inflate.eof or inflate.unused_data:
                raise ValueError("it is cut off, or too long")
            meshes, leaves = json.loads(text)
            if len(meshes) > _LEAVES_MAX or len(leaves) > _LEAVES_MAX:
                raise ValueError(f"more than {_LEAVES_MAX} leaves")
            return cls(
                tuple(_read_mesh(mesh) for mesh in meshes),
                tuple(_read_leaf(leaf) for leaf in leaves),
            )
        except (
            *(ValueError, TypeError, OverflowError),
            *(zlib.error, RecursionError),
        ) as error:
            raise FabricError(
                f"TreeLayout: these bytes describe no tree of parameters: {error}"
            ) from None


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree, each with its path, such as ``"layers.0.wq"``."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def kind_of(what: str, name: str, leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a leaf.

    Raises:
      ValueError: it is no array of numbers; begins with ``what``, and names it.
    """
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(
            f"{what}: {name} is of type {type(leaf).__name__}, and no array: make it "
            "one (np.asarray), or leave it out"
        )
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"{what}: {name} has keys of random numbers ({leaf.dtype}): take their "
            "jax.random.key_data, or leave it out"
        )
    return tuple(int(size) for size in leaf.shape), np.dtype(leaf.dtype).name


_Placement = tuple[MeshLayout, tuple[tuple[str, ...], ...]]


def _on_all_ranks(placements: Sequence[_Placement]) -> MeshLayout:
    """A mesh of all ranks that hold something: for leaves that each has whole."""
    ranks = sorted({rank for mesh, _ in placements for rank in mesh.ranks})
    if len(ranks) < 2:
        return MeshLayout((), tuple(ranks) or (0,))
    return MeshLayout((("ranks", len(ranks)),), tuple(ranks))


def _placement(
    name: str, leaf: Any, ranks: Callable[[jax.Device], int] | Sequence[int] | None
) -> _Placement | None:
    """Mesh and spec of a leaf; ``None`` for one without sharding."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return None
    rank_of = ranks if callable(ranks) else lambda device: device.process_index
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        (device,) = sharding.device_set
        return MeshLayout((), (int(rank_of(device)),)), ()
    if not isinstance(sharding, jax.sharding.NamedSharding):
        raise ValueError(
            f"TreeLayout: {name} has {sharding}; give it a NamedSharding, for instance "
            "with jax.device_put"
        )
    if getattr(sharding.spec, "unreduced", None):
        raise ValueError(
            f"TreeLayout: {name} has {sharding.spec}: its values are sums of what "
            "several devices have; reduce it before, for instance with jax.reshard"
        )
    mesh = sharding.mesh
    axes = tuple((str(axis), int(size)) for axis, size in mesh.shape.items())
    if ranks is None or callable(ranks):
        if isinstance(mesh, jax.sharding.AbstractMesh):
            raise ValueError(
                f"TreeLayout: {name} is on an AbstractMesh, which has no devices: give "
                "ranks=, the rank of each position"
            )
        places = tuple(int(rank_of(device)) for device in mesh.devices.flat)
    else:
        places = tuple(int(rank) for rank in ranks)
    spec = tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in getattr(sharding.spec, "partitions", sharding.spec)
    )
    return MeshLayout(axes, places), spec


def _check_mesh(mesh: MeshLayout) -> None:
    names = [name for name, _ in mesh.axes]
    size = math.prod(size for _, size in mesh.axes)
    few = len(names) <= _DIMENSIONS_MAX
    if not few or len(set(names)) < len(names) or not 0 < size <= _RANKS_MAX:
        raise ValueError(f"TreeLayout: axes {mesh.axes} make no mesh")
    if len(mesh.ranks) != size:
        raise ValueError(
            f"TreeLayout: a mesh of {mesh.axes} has {size} positions, and "
            f"{len(mesh.ranks)} ranks are given"
        )
    if not all(0 <= rank < _RANKS_MAX for rank in mesh.ranks):
        raise ValueError(f"TreeLayout: ranks {mesh.ranks[:8]} are not all in range")


def _check_leaf(leaf: LeafLayout, meshes: Sequence[MeshLayout]) -> None:
    what = f"TreeLayout: {leaf.name[:_NAME_CHARS_MAX]}"
    if len(leaf.name) > _NAME_CHARS_MAX or len(leaf.shape) > _DIMENSIONS_MAX:
        raise ValueError(f"{what}: its name or shape is too long")
    if 0 in leaf.shape:
        raise ValueError(f"{what} has shape {leaf.shape}, no elements: leave it out")
    if not all(0 < size < _SIZE_MAX for size in leaf.shape):
        raise ValueError(f"{what} has shape {leaf.shape}")
    if math.prod(leaf.shape) >= _SIZE_MAX:
        raise ValueError(f"{what} has {math.prod(leaf.shape)} elements")
    try:
        known = not np.dtype(leaf.dtype).hasobject
    except (TypeError, ValueError, SyntaxError):
        known = False
    if not known or np.dtype(leaf.dtype).name != leaf.dtype:
        raise ValueError(f"{what} has dtype {leaf.dtype!r}, which is none of numbers")
    if not 0 <= leaf.mesh < len(meshes) or len(leaf.spec) != len(leaf.shape):
        raise ValueError(f"{what} is on mesh {leaf.mesh}, cut by {leaf.spec}")
    sizes = dict(meshes[leaf.mesh].axes)
    used = [axis for axes in leaf.spec for axis in axes]
    if len(set(used)) < len(used) or not set(used) <= set(sizes):
        raise ValueError(
            f"{what} is cut by {leaf.spec}; its mesh has the axes {tuple(sizes)}"
        )
    for size, axes in zip(leaf.shape, leaf.spec, strict=True):
        parts = math.prod(sizes[axis] for axis in axes)
        if size % parts:
            raise ValueError(
                f"{what} of shape {leaf.shape} cannot be cut into {parts} equal parts "
                f"by {axes}"
            )


def _read_mesh(value: Any) -> MeshLayout:
    axes, ranks = value
    return MeshLayout(
        tuple((_text(name), _whole(size)) for name, size in axes),
        tuple(_whole(rank) for rank in ranks),
    )


def _read_leaf(value: Any) -> LeafLayout:
    name, shape, dtype, mesh, spec = value
    return LeafLayout(
        _text(name),
        tuple(_whole(size) for size in shape),
        _text(dtype),
        _whole(mesh),
        tuple(tuple(_text(axis) for axis in axes) for axes in spec),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name is no text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _SIZE_MAX:
        raise ValueError(f"{str(value)[:40]} is no size")
    return value
