"""Random trees on random meshes, for tests of jf.weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from concurrent import futures
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from transfer_cases import PATIENCE_S, engine

import jaxfabric as jf
from jaxfabric.weights import (
    LeafLayout,
    MeshLayout,
    Plan,
    Push,
    Receiver,
    Sender,
    Taken,
    TreeLayout,
    _pack,
)
from jaxfabric.weights._tiles import (
    TilesByKey,
    box_index,
    empty_tiles,
    tile_shape,
    tiles_of,
)

Arrays = dict[str, npt.NDArray[Any]]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
STRIP_BYTES = 4 << 10  # threads share even small buckets
DTYPES = ("float32", "bfloat16", "int8", "float16")


def mesh(*sizes: int, first_rank: int = 0, per_rank: int = 1) -> MeshLayout:
    """A mesh with axes a, b, ...; ranks count up, `per_rank` positions each."""
    axes = tuple(zip("abcd", sizes, strict=False))
    count = math.prod(sizes)
    return MeshLayout(axes, tuple(first_rank + i // per_rank for i in range(count)))


@st.composite
def meshes(draw: st.DrawFn) -> MeshLayout:
    """Up to 8 positions, one or two to a rank, in any order."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=0, max_size=3))
    while math.prod(sizes) > 8:
        sizes.pop()
    per_rank = draw(st.sampled_from([1, 1, 2]))
    made = mesh(*sizes, per_rank=per_rank)
    return MeshLayout(made.axes, tuple(draw(st.permutations(made.ranks))))


@st.composite
def specs(draw: st.DrawFn, on: MeshLayout, dimensions: int) -> Any:
    """For each dimension, axes of the mesh; each axis cuts one at most."""
    spec: list[tuple[str, ...]] = [()] * dimensions
    for name, _ in draw(st.permutations(on.axes)):
        where = draw(st.integers(-1, dimensions - 1))
        if where >= 0:
            spec[where] = (*spec[where], name)
    return tuple(spec)


@st.composite
def two_layouts(draw: st.DrawFn) -> tuple[TreeLayout, TreeLayout]:
    """The same leaves on two meshes, sharded in two ways."""
    ours, theirs = draw(meshes()), draw(meshes())
    leaves: tuple[list[LeafLayout], list[LeafLayout]] = ([], [])
    for number in range(draw(st.integers(1, 4))):
        dimensions = draw(st.integers(0, 3))
        cuts = draw(specs(ours, dimensions)), draw(specs(theirs, dimensions))
        shape = tuple(
            draw(st.integers(1, 3)) * math.lcm(_parts(ours, a), _parts(theirs, b))
            for a, b in zip(*cuts, strict=True)
        )
        dtype = draw(st.sampled_from(DTYPES))
        for side, spec in zip(leaves, cuts, strict=True):
            side.append(LeafLayout(f"leaf{number}", shape, dtype, 0, spec))
    return TreeLayout((ours,), tuple(leaves[0])), TreeLayout(
        (theirs,), tuple(leaves[1])
    )


def _parts(on: MeshLayout, axes: tuple[str, ...]) -> int:
    return math.prod(dict(on.axes)[axis] for axis in axes)


def whole_arrays(layout: TreeLayout, seed: int = 0) -> Arrays:
    """Random contents of each leaf."""
    rng = np.random.default_rng(seed)
    made = {}
    for leaf in layout.leaves:
        values = rng.integers(-100, 100, leaf.shape) + rng.random(leaf.shape)
        made[leaf.name] = np.asarray(values).astype(leaf.dtype)
    return made


def tile(layout: TreeLayout, number: int, which: int, arrays: Arrays) -> Any:
    """A tile, cut out of the whole array."""
    leaf = layout.leaves[number]
    tiles = tiles_of(layout, leaf)
    shape = tile_shape(leaf, tiles)
    position = np.unravel_index(which, tiles.parts) if tiles.parts else ()
    start = tuple(int(p) * n for p, n in zip(position, shape, strict=True))
    return arrays[leaf.name][box_index(start, shape)]


