"""Dispatch and combine against lax.all_to_all, the reference and memcpy, in one run.

    jaxfabric run -n 4 benchmarks/moe.py

A step is dispatch and combine without experts between. The lax.all_to_all program
does the same work by hand: rows once per rank into [N, T, D], exchange, repeat rows
per expert, sum them per row, exchange back, sum. Each figure is the slowest rank's of
each iteration. "of floor" is the time over one memcpy of the deduplicated bytes of
both phases, in all processes at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from measure import Times, machine, table, time_call, time_memcpy

import jaxfabric as jf

AXIS = "expert"


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a step: per rank T tokens of D elements, K of E experts each."""

    name: str
    tokens: int
    hidden: int
    experts: int = 64
    k: int = 8


CASES = (Case("decode", 128, 7168), Case("prefill", 4096, 2048))


def fabric_step(case: Case, implementation: str, zero_tail: bool) -> Callable:
    """Dispatch and combine of this library."""

    def step(x: Any, ids: Any, weights: Any) -> Any:
        d = jf.moe.dispatch(
            x,
            ids,
            weights,
            axis_name=AXIS,
            num_experts=case.experts,
            implementation=implementation,
            zero_tail=zero_tail,
        )
        return jf.moe.combine(d.tokens, d.plan)

    return step


def all_to_all_step(case: Case, as_u32: bool) -> Callable:
    """The same with lax.all_to_all; rows travel as they are or as uint32 words."""

    def exchange(rows: Any) -> Any:
        if not as_u32:
            return jax.lax.all_to_all(rows, AXIS, 0, 0)
        words = jax.lax.bitcast_convert_type(
            rows.reshape(*rows.shape[:-1], -1, 2), jnp.uint32
        )
        words = jax.lax.all_to_all(words, AXIS, 0, 0)
        return jax.lax.bitcast_convert_type(words, rows.dtype).reshape(rows.shape)

    def step(x: Any, ids: Any, weights: Any) -> Any:
        ranks = jax.lax.axis_size(AXIS)
        local = case.experts // ranks
        tokens, k = ids.shape
        here = ids // local == jnp.arange(ranks)[:, None, None]  # [N, T, K]
        sent = here.any(-1)
        rows = exchange(jnp.where(sent[..., None], x, 0))
        routes = jax.lax.all_to_all(jnp.where(here, ids % local, -1), AXIS, 0, 0)
        gates = jax.lax.all_to_all(jnp.where(here, weights, 0), AXIS, 0, 0)
        # Group by expert: what ragged_dot wants.
        flat = routes.reshape(-1)
        slots = ranks * tokens * min(k, local)
        order = jnp.argsort(jnp.where(flat < 0, local, flat), stable=True)[:slots]
        grouped = rows.reshape(-1, case.hidden)[order // k]
        # (experts would compute here) Sum each row's slots in float32 by gathering
        # them, which XLA fuses, and bring the sums back.
        place = jnp.zeros(flat.size, jnp.int32).at[order].set(jnp.arange(slots))
        place, gates = place.reshape(-1, k), gates.reshape(-1, k)
        partial = sum(
            gates[:, q, None] * grouped[place[:, q]].astype(jnp.float32)
            for q in range(k)
        )
        partial = partial.astype(x.dtype).reshape(ranks, tokens, case.hidden)
        return exchange(partial).astype(jnp.float32).sum(0).astype(x.dtype)

    return step


def operands(case: Case, mesh: Any, seed: int) -> tuple[Any, ...]:
    """Random rows, distinct experts per token, weights that sum to one."""
    rng = np.random.default_rng(seed)
    n = mesh.size * case.tokens
    x = rng.standard_normal((n, case.hidden), np.float32).astype(jnp.bfloat16)
    ids = rng.random((n, case.experts)).argsort(1)[:, : case.k].astype(np.int32)
    weights = rng.random((n, case.k), np.float32)
    weights /= weights.sum(1, keepdims=True)
    sharding = NamedSharding(mesh, P(AXIS))

    def place(host: np.ndarray) -> Any:
        return jax.make_array_from_callback(
            host.shape, sharding, lambda index: host[index]
        )

    return place(x), place(ids), place(weights), ids


def deduplicated_bytes(case: Case, ids: np.ndarray, ranks: int) -> int:
    """Bytes of rows that one rank (mean) sends in both phases, to itself included."""
    owners = ids // (case.experts // ranks)
    copies = sum(len(np.unique(row)) for row in owners) / ranks
    return int(2 * copies * case.hidden * 2)


def run(case: Case, mesh: Any, iterations: int, slow: int) -> dict[str, Times]:
    """Times all implementations of one case, in turn."""
    *arrays, ids = operands(case, mesh, seed=0)
    steps = {
        "fabric, zero_tail=False": (fabric_step(case, "fabric", False), iterations),
        "fabric, zero_tail=True": (fabric_step(case, "fabric", True), iterations),
        "lax.all_to_all, bf16": (all_to_all_step(case, False), slow),
        "lax.all_to_all, u32": (all_to_all_step(case, True), slow),
        "reference": (fabric_step(case, "reference", False), slow),
    }
    compiled = {
        name: jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
        )
        for name, (step, _) in steps.items()
    }
    expected = local(compiled["reference"](*arrays)).astype(np.float32)
    for name, program in compiled.items():
        got = local(program(*arrays)).astype(np.float32)
        error = np.abs(got - expected).max()
        assert error < 0.1, f"{name} is wrong by {error}"
    floor_bytes = deduplicated_bytes(case, ids, mesh.size)
    times = {f"memcpy of {floor_bytes / 1e6:.1f} MB": time_memcpy(floor_bytes, 50)}
    for name, (_, count) in steps.items():
        times[name] = time_call(functools.partial(compiled[name], *arrays), count)
    return times


def local(array: Any) -> np.ndarray:
    """This process's part of a global array."""
    return np.concatenate([np.asarray(s.data) for s in array.addressable_shards])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--slow-iterations", type=int, default=12)
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    first = jax.process_index() == 0
    figures: dict[str, Any] = {"machine": machine()}
    if first:
        print(figures["machine"])
    with jf.Fabric(mesh):
        for case in CASES:
            times = run(case, mesh, options.iterations, options.slow_iterations)
            floor = next(iter(times.values())).p50
            ours = times["fabric, zero_tail=False"].p50
            rows = [
                [
                    name,
                    f"{t.p50 * 1e3:.2f}",
                    f"{t.p99 * 1e3:.2f}",
                    f"{t.p50 / floor:.1f}",
                    f"{t.p50 / ours:.2f}",
                ]
                for name, t in times.items()
            ]
            figures[case.name] = {
                name: {"p50_ms": t.p50 * 1e3, "p99_ms": t.p99 * 1e3}
                for name, t in times.items()
            }
            title = (
                f"{case.name}: {case.tokens} x {case.hidden} bf16, "
                f"{case.experts} experts, top-{case.k}"
            )
            if first:
                header = [title, "p50 ms", "p99 ms", "of floor", "x ours"]
                print("\n" + table(header, rows), flush=True)
    if first and options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
