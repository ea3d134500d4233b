"""The other ways in `bench weights`: gather and broadcast, and JAX's own transfers."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import numpy.typing as npt

import jaxfabric as jf
from jaxfabric.weights import Move, Plan
from jaxfabric.weights._tiles import box_index, tile_shape, tiles_of

_TIMEOUT_S = 120.0
_ID = 1 << 21  # of counts
Array = npt.NDArray[Any]


def _moves(plan: Plan, source: int, target: int) -> list[Move]:
    buckets = plan.sends(source).get(target, [])
    return [move for bucket in buckets for move in bucket.moves]


def _empty(plan: Plan, rank: int) -> dict[tuple[int, int], Array]:
    made = {}
    for number, leaf in enumerate(plan.target.leaves):
        tiles = tiles_of(plan.target, leaf)
        for which, holders in enumerate(tiles.holders):
            if rank in holders:
                made[number, which] = np.empty(tile_shape(leaf, tiles), leaf.dtype)
    return made


def _on_device(tiles: dict[tuple[int, int], Array]) -> dict[tuple[int, int], Any]:
    arrays = {key: jax.device_put(tile) for key, tile in tiles.items()}
    jax.block_until_ready(list(arrays.values()))
    return arrays


class Gather:
    """One rank of the trainer gathers all, then sends all to each rank of the sampler.

    It uses the same engine, in single writes as large as they are, without checksums;
    the tiles lie one after the other, so that nothing is put together at the middle.

    Args:
      engine: for the writes.
      takes: whether this is a rank of the sampler.
    """

    def __init__(
        self, engine: jf.TransferEngine, plan: Plan, rank: int, *, takes: bool = False
    ) -> None:
        self._engine, self._plan, self._rank = engine, plan, rank
        self._offsets: dict[tuple[int, int], int] = {}
        self._ends: dict[int, list[int]] = {}  # what each source rank has of it
        end = 0
        for owner in plan.source.ranks:
            begin = end
            for number, leaf in enumerate(plan.source.leaves):
                tiles = tiles_of(plan.source, leaf)
                nbytes = leaf.nbytes // len(tiles.holders)
                for which, holders in enumerate(tiles.holders):
                    if holders[0] == owner:
                        self._offsets[number, which] = end
                        end += nbytes
            self._ends[owner] = [begin, end]
        self._takes, self._nbytes = takes, end
        self._region: Any = None

    def ready(self, rank: Any) -> dict[str, Any]:
        """Makes memory: of this rank's part, or of everything."""
        whole = self._takes or self._rank == 0
        begin, end = (0, self._nbytes) if whole else self._ends[self._rank]
        self._region = self._engine.alloc(end - begin)
        self._region.array[:] = 0
        return {"memory": self._region.desc.to_bytes().hex()}

    def connect(self, rank: Any, peers: list[str], memories: list[str]) -> None:
        """To whom it sends."""
        self._peers = [self._engine.connect(bytes.fromhex(p)).result() for p in peers]
        self._memories = [jf.MrDesc.from_bytes(bytes.fromhex(m)) for m in memories]

    def send(self, rank: Any) -> None:
        """The trainer's side; ends when this rank's writes are done."""
        begin, end = self._ends[self._rank]
        base = 0 if self._rank == 0 else begin
        for (number, which), offset in self._offsets.items():
            if begin <= offset < end:
                tile = np.asarray(rank.params[number, which])
                flat = tile.reshape(-1).view(np.uint8)
                at = offset - base
                self._region.array[at : at + flat.nbytes] = flat
        if self._rank:
            self._write(self._memories[0], begin)
            return
        others = len(self._plan.source.ranks) - 1
        self._engine.imm_counter(_ID).wait(others, _TIMEOUT_S)
        futures = [
            self._engine.submit_single_write(self._region, memory, _ID)
            for memory in self._memories
        ]
        for future in futures:
            future.result()

    def _write(self, memory: jf.MrDesc, offset: int) -> None:
        self._engine.submit_single_write(
            self._region, memory, _ID, target_offset=offset
        ).result()

    def take(self, rank: Any) -> None:
        """The sampler's side; ends when the arrays are there."""
        rank.arrays.clear()
        self._engine.imm_counter(_ID).wait(1, _TIMEOUT_S)
        made = _empty(self._plan, self._rank)
        plan = self._plan
        for source in plan.source.ranks:
            for move in _moves(plan, source, self._rank):
                link = plan.links[move.link]
                leaf = plan.source.leaves[link.source]
                shape = tile_shape(leaf, tiles_of(plan.source, leaf))
                at = self._offsets[link.source, move.source_tile]
                nbytes = int(np.prod(shape)) * np.dtype(leaf.dtype).itemsize
                tile = self._region.array[at : at + nbytes].view(leaf.dtype)
                made[link.target, move.target_tile][
                    box_index(move.target_start, move.shape)
                ] = tile.reshape(shape)[box_index(move.source_start, move.shape)]
        rank.arrays = _on_device(made)


class Pull:
    """`jax.experimental.transfer`: boxes offered by sources, pulled by targets.

    It moves arrays as they are, so that the sources cut them and the targets put them
    together, as the same plan says.
    """

    def __init__(self) -> None:
        self._server: Any = None
        self._connections: dict[int, Any] = {}
        self._offered: list[Any] = []

    def address(self) -> str:
        """Of this process's server; "" if this JAX has none."""
        self._start()
        return "" if self._server is None else str(self._server.address())

    def _start(self) -> None:
        if self._server is not None:
            return
        try:
            from jax.experimental import transfer

            self._server = transfer.start_transfer_server(
                jax.devices()[0].client, "127.0.0.1:0", ["127.0.0.1:0"]
            )
        except (ImportError, AttributeError, RuntimeError):
            self._server = None

    def connect(self, rank: Any, addresses: list[str]) -> None:
        """The sampler's side."""
        self._start()
        if self._server is None or "" in addresses:
            raise RuntimeError("this JAX has no jax.experimental.transfer")
        for source, address in enumerate(addresses):
            self._connections[source] = self._server.connect(address)

    def send(self, rank: Any, uuid: int) -> None:
        """Offers what each target needs."""
        plan = rank.plan
        offered = []
        for target in plan.target.ranks:
            boxes = [
                jax.device_put(
                    np.ascontiguousarray(
                        np.asarray(
                            rank.params[plan.links[move.link].source, move.source_tile]
                        )[box_index(move.source_start, move.shape)]
                    )
                )
                for move in _moves(plan, rank.rank, target)
            ]
            self._server.await_pull(uuid + target, boxes)
            offered.append(boxes)
        self._offered = offered  # until the next round

    def take(self, rank: Any, uuid: int) -> None:
        """Pulls from all sources; ends when the arrays are there."""
        rank.arrays.clear()
        plan = rank.plan
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        made = _empty(plan, rank.rank)
        came = []
        for source, connection in self._connections.items():
            moves = _moves(plan, source, rank.rank)
            wanted = [
                jax.ShapeDtypeStruct(
                    move.shape,
                    plan.target.leaves[plan.links[move.link].target].dtype,
                    sharding=place,
                )
                for move in moves
            ]
            came.append((moves, connection.pull(uuid + rank.rank, wanted)))
        for moves, boxes in came:
            for move, box in zip(moves, boxes, strict=True):
                link = plan.links[move.link]
                made[link.target, move.target_tile][
                    box_index(move.target_start, move.shape)
                ] = np.asarray(box)
        rank.arrays = _on_device(made)
