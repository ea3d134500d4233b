"""The differentiation rules, once for all implementations.

``route`` is linear in x and in the weights, ``replay`` in x, ``reduce`` in the rows
and in the scalars. Each is the transpose of one of the others, so backward passes are
made of the same differentiable functions, and higher derivatives follow. Routes are
never exchanged again. Operands must vary over the same mesh axes (see `unify`).

The cotangent of a token goes through the backward call as its token: backward passes
run in exactly the reverse order of the forward calls.
"""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxfabric.moe import _layout, _ragged, _reference
from jaxfabric.moe._plan import Config, RouteOut

_Array = jax.Array


class Routes(NamedTuple):
    """The integer leaves of a plan."""

    ids: _Array
    recv_count: _Array
    slot_row: _Array


def kernels(c: Config) -> ModuleType:
    """The module with the three kernels."""
    if c.implementation == "fabric":
        from jaxfabric.moe import _fabric

        return _fabric
    return _ragged if c.implementation == "ragged" else _reference


def named(c: Config, tree: Any) -> Any:
    """Tags every leaf, for jax.checkpoint's save_only_these_names."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, c.name), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route(
    c: Config, x: _Array, ids: _Array, weights: _Array, token: _Array
) -> RouteOut:
    return kernels(c).route(c, x, ids, weights, token)


def _route_fwd(
    c: Config, x: _Array, ids: _Array, weights: _Array, token: _Array
) -> tuple[RouteOut, Routes]:
    out = _route(c, x, ids, weights, token)
    return out, Routes(ids, out.recv_count, out.slot_row)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def route(
    c: Config, x: _Array, ids: _Array, weights: _Array, token: _Array
) -> RouteOut:
    """Differentiable dispatch, its outputs named for jax.checkpoint."""
    return named(c, _route(c, x, ids, weights, token))


def _named_route_fwd(
    c: Config, x: _Array, ids: _Array, weights: _Array, token: _Array
) -> tuple[RouteOut, Routes]:
    # The residuals must be named values, and named where jax.checkpoint sees it: not
    # in the inner function. Else a remat that saves the names would still repeat the
    # dispatch for its residuals.
    out = named(c, _route(c, x, ids, weights, token))
    return out, Routes(ids, out.recv_count, out.slot_row)


def route_bwd(
    c: Config, routes: Routes, ct: RouteOut
) -> tuple[_Array, None, _Array, _Array]:
    """Cotangents of x, ids, weights and token: one message for rows and weights.

    They travel in the dtype of ``x``, whatever the rows travelled in.
    """
    if not c.dequantize:
        raise NotImplementedError(
            "jf.moe.dispatch(dequantize=False) has no gradient: cotangents of its "
            "float8_e4m3fn tokens would be float8_e4m3fn too. Leave dequantize=True "
            "where gradients are taken, or wrap x and weights in "
            "jax.lax.stop_gradient"
        )
    dx, dweights, token = reduce(
        c, jnp.float32, ct.tokens, None, ct.weights, routes, ct.token
    )
    assert dweights is not None
    return dx, None, dweights, token


_route.defvjp(_route_fwd, route_bwd)
route.defvjp(_named_route_fwd, route_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def replay(
    c: Config, x: _Array, routes: Routes, token: _Array
) -> tuple[_Array, _Array]:
    """Differentiable: another x[T, D] along a plan, to expert or unique rows."""
    c = dataclasses.replace(c, hidden=x.shape[1])
    return kernels(c).replay(c, x, *routes, token)


def _replay_fwd(
    c: Config, x: _Array, routes: Routes, token: _Array
) -> tuple[tuple[_Array, _Array], Routes]:
    return replay(c, x, routes, token), routes


def _replay_bwd(
    c: Config, routes: Routes, ct: tuple[_Array, _Array]
) -> tuple[_Array, None, _Array]:
    dx, _, token = reduce(c, jnp.float32, ct[0], None, None, routes, ct[1])
    return dx, None, token


replay.defvjp(_replay_fwd, _replay_bwd)

_Reduced = tuple[_Array, _Array | None, _Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def reduce(
    c: Config,
    accum_dtype: Any,
    rows: _Array,
    row_weights: _Array | None,
    scalars: _Array | None,
    routes: Routes,
    token: _Array,
) -> _Reduced:
    """Differentiable combine; scalars[R] come back to their slots [T, K]."""
    c = dataclasses.replace(c, hidden=rows.shape[1])
    return kernels(c).reduce(
        c, rows, row_weights, scalars, *routes, token, accum_dtype=accum_dtype
    )


class Reducible(NamedTuple):
    """Residuals of reduce; ``rows`` only where the weights need them."""

    rows: _Array | None
    row_weights: _Array | None
    routes: Routes


def reduce_residuals(
    rows: _Array, row_weights: _Array | None, routes: Routes
) -> Reducible:
    """What the backward pass of reduce needs."""
    return Reducible(None if row_weights is None else rows, row_weights, routes)


def _reduce_fwd(
    c: Config,
    accum_dtype: Any,
    rows: _Array,
    row_weights: _Array | None,
    scalars: _Array | None,
    routes: Routes,
    token: _Array,
) -> tuple[_Reduced, Reducible]:
    out = reduce(c, accum_dtype, rows, row_weights, scalars, routes, token)
    return out, reduce_residuals(rows, row_weights, routes)


def reduce_bwd(
    c: Config, accum_dtype: Any, saved: Reducible, ct: _Reduced
) -> tuple[_Array, _Array | None, _Array | None, None, _Array]:
    """Cotangents of rows, row_weights, scalars, routes and token."""
    del accum_dtype  # that of the forward sum; products below are in float32
    dy, dslots, token = ct
    drows, token = replay(c, dy, saved.routes, token)
    dweights = None
    if saved.row_weights is not None:
        assert saved.rows is not None
        # Grouped GEMMs may leave anything in padding and tail, NaN included.
        real = _layout.unique_of_row(c, saved.routes.slot_row) >= 0
        rows = jnp.where(real[:, None], saved.rows, 0).astype(jnp.float32)
        dyr = drows.astype(jnp.float32)
        dweights = (rows * dyr).sum(-1)
        drows = (saved.row_weights[:, None] * dyr).astype(drows.dtype)
    dscalars = None
    if dslots is not None:
        dscalars, token = _replay_scalars(c, dslots, saved.routes, token)
    return drows, dweights, dscalars, None, token


reduce.defvjp(_reduce_fwd, reduce_bwd)


def _replay_scalars(
    c: Config, values: _Array, routes: Routes, token: _Array
) -> tuple[_Array, _Array]:
    """values[T, K] to the expert rows of their slots, [R]; for second derivatives.

    The ids travel beside the values (exact in float32 up to 2^24 experts), because
    a plan does not tell the receiver which k a slot has.
    """
    k = c.k
    sent = jnp.concatenate([values, routes.ids.astype(values.dtype)], axis=1)
    unique = dataclasses.replace(c, expand=False)
    rows, token = replay(unique, sent, routes, token)
    ids = rows[:, k:].astype(jnp.int32)
    mine = ids // c.local_experts == lax.axis_index(c.axis_name)
    mine &= _layout.is_route(c, ids)
    slot = jnp.where(mine, jnp.cumsum(mine, axis=1) - 1, c.slots)
    # [N*T, S, K]
    here = slot[:, None, :] == jnp.arange(c.slots)[None, :, None]
    by_slot = jnp.where(here, rows[:, None, :k], 0).sum(-1)
    target = jnp.where(routes.slot_row < 0, c.rows, routes.slot_row)
    result = jnp.zeros(c.rows, values.dtype).at[target].set(by_slot, mode="drop")
    return result, token
