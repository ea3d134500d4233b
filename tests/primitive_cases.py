"""A program of all primitives, whose bits must not depend on the transport."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fabric_cases import AXIS, local_rows, mapped, place

import jaxfabric as jf

N, T, D, K, E = 4, 6, 8, 2, 8  # ranks, tokens of each, width, choices, experts
RING = [(rank, (rank + 1) % N) for rank in range(N)]


def operands(mesh: jax.sharding.Mesh) -> tuple[jax.Array, ...]:
    """x, ids, weights of all ranks."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(N * T)]).astype(np.int32)
    return (
        place(mesh, rng.normal(size=(N * T, D)).astype(np.float32)),
        place(mesh, ids),
        place(mesh, rng.random((N * T, K)).astype(np.float32)),
    )


def every_primitive(mesh: jax.sharding.Mesh, transport: str) -> list[np.ndarray]:
    """What this process gets of a program that uses each primitive."""
    with jf.Fabric(mesh, transport=transport) as fabric:
        window = fabric.window((N, D), jnp.float32)

        def program(x: Any, ids: Any, weights: Any) -> Any:
            rank = jax.lax.axis_index(AXIS)
            token = jf.barrier(AXIS, token=jf.token())
            token = jf.put(
                *(window, x[0], (rank + 1) % N),
                axis_name=AXIS,
                offset=rank * D,
                id=3,
                token=token,
            )
            got, token = jf.wait(window, axis_name=AXIS, id=3, token=token)
            swapped, token = jf.exchange(x, RING, axis_name=AXIS, token=token)
            out = jf.moe.dispatch(x, ids, weights, axis_name=AXIS, num_experts=E)
            y = jf.moe.combine(jnp.tanh(out.tokens), out.plan)
            return got[(rank - 1) % N][None], swapped, out.tokens, y

        results = mapped(mesh, program)(*operands(mesh))
        return [
            rows
            for result in jax.block_until_ready(results)
            for _, rows in sorted(local_rows(result).items())
        ]
