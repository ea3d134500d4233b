"""Dispatch, combine and barrier on two GPUs, inside jit, beside lax.all_to_all.

    python benchmarks/gpu_moe.py [tokens ...]

One process with two GPUs; hidden 7168, 256 experts, top-8, bf16, zero_tail=False. A
program is a chain of the same call with donated buffers, so that XLA replays its
command buffer; printed is the wall-clock time of a call, the median of 9 runs, in
microseconds. The all-to-all moves as many rows to the other rank and keeps as many.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxfabric as jf

AXIS = "expert"
HIDDEN, EXPERTS, TOP_K, LENGTH, RUNS = 7168, 256, 8, 20, 9


def timed(step: Callable[..., Any], mesh: jax.sharding.Mesh, *args: Any) -> float:
    """Microseconds of one call; ``step`` maps the first operand to its successor."""

    def chain(x: jax.Array, *rest: jax.Array) -> jax.Array:
        for _ in range(LENGTH):
            x = step(x, *rest)
        return x

    mapped = jax.shard_map(
        chain, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
    )
    program = jax.jit(mapped, donate_argnums=0)
    x = args[0] + 0
    for _ in range(4):  # compile, capture, replay
        x = jax.block_until_ready(program(x, *args[1:]))
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        x = jax.block_until_ready(program(x, *args[1:]))
        times.append((time.perf_counter() - began) / LENGTH * 1e6)
    return statistics.median(times)


def pair(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Dispatch and combine, with the rows that dispatch gave."""
    d = jf.moe.dispatch(
        x,
        ids,
        weights,
        axis_name=AXIS,
        num_experts=EXPERTS,
        zero_tail=False,
    )
    return jf.moe.combine(d.tokens, d.plan)


def main() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), (AXIS,))
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    sizes = [int(a) for a in sys.argv[1:]] or [8, 128, 512, 4096]
    sharding = jax.sharding.NamedSharding(mesh, P(AXIS))
    with jf.Fabric(mesh, window_bytes=1 << 20):
        token = jax.device_put(jnp.zeros(2, jnp.float32), sharding)
        alone = timed(lambda t: jf.barrier(AXIS, token=t), mesh, token)
        print(f"barrier {alone:.1f} us")
        for tokens in sizes:
            random = np.random.default_rng(0)
            x = random.standard_normal((2 * tokens, HIDDEN), np.float32)
            order = np.argsort(random.random((2 * tokens, EXPERTS)), axis=1)
            ids = order[:, :TOP_K].astype(np.int32)
            weights = np.full(ids.shape, 1 / TOP_K, np.float32)
            put = [
                jax.device_put(a, sharding)
                for a in (x.astype(jnp.bfloat16), ids, weights)
            ]
            both = timed(pair, mesh, *put)
            rows = jax.device_put(
                np.zeros((4 * tokens, HIDDEN), jnp.bfloat16), sharding
            )
            lax = timed(
                lambda r: jax.lax.all_to_all(r, AXIS, 0, 0, tiled=True), mesh, rows
            )
            print(
                f"{tokens:5d} tokens: dispatch and combine, grouped {both:7.1f} us; "
                f"two lax.all_to_all {2 * lax:7.1f} us"
            )


if __name__ == "__main__":
    main()
