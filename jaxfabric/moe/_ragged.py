"""The same three kernels over `jax.lax.ragged_all_to_all`.

XLA has no such collective on CPU, so these run on accelerators only. Routes are still
gathered (they are small); rows travel once per destination rank.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxfabric.moe import _layout, _reference
from jaxfabric.moe._layout import Unique
from jaxfabric.moe._plan import Config

_Array = jax.Array


def check_platform(platform: str) -> None:
    """Raises NotImplementedError where XLA has no ragged all-to-all."""
    if platform == "cpu":
        raise NotImplementedError(
            "jf.moe: implementation='ragged' needs jax.lax.ragged_all_to_all, which "
            "XLA does not have on platform 'cpu'; use implementation='reference', or "
            "open a jf.Fabric and use implementation='fabric'"
        )


def _exclusive_cumsum(x: _Array, axis: int = 0) -> _Array:
    return jnp.cumsum(x, axis=axis, dtype=x.dtype) - x


def _counts(c: Config, all_ids: _Array) -> _Array:
    """int32[N, N]: unique rows from each source (row) to each rank (column)."""
    goes = _layout.destinations(c, all_ids)
    return goes.reshape(c.num_ranks, c.tokens, -1).sum(1, dtype=jnp.int32)


def _own_rows(c: Config, all_ids: _Array) -> _Array:
    """int32[N, T]: where a token stands in the send buffer, N*T if not sent."""
    me = lax.axis_index(c.axis_name)
    ids = lax.dynamic_slice_in_dim(all_ids, me * c.tokens, c.tokens)
    goes = _layout.destinations(c, ids).T.reshape(-1)
    place = jnp.where(goes, jnp.cumsum(goes) - 1, c.unique_rows)
    return place.astype(jnp.int32).reshape(c.num_ranks, c.tokens)


def _exchange(c: Config, operand: _Array, counts: _Array, output_rows: int) -> _Array:
    """Sends counts[me, d] packed rows to each rank d, packed by source there."""
    me = lax.axis_index(c.axis_name)
    sizes = counts[me]
    starts = _exclusive_cumsum(counts)[me]
    output = jnp.zeros((output_rows, *operand.shape[1:]), operand.dtype)
    if varying := tuple(jax.typeof(operand).manual_axis_type.varying):
        output = lax.pcast(output, varying, to="varying")
    return lax.ragged_all_to_all(
        operand,
        output,
        _exclusive_cumsum(sizes),
        sizes,
        starts,
        counts[:, me],
        axis_name=c.axis_name,
    )


def _send(c: Config, x: _Array, all_ids: _Array, unique: Unique) -> _Array:
    del unique
    place = _own_rows(c, all_ids).reshape(-1)
    token = jnp.tile(jnp.arange(c.tokens, dtype=jnp.int32), c.num_ranks)
    order = jnp.full(c.unique_rows, -1, jnp.int32).at[place].set(token, mode="drop")
    packed = _layout.take_rows(x, order)
    return _exchange(c, packed, _counts(c, all_ids), c.unique_rows)


def _give_back(c: Config, partials: _Array, all_ids: _Array, unique: Unique) -> _Array:
    del unique
    counts = _counts(c, all_ids).T
    packed = _exchange(c, partials, counts, c.unique_rows)
    place = _own_rows(c, all_ids).reshape(-1)
    rows = _layout.take_rows(packed, place)
    return rows.reshape(c.num_ranks, c.tokens, -1)


_RAGGED = _reference.Exchange(_send, _give_back)

route = functools.partial(_reference.route, exchange=_RAGGED)
replay = functools.partial(_reference.replay, exchange=_RAGGED)
reduce = functools.partial(_reference.reduce, exchange=_RAGGED)
