"""The programs that `bench moe` times: chains of one call, for each subject.

Every chain maps its first operand, which is donated, to its successor: so that calls
follow each other, and XLA finds its buffers where they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxfabric as jf

from .moe_case import Case

AXIS = "expert"
_Step = Callable[..., Any]

# XLA's own way on GPUs is refused over several processes, or slow, or wrong.
RAGGED_OPTIONS = {"xla_gpu_unsupported_enable_ragged_all_to_all_decomposer": True}


@dataclasses.dataclass(frozen=True)
class Subject:
    """One line of the table.

    Attributes:
      operands: names of what its step takes after the carry; the carry's own name
        first.
      step: (case) -> a function of (carry, *operands) to the next carry.
      options: of XLA's compiler.
    """

    name: str
    role: str
    what: str
    wire: str
    operands: tuple[str, ...]
    step: Callable[[Case], _Step]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _dispatched(case: Case, *args: Any, **options: Any) -> jf.moe.Dispatched:
    return jf.moe.dispatch(
        *args,
        axis_name=AXIS,
        num_experts=case.experts,
        **{"zero_tail": False, **options},
    )


def _dispatch(**options: Any) -> Callable[[Case], _Step]:
    def of(case: Case) -> _Step:
        def step(token: Any, x: Any, ids: Any, weights: Any) -> Any:
            return _dispatched(case, x, ids, weights, token=token, **options).token

        return step

    return of


def _combine(case: Case) -> _Step:
    def step(token: Any, rows: Any, plan: Any) -> Any:
        return jf.moe.combine(rows, plan, token=token)[1]

    return step


def _pair(**options: Any) -> Callable[[Case], _Step]:
    def of(case: Case) -> _Step:
        def step(x: Any, ids: Any, weights: Any) -> Any:
            d = _dispatched(case, x, ids, weights, **options)
            return jf.moe.combine(d.tokens, d.plan)

        return step

    return of


def _all_to_all(case: Case) -> _Step:
    del case
    return lambda rows: lax.all_to_all(rows, AXIS, 0, 0, tiled=True)


def _ragged(case: Case) -> _Step:
    counts = case.load().counts.astype(np.int32)

    def step(rows: Any) -> Any:
        me = lax.axis_index(AXIS)
        sizes = jnp.asarray(counts)[me]
        starts = jnp.asarray(np.cumsum(counts, 0) - counts)[me].astype(np.int32)
        return lax.ragged_all_to_all(
            rows,
            jnp.zeros_like(rows),
            jnp.cumsum(sizes) - sizes,
            sizes,
            starts,
            jnp.asarray(counts)[:, me],
            axis_name=AXIS,
        )

    return step


def _by_hand(case: Case) -> _Step:
    """Dispatch and combine with lax.all_to_all: rows once per rank into [N, T, D].

    Exchange, repeat rows per expert, sum them per row, exchange back, sum.
    """

    def step(x: Any, ids: Any, weights: Any) -> Any:
        ranks = lax.axis_size(AXIS)
        local = case.experts // ranks
        tokens, k = ids.shape
        here = ids // local == jnp.arange(ranks)[:, None, None]  # [N, T, K]
        sent = here.any(-1)
        rows = lax.all_to_all(jnp.where(sent[..., None], x, 0), AXIS, 0, 0)
        routes = lax.all_to_all(jnp.where(here, ids % local, -1), AXIS, 0, 0)
        gates = lax.all_to_all(jnp.where(here, weights, 0), AXIS, 0, 0)
        flat = routes.reshape(-1)
        slots = ranks * tokens * min(k, local)
        order = jnp.argsort(jnp.where(flat < 0, local, flat), stable=True)[:slots]
        grouped = rows.reshape(-1, case.hidden)[order // k]
        # (Experts would compute here.) By gathering, which XLA fuses into the sum.
        place = jnp.zeros(flat.size, jnp.int32).at[order].set(jnp.arange(slots))
        place, gates = place.reshape(-1, k), gates.reshape(-1, k)
        partial = sum(
            gates[:, q, None] * grouped[place[:, q]].astype(jnp.float32)
            for q in range(k)
        )
        partial = jnp.asarray(partial, x.dtype).reshape(ranks, tokens, case.hidden)
        back = lax.all_to_all(partial, AXIS, 0, 0)
        return back.astype(jnp.float32).sum(0).astype(x.dtype)

    return step


_ROUTED = ("token", "x", "ids", "weights")
_E4M3: dict[str, Any] = {"wire_dtype": jnp.float8_e4m3fn}

SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("dispatch", "ours", "dispatch", "bf16", _ROUTED, _dispatch()),
        Subject(
            *("dispatch, zero_tail=True", "ours", "dispatch", "bf16", _ROUTED),
            _dispatch(zero_tail=True),
        ),
        Subject(
            *("dispatch, expand=False", "ours", "dispatch", "bf16", _ROUTED),
            _dispatch(expand=False),
        ),
        Subject(
            *("dispatch, e4m3", "ours", "dispatch", "e4m3", _ROUTED),
            _dispatch(**_E4M3),
        ),
        Subject(
            *("dispatch, e4m3, expand=False, dequantize=False", "ours", "dispatch"),
            *("e4m3", _ROUTED),
            _dispatch(expand=False, dequantize=False, **_E4M3),
        ),
        Subject(
            "combine", "ours", "combine", "bf16", ("token", "rows", "plan"), _combine
        ),
        Subject("pair", "ours", "pair", "bf16", _ROUTED[1:], _pair()),
        Subject("pair, e4m3", "ours", "pair", "e4m3", _ROUTED[1:], _pair(**_E4M3)),
        Subject(
            *("lax.all_to_all by hand", "peer", "pair", "bf16", _ROUTED[1:]),
            _by_hand,
        ),
        Subject(
            "lax.all_to_all", "peer", "exchange", "bf16", ("exchanged",), _all_to_all
        ),
        Subject(
            *("lax.ragged_all_to_all", "peer", "exchange", "bf16", ("exchanged",)),
            _ragged,
            RAGGED_OPTIONS,
        ),
    )
}


def chain(subject: Subject, case: Case, mesh: Any, length: int) -> Callable[..., Any]:
    """``length`` calls, jitted, the carry donated."""
    step = subject.step(case)

    def program(carry: Any, *rest: Any) -> Any:
        for _ in range(length):
            carry = step(carry, *rest)
        return carry

    # check_vma: nothing of ours needs it, and ragged_all_to_all does not know it.
    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
    )
    options = subject.options if mesh.devices.flat[0].platform != "cpu" else {}
    return jax.jit(mapped, donate_argnums=0, compiler_options=options)


def _random_rows(seed: int, hidden: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(-127, 128, (count, hidden), np.int8).astype(jnp.bfloat16)


def operands(case: Case, mesh: Any) -> dict[str, Any]:
    """What steps take, made from the same numbers in every process.

    x bfloat16[N*T, D], ids int32[N*T, K], weights float32[N*T, K] that sum to one,
    token float32[N], exchanged bfloat16[N*N*T, D].
    """
    sharding = jax.sharding.NamedSharding(mesh, P(AXIS))
    total = case.ranks * case.tokens

    def place(shape: tuple[int, ...], make: Callable[[int, int], np.ndarray]) -> Any:
        def part(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(shape[0])
            return make(begin, end)

        return jax.make_array_from_callback(shape, sharding, part)

    def rows(begin: int, end: int) -> np.ndarray:
        return _random_rows(begin, case.hidden, end - begin)

    ids = case.ids()
    weights = np.random.default_rng(0).random(ids.shape, np.float32)
    weights /= weights.sum(1, keepdims=True)
    return {
        "x": place((total, case.hidden), rows),
        "ids": place(ids.shape, lambda begin, end: ids[begin:end]),
        "weights": place(ids.shape, lambda begin, end: weights[begin:end]),
        "token": place((case.ranks,), lambda begin, end: np.zeros(end - begin, "f4")),
        "exchanged": place((case.ranks * total, case.hidden), rows),
    }


def routed(case: Case, mesh: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What combine takes: the rows and the plan of a dispatch."""

    def program(x: Any, ids: Any, weights: Any) -> Any:
        d = _dispatched(case, x, ids, weights)
        return d.tokens, d.plan

    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
    )
    rows, plan = jax.block_until_ready(
        jax.jit(mapped)(given["x"], given["ids"], given["weights"])
    )
    return {"rows": rows, "plan": plan}


def largest_error(got: Any, want: Any) -> float:
    """Of this process's part, relative to the largest magnitude."""
    errors = [
        np.abs(np.asarray(a.data, np.float32) - np.asarray(b.data, np.float32)).max()
        / np.abs(np.asarray(b.data, np.float32)).max()
        for a, b in zip(got.addressable_shards, want.addressable_shards, strict=True)
    ]
    return float(max(errors))


def exchanged_rows(case: Case, mesh: Any) -> Any:
    """What lax.ragged_all_to_all makes of `exchanged`, from everyone's rows."""
    counts = case.load().counts
    begins = np.cumsum(counts, 1) - counts
    each = case.ranks * case.tokens

    def part(index: Any) -> np.ndarray:
        rank = (index[0].start or 0) // each
        rows = np.zeros((each, case.hidden), jnp.bfloat16)
        at = 0
        for source in range(case.ranks):
            begin, count = begins[source, rank], counts[source, rank]
            sent = _random_rows(source * each, case.hidden, each)
            rows[at : at + count] = sent[begin : begin + count]
            at += count
        return rows

    sharding = jax.sharding.NamedSharding(mesh, P(AXIS))
    shape = (case.ranks * each, case.hidden)
    return jax.make_array_from_callback(shape, sharding, part)
