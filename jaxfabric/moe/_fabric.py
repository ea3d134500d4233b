"""Dispatch and combine over a Fabric: the kernels as primitives of the FFI handlers.

The three kernels of every implementation (`route`, `replay`, `reduce`), and the
halves of the first and the last. Types vary like the operands', which `_vjp` has made
vary alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfabric import _current
from jaxfabric._primitives import _call
from jaxfabric.moe import _wire
from jaxfabric.moe._plan import Config, DispatchStats, RouteOut

_Array = jax.Array

# Channel, sequence and start of a first half, as u32 words.
_PENDING_WORDS = 6


def route(
    c: Config, x: _Array, ids: _Array, weights: _Array, token: _Array
) -> RouteOut:
    """Sends rows with their routes; see jaxfabric.moe._plan for the contract."""
    outs = _call.bind(
        route_p, _call_of(c, "dispatch"), x, ids, weights, token, config=c
    )
    return _route_out(c, outs)


def route_start(
    c: Config, x: _Array, ids: _Array, weights: _Array, token: _Array
) -> tuple[_Array, ...]:
    """First half: everything is on its way when its results are there."""
    pending, token = _call.bind(
        route_start_p, _call_of(c, "dispatch_start"), x, ids, weights, token, config=c
    )
    return pending, x, ids, weights, token


def route_done(c: Config, posted: tuple[_Array, ...]) -> RouteOut:
    """Second half: waits for what the others sent, and unpacks it."""
    outs = _call.bind(route_done_p, _call_of(c, "dispatch_done"), *posted, config=c)
    return _route_out(c, outs)


def replay(
    c: Config,
    x: _Array,
    ids: _Array,
    recv_count: _Array,
    slot_row: _Array,
    token: _Array,
) -> tuple[_Array, _Array]:
    """The rows of another x along a known plan."""
    rows, token = _call.bind(
        replay_p, _call_of(c, "replay"), x, ids, recv_count, slot_row, token, config=c
    )
    return rows, token


def reduce(
    c: Config,
    rows: _Array,
    row_weights: _Array | None,
    scalars: _Array | None,
    ids: _Array,
    recv_count: _Array,
    slot_row: _Array,
    token: _Array,
    *,
    accum_dtype: Any,
) -> tuple[_Array, _Array | None, _Array]:
    """Brings rows back and sums them for each token."""
    operands = _reduce_operands(
        c, rows, row_weights, scalars, ids, recv_count, slot_row, token, accum_dtype
    )
    outs = _call.bind(reduce_p, _call_of(c, "combine"), *operands, config=c)
    return _reduce_out(outs, scalars is not None)


class ReducePosted(NamedTuple):
    """A combine in flight: the handler's operands, and whether scalars come."""

    operands: tuple[_Array, ...]
    scalars: _Array | None


def reduce_start(
    c: Config,
    rows: _Array,
    row_weights: _Array | None,
    scalars: _Array | None,
    ids: _Array,
    recv_count: _Array,
    slot_row: _Array,
    token: _Array,
    *,
    accum_dtype: Any,
) -> ReducePosted:
    """First half of `reduce`."""
    operands = _reduce_operands(
        c, rows, row_weights, scalars, ids, recv_count, slot_row, token, accum_dtype
    )
    pending, token = _call.bind(
        reduce_start_p, _call_of(c, "combine_start"), *operands, config=c
    )
    return ReducePosted((pending, *operands[:-1], token), scalars)


def reduce_done(
    c: Config, posted: ReducePosted
) -> tuple[_Array, _Array | None, _Array]:
    """Second half of `reduce`."""
    outs = _call.bind(
        reduce_done_p, _call_of(c, "combine_done"), *posted.operands, config=c
    )
    return _reduce_out(outs, posted.scalars is not None)


def _call_of(c: Config, op: str) -> _call.Call:
    fabric = _current.by_key(op, c.axis_name, c.fabric_key)
    axes = tuple(fabric.mesh.axis_names.index(name) for name in c.axis_name)
    return _call.Call(op, fabric.key, c.axis_name, axes, c.timeout_s or 0.0, c.key)


def _route_out(c: Config, outs: Sequence[_Array]) -> RouteOut:
    (
        tokens,
        group_sizes,
        weights,
        row_index,
        recv_count,
        slot_row,
        sent,
        dropped,
        token,
        *scales,
    ) = outs
    stats = DispatchStats(
        sent=sent,
        received=recv_count,
        dropped_at_sender=jnp.zeros_like(dropped),
        dropped_at_receiver=dropped,
    )
    return RouteOut(
        tokens=tokens,
        scales=scales[0] if scales and not c.dequantize else None,
        group_sizes=group_sizes,
        weights=weights,
        row_index=None if c.expand else row_index,
        recv_count=recv_count,
        slot_row=slot_row,
        stats=stats,
        token=token,
    )


def _reduce_operands(
    c: Config,
    rows: _Array,
    row_weights: _Array | None,
    scalars: _Array | None,
    ids: _Array,
    recv_count: _Array,
    slot_row: _Array,
    token: _Array,
    accum_dtype: Any,
) -> tuple[_Array, ...]:
    wanted = jnp.float64 if rows.dtype == jnp.float64 else jnp.float32
    if accum_dtype != wanted:
        raise ValueError(
            f"jf.moe.combine: implementation='fabric' accumulates {rows.dtype.name} "
            f"rows in {jnp.dtype(wanted).name}, not {jnp.dtype(accum_dtype).name}; "
            "drop accum_dtype="
        )
    absent = token[:0]  # float32[0], varying like the others
    return (
        rows,
        absent if row_weights is None else row_weights,
        absent if scalars is None else scalars,
        ids,
        recv_count,
        slot_row,
        token,
    )


