"""The pure JAX implementation: the oracle, on any backend.

It gathers everything from everywhere, so it is for checking and for small sizes:
each rank holds N*T rows whatever the routing is. The three kernels take the two
exchanges of rows as parameters, because `_ragged` differs in nothing else.

Both halves of a split call are one whole call here: start does all the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxfabric.moe import _layout, _wire
from jaxfabric.moe._layout import Unique
from jaxfabric.moe._plan import Config, DispatchStats, RouteOut

_Array = jax.Array


class Exchange(NamedTuple):
    """The two ways rows travel.

    Attributes:
      send: (c, x[T, D], all_ids, unique) -> unique rows [N*T, D], zeros past the last.
      give_back: (c, partials[N*T, D], all_ids, unique) -> [N, T, D]: what each rank
        returns for each of this rank's tokens, zeros where it returns nothing.
    """

    send: Callable[[Config, _Array, _Array, Unique], _Array]
    give_back: Callable[[Config, _Array, _Array, Unique], _Array]


def _send(c: Config, x: _Array, all_ids: _Array, unique: Unique) -> _Array:
    del all_ids
    return _layout.take_rows(gather(c, x), unique.origin)


def _give_back(c: Config, partials: _Array, all_ids: _Array, unique: Unique) -> _Array:
    del all_ids
    by_token = _layout.take_rows(partials, unique.row)
    by_token = by_token.reshape(c.num_ranks, c.tokens, -1)
    return lax.all_to_all(by_token, c.axis_name, split_axis=0, concat_axis=0)


ALL_GATHER = Exchange(_send, _give_back)


def gather(c: Config, x: _Array) -> _Array:
    """All ranks' x, one after the other."""
    return lax.all_gather(x, c.axis_name, tiled=True)


def _routes(c: Config, ids: _Array) -> tuple[_Array, Unique]:
    all_ids = gather(c, ids)
    return all_ids, _layout.unique_rows(c, all_ids, lax.axis_index(c.axis_name))


def route(
    c: Config,
    x: _Array,
    ids: _Array,
    weights: _Array,
    token: _Array,
    *,
    exchange: Exchange = ALL_GATHER,
) -> RouteOut:
    """Dispatch: x[T, D], ids[T, K], weights[T, K] to this rank's expert rows."""
    all_ids, unique = _routes(c, ids)
    grouped = _layout.group_by_expert(c, all_ids, unique)
    row_index = _layout.unique_of_row(c, grouped.slot_row)

    def send(x: _Array) -> _Array:
        rows = exchange.send(c, x, all_ids, unique)
        return _layout.take_rows(rows, row_index) if c.expand else rows

    tokens, scales = _through_wire(c, x, send)
    all_weights = gather(c, weights).reshape(-1)
    stats = DispatchStats(
        sent=_layout.destinations(c, ids).sum(0, dtype=jnp.int32),
        received=unique.recv_count,
        dropped_at_sender=jnp.zeros_like(grouped.dropped),
        dropped_at_receiver=grouped.dropped,
    )
    return RouteOut(
        tokens=tokens,
        scales=scales,
        group_sizes=grouped.group_sizes,
        weights=_layout.take_rows(all_weights, grouped.assignment),
        row_index=None if c.expand else row_index,
        recv_count=unique.recv_count,
        slot_row=grouped.slot_row,
        stats=stats,
        token=token,
    )


def _through_wire(
    c: Config, x: _Array, send: Callable[[_Array], _Array]
) -> tuple[_Array, _Array | None]:
    """Rows as they arrive, and their scales if they are kept."""
    if c.wire_dtype is None:
        return send(x), None
    payload, scales = map(send, _wire.quantize(x))
    if c.dequantize:
        return _wire.dequantize(payload, scales, x.dtype), None
    return _wire.as_e4m3(payload), scales


def replay(
    c: Config,
    x: _Array,
    ids: _Array,
    recv_count: _Array,
    slot_row: _Array,
    token: _Array,
    *,
    exchange: Exchange = ALL_GATHER,
) -> tuple[_Array, _Array]:
    """Sends another x[T, D] along a plan: expert rows, or unique rows."""
    del recv_count
    all_ids, unique = _routes(c, ids)
    rows = exchange.send(c, x, all_ids, unique)
    if c.expand:
        rows = _layout.take_rows(rows, _layout.unique_of_row(c, slot_row))
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
    exchange: Exchange = ALL_GATHER,
) -> tuple[_Array, _Array | None, _Array]:
    """Combine: rows to y[T, D]; scalars[R], unreduced, to their slots [T, K]."""
    del recv_count
    all_ids, unique = _routes(c, ids)
    partials = rows
    if c.expand:
        partials = _pre_reduce(c, rows, row_weights, slot_row, accum_dtype)
    returned = exchange.give_back(c, partials, all_ids, unique)
    y = jnp.zeros_like(returned[0], dtype=accum_dtype)
    for rank in range(c.num_ranks):
        y = y + returned[rank].astype(accum_dtype)
    slots = None
    if scalars is not None:
        by_slot = _layout.take_rows(scalars, slot_row.reshape(-1))
        by_slot = by_slot.reshape(slot_row.shape)
        slots = _slots_to_tokens(c, exchange, by_slot, ids, all_ids, unique)
    return y.astype(rows.dtype), slots, token


def _pre_reduce(
    c: Config,
    rows: _Array,
    row_weights: _Array | None,
    slot_row: _Array,
    accum_dtype: Any,
) -> _Array:
    total = jnp.zeros((c.unique_rows, rows.shape[1]), accum_dtype)
    for slot in range(c.slots):
        part = _layout.take_rows(rows, slot_row[:, slot]).astype(accum_dtype)
        if row_weights is not None:
            weight = _layout.take_rows(row_weights, slot_row[:, slot])
            part = part * weight.astype(accum_dtype)[:, None]
        total = total + part
    return total.astype(rows.dtype)


def _slots_to_tokens(
    c: Config,
    exchange: Exchange,
    by_slot: _Array,
    ids: _Array,
    all_ids: _Array,
    unique: Unique,
) -> _Array:
    """[N*T, S] at the experts' ranks to [T, K] at the tokens' rank."""
    returned = exchange.give_back(c, by_slot, all_ids, unique)  # [N, T, S]
    owner = jnp.where(_layout.is_route(c, ids), ids // c.local_experts, -1)
    result = jnp.zeros(ids.shape, by_slot.dtype)
    for rank in range(c.num_ranks):
        mine = owner == rank
        slot = jnp.clip(jnp.cumsum(mine, axis=-1) - 1, 0, c.slots - 1)
        value = jnp.take_along_axis(returned[rank], slot, axis=-1)
        result = jnp.where(mine, value, result)
    return result
