"""What the programs of `bench moe` take and must give, made on the devices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxfabric as jf

from .moe_case import Case

AXIS = "expert"


def _rows(index: Any, hidden: int) -> Any:
    """Row ``index`` of an endless matrix of mixed small integers, bfloat16."""
    columns = jnp.arange(hidden, dtype=jnp.uint32)
    mixed = index.astype(jnp.uint32)[:, None] * np.uint32(2654435761)
    mixed = (mixed + columns) * np.uint32(2246822519)
    mixed ^= mixed >> 15
    mixed *= np.uint32(3266489917)
    mixed ^= mixed >> 13
    return ((mixed % 255).astype(jnp.int32) - 127).astype(jnp.bfloat16)


def placed(mesh: Any, array: np.ndarray) -> Any:
    """An array that every process has, its first axis over the ranks."""
    sharding = jax.sharding.NamedSharding(mesh, P(AXIS))
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


@functools.lru_cache(maxsize=2)
def _made_by(mesh: Any, hidden: int) -> Any:
    return jax.jit(
        lambda index: jnp.where((index < 0)[:, None], 0, _rows(index, hidden)),
        out_shardings=jax.sharding.NamedSharding(mesh, P(AXIS)),
    )


def operands(case: Case, mesh: Any) -> dict[str, Any]:
    """What steps take, made from the same numbers in every process.

    x bfloat16[N*T, D], ids int32[N*T, K], weights float32[N*T, K] that sum to one,
    token float32[N], exchanged bfloat16[N*N*T, D], counts int32[N*N, N].
    """
    total = case.ranks * case.tokens
    ids = case.ids()
    weights = np.random.default_rng(0).random(ids.shape, np.float32)
    weights /= weights.sum(1, keepdims=True)
    make = _made_by(mesh, case.hidden)
    everyone = np.tile(case.load().counts.astype(np.int32), (case.ranks, 1))
    return {
        "x": make(placed(mesh, np.arange(total, dtype=np.int32))),
        "ids": placed(mesh, ids),
        "weights": placed(mesh, weights),
        "token": placed(mesh, np.zeros(case.ranks, np.float32)),
        "exchanged": make(
            placed(mesh, np.arange(case.ranks * total, dtype=np.int32)),
        ),
        "counts": placed(mesh, everyone),
    }


def dispatched(case: Case, *args: Any, **options: Any) -> jf.moe.Dispatched:
    """A dispatch of the case's model, without zeros in its tail."""
    return jf.moe.dispatch(
        *args,
        axis_name=AXIS,
        num_experts=case.experts,
        **{"zero_tail": False, **options},
    )


def routed(case: Case, mesh: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What combine takes: rows for each expert, rows once per rank, and the plan."""

    def program(x: Any, ids: Any, weights: Any) -> Any:
        d = dispatched(case, x, ids, weights)
        once = dispatched(case, x, ids, weights, expand=False, token=d.token)
        return d.tokens, once.tokens, d.plan

    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
    )
    rows, rows_once, plan = jax.block_until_ready(
        jax.jit(mapped)(given["x"], given["ids"], given["weights"])
    )
    return {"rows": rows, "rows_once": rows_once, "plan": plan}


@jax.jit
def _largest_error(got: Any, want: Any) -> Any:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    # A NaN must not be lost on the way.
    error = jnp.where(jnp.isnan(got), jnp.inf, jnp.abs(got - want))
    return error.max() / jnp.abs(want).max()


def largest_error(got: Any, want: Any) -> float:
    """Of all processes' parts, relative to the largest magnitude. Collective."""
    return float(np.asarray(_largest_error(got, want).addressable_data(0)))


def exchanged_rows(case: Case, mesh: Any) -> Any:
    """What lax.ragged_all_to_all makes of `exchanged`, from everyone's rows."""
    counts = case.load().counts
    begins = np.cumsum(counts, 1) - counts
    each = case.ranks * case.tokens
    index = np.full((case.ranks, each), -1, np.int32)
    for rank in range(case.ranks):
        came = [
            source * each + begins[source, rank] + np.arange(counts[source, rank])
            for source in range(case.ranks)
        ]
        sources = np.concatenate(came)
        index[rank, : len(sources)] = sources
    return _made_by(mesh, case.hidden)(placed(mesh, index.reshape(-1)))
