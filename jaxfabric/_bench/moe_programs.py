"""The programs that `bench moe` times: chains of one call, for each subject.

Every chain maps its first operand, which is donated, to its successor: so that calls
follow each other, and XLA finds its buffers where they were.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxfabric as jf

from .moe_case import Case
from .moe_operands import AXIS, dispatched

_Step = Callable[..., Any]

_COMPILERS = min(16, os.cpu_count() or 1)
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


def _dispatch(**options: Any) -> Callable[[Case], _Step]:
    def of(case: Case) -> _Step:
        def step(token: Any, x: Any, ids: Any, weights: Any) -> Any:
            return dispatched(case, x, ids, weights, token=token, **options).token

        return step

    return of


def _combine(**options: Any) -> Callable[[Case], _Step]:
    def of(case: Case) -> _Step:
        def step(token: Any, rows: Any, plan: Any) -> Any:
            return jf.moe.combine(rows, plan, token=token, **options)[1]

        return step

    return of


def _pair(**options: Any) -> Callable[[Case], _Step]:
    def of(case: Case) -> _Step:
        def step(x: Any, ids: Any, weights: Any) -> Any:
            d = dispatched(case, x, ids, weights, **options)
            return jf.moe.combine(d.tokens, d.plan)

        return step

    return of


def _all_to_all(case: Case) -> _Step:
    del case
    return lambda rows: lax.all_to_all(rows, AXIS, 0, 0, tiled=True)


def _ragged(case: Case) -> _Step:
    del case

    def step(rows: Any, counts: Any) -> Any:
        me = lax.axis_index(AXIS)
        sizes = counts[me]
        return lax.ragged_all_to_all(
            rows,
            jnp.zeros_like(rows),
            jnp.cumsum(sizes) - sizes,
            sizes,
            (jnp.cumsum(counts, 0) - counts)[me],
            counts[:, me],
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
            *("combine", "ours", "combine", "bf16", ("token", "rows", "plan")),
            _combine(),
        ),
        Subject(
            *("combine, expand=False", "ours", "combine", "bf16"),
            ("token", "rows_once", "plan"),
            _combine(expand=False, weighted=False),
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
            *("lax.ragged_all_to_all", "peer", "exchange", "bf16"),
            ("exchanged", "counts"),
            _ragged,
            RAGGED_OPTIONS,
        ),
    )
}


# Short chains are captured in command buffers too.
_GPU_OPTIONS = {"xla_gpu_graph_min_graph_size": 1}


def chain(subject: Subject, case: Case, mesh: Any, length: int) -> Any:
    """``length`` calls, jitted, the carry donated; and a mark that is not.

    To wait for the mark is to wait for the calls, whoever has the carry then.
    """
    step = subject.step(case)

    def program(carry: Any, *rest: Any) -> tuple[Any, Any]:
        for _ in range(length):
            carry = step(carry, *rest)
        return carry, carry.reshape(-1)[:1].astype(jnp.float32) + 1

    # check_vma: nothing of ours needs it, and ragged_all_to_all does not know it.
    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
    )
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {} if on_cpu else {**_GPU_OPTIONS, **subject.options}
    return jax.jit(mapped, donate_argnums=0, compiler_options=options)


def compiled(
    subjects: Sequence[Subject],
    case: Case,
    mesh: Any,
    lengths: Sequence[int],
    given: dict[str, Any],
) -> dict[tuple[str, int], Any]:
    """Chains of each subject and length, by both; what failed is its exception."""

    def lowered(subject: Subject, length: int) -> Any:
        try:
            program = chain(subject, case, mesh, length)
            return program.lower(*(given[name] for name in subject.operands))
        except Exception as error:
            return error

    def finished(one: Any) -> Any:
        try:
            return one if isinstance(one, Exception) else one.compile()
        except Exception as error:
            return error

    keys = [(subject, length) for subject in subjects for length in lengths]
    with concurrent.futures.ThreadPoolExecutor(max_workers=_COMPILERS) as pool:
        done = pool.map(finished, [lowered(*key) for key in keys])
        return {
            (subject.name, length): program
            for (subject, length), program in zip(keys, done, strict=True)
        }