def _reduce_out(
    outs: Sequence[_Array], with_scalars: bool
) -> tuple[_Array, _Array | None, _Array]:
    y, slot_scalars, token = outs
    return y, slot_scalars if with_scalars else None, token


# Types of results.


def _route_types(x: Any, c: Config) -> list[Any]:
    unique = c.unique_rows
    rows = c.rows if c.expand else unique
    kept = not c.dequantize

    def of(shape: Sequence[int], dtype: Any) -> Any:
        return _call.retyped(x, shape, dtype)

    types = [
        of((rows, c.hidden), _wire.DTYPE if kept else x.dtype),
        of((c.local_experts,), jnp.int32),
        of((c.rows,), jnp.float32),
        of((0 if c.expand else c.rows,), jnp.int32),
        of((c.num_ranks,), jnp.int32),
        of((unique, c.slots), jnp.int32),
        of((c.num_ranks,), jnp.int32),
        of((), jnp.int32),
        of(_call.TOKEN_SHAPE, jnp.float32),
    ]
    if c.wire_dtype is not None:
        scales = (rows, _wire.blocks(c.hidden)) if kept else (0, 0)
        types.append(of(scales, jnp.float32))
    return types


def _start_types(rows: Any) -> list[Any]:
    return [
        _call.retyped(rows, (_PENDING_WORDS,), jnp.uint32),
        _call.retyped(rows, _call.TOKEN_SHAPE, jnp.float32),
    ]


def _replay_types(x: Any, c: Config) -> list[Any]:
    shape = (c.rows if c.expand else c.unique_rows, x.shape[1])
    return [
        _call.retyped(x, shape, x.dtype),
        _call.retyped(x, _call.TOKEN_SHAPE, jnp.float32),
    ]


def _reduce_types(rows: Any, scalars: Any, c: Config) -> list[Any]:
    slots = (c.tokens, c.k) if scalars.size else (0, 0)
    return [
        _call.retyped(rows, (c.tokens, rows.shape[1]), rows.dtype),
        _call.retyped(rows, slots, jnp.float32),
        _call.retyped(rows, _call.TOKEN_SHAPE, jnp.float32),
    ]


def _attributes(config: Config) -> dict[str, Any]:
    c = config
    return {
        "num_experts": np.int64(c.num_experts),
        "capacity": np.int64(-1 if c.capacity is None else c.capacity),
        "expert_alignment": np.int64(c.expert_alignment),
        "expand": np.bool_(c.expand),
        "zero_tail": np.bool_(c.zero_tail),
        "e4m3": np.bool_(c.wire_dtype is not None),
    }


def _reduce_attributes(config: Config) -> dict[str, Any]:
    # Rows that go back travel as they are.
    return {**_attributes(config), "e4m3": np.bool_(False)}


def _replay_attributes(config: Config) -> dict[str, Any]:
    # Cotangents must be zero where nothing was sent.
    return {**_reduce_attributes(config), "zero_tail": np.bool_(True)}


route_p = _call.define(
    "jaxfabric_route",
    "jaxfabric_route",
    lambda x, ids, weights, token, call, config: _route_types(x, config),
    _attributes,
)
route_start_p = _call.define(
    "jaxfabric_route_start",
    "jaxfabric_route_start",
    lambda x, ids, weights, token, call, config: _start_types(x),
    _attributes,
)
route_done_p = _call.define(
    "jaxfabric_route_done",
    "jaxfabric_route_done",
    lambda pending, x, ids, weights, token, call, config: _route_types(x, config),
    _attributes,
)
replay_p = _call.define(
    "jaxfabric_replay",
    "jaxfabric_replay",
    lambda x, ids, recv_count, slot_row, token, call, config: _replay_types(x, config),
    _replay_attributes,
)
reduce_p = _call.define(
    "jaxfabric_reduce",
    "jaxfabric_reduce",
    lambda rows, row_weights, scalars, ids, recv_count, slot_row, token, call, config: (
        _reduce_types(rows, scalars, config)
    ),
    _reduce_attributes,
)
reduce_start_p = _call.define(
    "jaxfabric_reduce_start",
    "jaxfabric_reduce_start",
    lambda rows, row_weights, scalars, ids, recv_count, slot_row, token, call, config: (
        _start_types(rows)
    ),
    _reduce_attributes,
)
reduce_done_p = _call.define(
    "jaxfabric_reduce_done",
    "jaxfabric_reduce_done",
    lambda pending, rows, row_weights, scalars, ids, recv_count, slot_row, token, call, config: (  # noqa: E501
        _reduce_types(rows, scalars, config)
    ),
    _reduce_attributes,
)
for _primitive in (
    route_p,
    route_start_p,
    route_done_p,
    replay_p,
    reduce_p,
    reduce_start_p,
    reduce_done_p,
):
    _call.refuse_vmap(_primitive, "jf.moe.dispatch and combine")
