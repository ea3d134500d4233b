"""What goes over the wire: counted from the routes, and as the Fabric counts it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from fabric_cases import AXIS, mapped, mesh_of_all, place

import jaxfabric as jf

HEADER_BYTES = 64
ROW_ROUTE_BYTES = 8  # token and number of slots
SLOT_BYTES = 12  # expert, k and weight
ALIGNMENT = 64


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Traffic:
    """Bytes from rank to rank, from the routes alone."""

    def __init__(self, ids: np.ndarray, num_experts: int, row_bytes: int) -> None:
        n, _, k = ids.shape
        self.local = num_experts // n
        self.slots_of_row = min(k, self.local)
        self.row_bytes = row_bytes
        owner = np.where(ids < 0, -1, ids // self.local)
        hits = owner[..., None] == np.arange(n)  # [N, T, K, N]
        self.rows = hits.any(2).sum(1)  # [source, destination]
        self.slots = hits.sum((1, 2))

    def route(self, source: int, destination: int) -> int:
        rows, slots = self.rows[source, destination], self.slots[source, destination]
        metadata = rows * ROW_ROUTE_BYTES + slots * SLOT_BYTES
        return aligned(HEADER_BYTES + metadata) + rows * self.row_bytes

    def replay(self, source: int, destination: int) -> int:
        return HEADER_BYTES + self.rows[source, destination] * self.row_bytes

    def reduce(self, source: int, destination: int, scalars: bool = False) -> int:
        """Back along the routes of `destination`'s tokens to experts of `source`."""
        rows = self.rows[destination, source]
        metadata = rows * self.slots_of_row * 4 * scalars
        return aligned(HEADER_BYTES + metadata) + rows * self.row_bytes

    def forward(self, source: int, destination: int) -> int:
        return self.route(source, destination) + self.reduce(source, destination)

    def backward(self, source: int, destination: int) -> int:
        return self.replay(source, destination) + self.reduce(source, destination, True)


def difference(after: Any, before: Any) -> Any:
    """Counters of snapshots, subtracted."""
    return {
        rank: {
            peer: {name: row[name] - before[rank][peer][name] for name in row}
            for peer, row in by_peer.items()
        }
        for rank, by_peer in after.items()
    }


def check(counts: Any, calls: int, expected: Any) -> None:
    """Of each local rank to and from each peer: `calls` messages of these bytes."""
    assert counts
    for rank, by_peer in counts.items():
        for peer, row in by_peer.items():
            assert row["messages_sent"] == calls, (rank, peer)
            assert row["messages_received"] == calls, (rank, peer)
            assert row["message_bytes_sent"] == expected(rank, peer), (rank, peer)
            assert row["message_bytes_received"] == expected(peer, rank), (rank, peer)
            assert row["puts"] == row["put_bytes"] == row["stale_dropped"] == 0


def run(kind: str, dtype: Any = np.float32, **options: Any) -> None:
    """A layer, forwards then with gradients; everything is counted."""
    mesh = mesh_of_all()
    n, t, d, k, e = mesh.size, 6, 5, 3, 16
    rng = np.random.default_rng(0)
    ids = moe_oracle.routing(kind, rng, n, t, k, e)
    traffic = Traffic(ids, e, d * np.dtype(dtype).itemsize)
    operands = (
        place(mesh, rng.normal(size=(n * t, d)).astype(dtype)),
        place(mesh, ids.reshape(n * t, k)),
        place(mesh, rng.random((n * t, k)).astype(np.float32)),
    )

    def layer(x: Any, ids: Any, weights: Any) -> Any:
        dispatched = jf.moe.dispatch(
            *(x, ids, weights), axis_name=AXIS, num_experts=e, **options
        )
        rows = dispatched.tokens
        if dispatched.row_index is not None:
            rows = jnp.where(
                dispatched.row_index[:, None] < 0, 0, rows[dispatched.row_index]
            )
        stats = dispatched.stats
        return jf.moe.combine(rows, dispatched.plan), stats.sent, stats.received

    def loss(x: Any, weights: Any, ids: Any) -> Any:
        return (mapped(mesh, layer)(x, ids, weights)[0].astype(jnp.float32) ** 2).sum()

    forward = mapped(mesh, layer)
    backward = jax.jit(jax.grad(loss, argnums=(0, 1)))
    with jf.Fabric(mesh) as fabric:
        _, sent, received = jax.block_until_ready(forward(*operands))
        for shard in sent.addressable_shards:
            rank = shard.index[0].start // n
            assert np.asarray(shard.data).tolist() == traffic.rows[rank].tolist()
        for shard in received.addressable_shards:
            rank = shard.index[0].start // n
            assert np.asarray(shard.data).tolist() == traffic.rows[:, rank].tolist()
        check(fabric.snapshot(), 2, traffic.forward)
        before = fabric.snapshot()
        jax.block_until_ready(backward(operands[0], operands[2], operands[1]))
        counts = difference(fabric.snapshot(), before)
        check(counts, 4, lambda *who: traffic.forward(*who) + traffic.backward(*who))


@pytest.mark.parametrize("kind", moe_oracle.ROUTINGS)
def test_eight_ranks(kind: str) -> None:
    run(kind)


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 3},
        {"expand": False},
        {"expert_alignment": 8, "zero_tail": False},
        {"dtype": jnp.bfloat16},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_do_not_change_what_travels(options: Any) -> None:
    """Rows over the capacity travel too: the receiver drops them."""
    run("random", **options)


@pytest.mark.jaxfabric(processes=4)
@pytest.mark.parametrize("kind", ["random", "empty_ranks"])
def test_four_processes(kind: str) -> None:
    run(kind)


def test_rows_travel_once_per_rank() -> None:
    """Two experts of one rank cost one row, also on the way back."""
    once = Traffic(np.array([[[4, 5]], [[0, 4]]]), 8, 100)
    assert once.rows.tolist() == [[0, 1], [1, 1]]
    assert once.slots.tolist() == [[0, 2], [1, 1]]
    assert once.route(0, 1) == aligned(64 + 8 + 24) + 100
    assert once.reduce(1, 0) == 64 + 100
    assert once.reduce(1, 0, scalars=True) == aligned(64 + 8) + 100


def test_a_smaller_mesh_and_the_reference_send_nothing() -> None:
    """Ranks are counted on their own, and pure JAX does not use the Fabric."""
    mesh = mesh_of_all()
    x = place(mesh, np.zeros((mesh.size, 2), np.float32))
    ids = place(mesh, np.zeros((mesh.size, 1), np.int32))
    weights = place(mesh, np.ones((mesh.size, 1), np.float32))

    def layer(x: Any, ids: Any, weights: Any) -> Any:
        return jf.moe.dispatch(
            *(x, ids, weights),
            axis_name=AXIS,
            num_experts=mesh.size,
            implementation="reference",
        ).tokens

    with jf.Fabric(mesh) as fabric:
        jax.block_until_ready(mapped(mesh, layer)(x, ids, weights))
        check(fabric.snapshot(), 0, lambda *who: 0)
