"""Programs for tests/test_cuda.py: python cuda_cases.py CASE PROCESSES RANK."""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxfabric as jf

PORT = 29471
AXIS = "expert"


def open_mesh(processes: int, rank: int) -> jax.sharding.Mesh:
    """A mesh of two GPUs, in one process or two."""
    if processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{PORT}", processes, rank, local_device_ids=[rank]
        )
    return jax.sharding.Mesh(np.array(jax.devices()[:2]), (AXIS,))


def sharded(mesh: jax.sharding.Mesh, array: np.ndarray) -> jax.Array:
    """The array, its first axis over the ranks."""
    sharding = jax.sharding.NamedSharding(mesh, P(AXIS))
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def operands(
    mesh: jax.sharding.Mesh, tokens: int, hidden: int, k: int, experts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random x, ids and weights of both ranks."""
    random = np.random.default_rng(tokens + hidden)
    x = random.standard_normal((2 * tokens, hidden), np.float32)
    ids = np.argsort(random.random((2 * tokens, experts)), axis=1)[:, :k]
    ids = np.where(random.random(ids.shape) < 0.1, -1, ids).astype(np.int32)
    weights = random.random(ids.shape, np.float32)
    return sharded(mesh, x), sharded(mesh, ids), sharded(mesh, weights)


def same(got: Any, want: Any, what: str) -> None:
    """Compares this process's shards bit for bit."""
    for one, other in zip(got.addressable_shards, want.addressable_shards, strict=True):
        np.testing.assert_array_equal(
            np.asarray(one.data), np.asarray(other.data), err_msg=what
        )


def layer(x, ids, weights, *, implementation, dtype, experts, **options):
    """Dispatch, something per row, combine; all that dispatch tells."""
    d = jf.moe.dispatch(
        x.astype(dtype),
        ids,
        weights,
        axis_name=AXIS,
        num_experts=experts,
        implementation=implementation,
        **options,
    )
    rows = d.tokens
    if d.row_index is not None:
        index = jnp.where(d.row_index < 0, 0, d.row_index)
        rows = jnp.where((d.row_index < 0)[:, None], 0, rows[index])
    y = jf.moe.combine(rows * 2, d.plan)
    return (
        y,
        d.tokens,
        d.group_sizes,
        d.weights,
        d.plan.slot_row,
        d.stats.sent,
        d.stats.received,
        d.stats.dropped_at_receiver[None],
    )


def moe(mesh: jax.sharding.Mesh) -> None:
    """Bits of every result, over dtypes, sizes and options."""
    cases: list[tuple[int, int, Any, dict[str, Any]]] = [
        (64, 256, jnp.bfloat16, {}),
        (64, 100, jnp.float32, {"expand": False}),
        (33, 36, jnp.float16, {"capacity": 40, "expert_alignment": 8}),
        (700, 512, jnp.bfloat16, {"expert_alignment": 4}),
        (1, 8, jnp.float32, {}),
    ]
    for tokens, hidden, dtype, options in cases:
        args = operands(mesh, tokens, hidden, 4, 16)
        results = []
        for implementation in ("fabric", "reference"):
            run = functools.partial(
                layer, implementation=implementation, dtype=dtype, experts=16, **options
            )
            mapped = jax.shard_map(run, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
            results.append(jax.jit(mapped)(*args))
        for number, (got, want) in enumerate(zip(*results, strict=True)):
            same(got, want, f"{tokens}x{hidden} {options} result {number}")


def chain(mesh: jax.sharding.Mesh) -> None:
    """Many steps with psum and matrix products between, replayed and not."""
    args = operands(mesh, 96, 256, 4, 16)

    def step(x, ids, weights, *, implementation):
        for _ in range(4):
            y = layer(
                x,
                ids,
                weights,
                implementation=implementation,
                dtype=jnp.float32,
                experts=16,
            )[0]
            mean = jax.lax.psum(y.sum(), AXIS) / y.size
            x = jnp.tanh(y @ jnp.eye(256) - mean * 1e-3)
        return x

    results = []
    for implementation in ("fabric", "reference"):
        run = functools.partial(step, implementation=implementation)
        mapped = jax.shard_map(run, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
        jitted = jax.jit(mapped, donate_argnums=0)
        x = args[0] + 0
        for _ in range(50):
            x = jitted(x, *args[1:])
        results.append(jax.block_until_ready(x))
    for one, other in zip(
        results[0].addressable_shards, results[1].addressable_shards, strict=True
    ):
        # psum's order is NCCL's own, and XLA fuses the reference's products.
        np.testing.assert_allclose(
            np.asarray(one.data), np.asarray(other.data), rtol=1e-3, atol=1e-3
        )


def bad_expert(mesh: jax.sharding.Mesh) -> None:
    """An expert that is not there: the next call raises, and names the entry."""
    x, ids, weights = operands(mesh, 32, 64, 4, 16)
    run = functools.partial(
        layer, implementation="fabric", dtype=jnp.float32, experts=16
    )
    mapped = jax.shard_map(run, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
    jitted = jax.jit(mapped)
    jax.block_until_ready(jitted(x, ids + 100, weights))
    began = time.monotonic()
    failed = ""
    try:
        jax.block_until_ready(jitted(x, ids, weights))
    except jax.errors.JaxRuntimeError as error:
        failed = str(error)
    assert "names no expert" in failed, failed
    assert time.monotonic() - began < 10


def main() -> None:
    """Runs the case that the command line names."""
    case, processes, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    mesh = open_mesh(processes, rank)
    with jf.Fabric(mesh, timeout_s=20, mailbox_bytes=64 << 20, window_bytes=1 << 20):
        {"moe": moe, "chain": chain, "bad_expert": bad_expert}[case](mesh)
    print("passed", case)


main()