def poisoned(plan: Plan, rank: int) -> TilesByKey:
    """Tiles of a target rank, full of a pattern that no test sends."""
    tiles = empty_tiles(plan.target, rank)
    for values in tiles.values():
        values.reshape(-1).view(np.uint8)[...] = 0xA5
    return tiles


class TileSender(Sender):
    """A rank that is pushed whole arrays by name, and cuts its tiles out of them."""

    def _tiles(self, params: Arrays) -> TilesByKey:
        return {
            (number, which): tile(self.layout, number, which, params)
            for number, leaf in enumerate(self.layout.leaves)
            for which, holders in enumerate(tiles_of(self.layout, leaf).holders)
            if self.rank in holders
        }


class TileReceiver(Receiver):
    """A rank that takes copies of its tiles."""

    def _tree(self, tiles: TilesByKey) -> TilesByKey:
        return {key: values.copy() for key, values in tiles.items()}


@dataclasses.dataclass
class Jobs:
    """All ranks of a trainer and of a sampler, in one process.

    Attributes:
      threads: of each rank; ``None``: the even ones have four, and the odd ones one.
    """

    transport: str
    source: TreeLayout
    target: TreeLayout
    options: dict[str, Any]
    stack: contextlib.ExitStack
    senders: list[TileSender] = dataclasses.field(default_factory=list)
    receivers: list[TileReceiver] = dataclasses.field(default_factory=list)
    threads: int | None = None

    def threads_of(self, rank: int) -> int:
        return self.threads or (1 if rank % 2 else 4)

    def open_engine(self, name: str) -> jf.TransferEngine:
        return self.stack.enter_context(engine(self.transport, name=name))

    def open_sender(self, rank: int) -> TileSender:
        own = self.open_engine(f"trainer{rank}")
        opened = TileSender(
            *(own, self.source),
            rank=rank,
            threads=self.threads_of(rank),
            **self.options,
        )
        self.stack.callback(opened.close)
        return opened

    def open_receiver(self, rank: int, leader: bytes | None = None) -> TileReceiver:
        opened = TileReceiver(
            self.open_engine(f"sampler{rank}"),
            None,
            layout=self.target,
            rank=rank,
            leader=leader,
            threads=self.threads_of(rank),
        )
        self.stack.callback(opened.close)
        return opened

    def addresses(self) -> list[bytes]:
        return [sender.address() for sender in self.senders]

    def push(self, arrays: Arrays, version: int) -> list[Push]:
        return [sender.push(arrays, version) for sender in self.senders]

    def take(self, min_version: int = 0) -> dict[int, Taken]:
        """All ranks take, each on a thread of its own."""
        with futures.ThreadPoolExecutor(len(self.receivers)) as pool:
            taken = [
                pool.submit(receiver.take, min_version) for receiver in self.receivers
            ]
            return {
                receiver.rank: future.result(PATIENCE_S)
                for receiver, future in zip(self.receivers, taken, strict=True)
            }


@contextlib.contextmanager
def jobs(
    transport: str,
    source: TreeLayout,
    target: TreeLayout,
    *,
    join: bool = True,
    threads: int | None = None,
    **options: Any,
) -> Iterator[Jobs]:
    """Both jobs, connected unless ``join`` is false."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_pack, "STRIP_BYTES", STRIP_BYTES))
        made = Jobs(transport, source, target, options, stack, threads=threads)
        made.senders += [made.open_sender(rank) for rank in source.ranks]
        for rank in target.ranks:
            leader = made.receivers[0].address() if made.receivers else None
            made.receivers.append(made.open_receiver(rank, leader))
        for receiver in made.receivers if join else ():
            receiver.connect(made.addresses())
        yield made


def assert_tiles(target: TreeLayout, arrays: Arrays, tiles: TilesByKey) -> None:
    """Tiles are those of whole arrays, to the bit."""
    assert tiles
    for (number, which), values in tiles.items():
        wanted = tile(target, number, which, arrays)
        assert values.dtype == wanted.dtype
        assert values.tobytes() == np.ascontiguousarray(wanted).tobytes()
