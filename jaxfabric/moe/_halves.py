"""Dispatch and combine in two halves, so that a program computes in between.

``start`` posts, ``done`` waits. On CPU any number may be in flight; on GPUs two,
dispatches and combines together: a third ``start`` waits for the first one's ``done``,
and times out if the program has that later. They may finish in any order. The pure JAX
implementations do everything in ``start``.

Gradients equal those of the whole form. The operands ride along in the pending value
and ``done`` owns the whole rule, so a backward pass is not split into halves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxfabric.moe import _api, _vjp
from jaxfabric.moe._plan import Config, Dispatched, Plan, RouteOut

_Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DispatchPending:
    """A dispatch in flight; to be given to dispatch_done, once."""

    posted: Any
    x: _Array
    ids: _Array
    weights: _Array
    token: _Array
    config: Config


@dataclasses.dataclass(frozen=True)
class CombinePending:
    """A combine in flight; to be given to combine_done, once."""

    posted: Any
    rows: _Array
    weights: _Array | None
    routes: _vjp.Routes
    token: _Array
    config: Config
    accum_dtype: Any
    name: str
    returns_token: bool


jax.tree_util.register_dataclass(
    DispatchPending, ["posted", "x", "ids", "weights", "token"], ["config"]
)
jax.tree_util.register_dataclass(
    CombinePending,
    ["posted", "rows", "weights", "routes", "token"],
    ["config", "accum_dtype", "name", "returns_token"],
)


class _WholeCalls:
    """Halves of an implementation that has none."""

    def __init__(self, module: ModuleType) -> None:
        self.route_start = module.route
        self.reduce_start = module.reduce

    @staticmethod
    def route_done(c: Config, posted: RouteOut) -> RouteOut:
        del c
        return posted

    @staticmethod
    def reduce_done(c: Config, posted: Any) -> Any:
        del c
        return posted


def _kernels(c: Config) -> Any:
    module = _vjp.kernels(c)
    return module if hasattr(module, "route_start") else _WholeCalls(module)


def dispatch_start(
    x: _Array,
    ids: _Array,
    weights: _Array,
    *,
    axis_name: _api.AxisName,
    num_experts: int,
    capacity: int | None = None,
    expert_alignment: int = 1,
    expand: bool = True,
    zero_tail: bool = True,
    wire_dtype: Any = None,
    dequantize: bool = True,
    implementation: str | None = None,
    active: _Array | None = None,
    token: _Array | None = None,
    key: Hashable = None,
    timeout_s: float | None = None,
    fabric: Any = None,
    name: str = "jaxfabric_dispatch",
) -> DispatchPending:
    """First half of `dispatch`: same arguments, shapes, dtypes and errors.

    ``x`` [T, D], ``ids`` int32[T, K] and ``weights`` float32[T, K] are on their way
    when it returns. ``timeout_s`` (seconds) counts from here.

    Example::

      pending = jf.moe.dispatch_start(x, ids, w, axis_name="expert", num_experts=8)
      shared = mlp(x)                       # overlaps with the transfer
      d = jf.moe.dispatch_done(pending)
    """
    call = _api.prepare_dispatch(
        "jf.moe.dispatch_start",
        *(x, ids, weights),
        axis_name=axis_name,
        num_experts=num_experts,
        capacity=capacity,
        expert_alignment=expert_alignment,
        expand=expand,
        zero_tail=zero_tail,
        wire_dtype=wire_dtype,
        dequantize=dequantize,
        implementation=implementation,
        active=active,
        token=token,
        key=key,
        timeout_s=timeout_s,
        fabric=fabric,
        name=name,
    )
    c = call.config
    operands = lax.stop_gradient((call.x, call.ids, call.weights, call.token))
    posted = _kernels(c).route_start(c, *operands)
    return DispatchPending(posted, call.x, call.ids, call.weights, call.token, c)


def dispatch_done(pending: DispatchPending) -> Dispatched:
    """Second half of `dispatch`: waits, and returns what dispatch returns.

    Raises:
      TypeError: ``pending`` is not from dispatch_start.

    Example::

      d = jf.moe.dispatch_done(pending)     # d.tokens [R, D], d.group_sizes int32[L]
    """
    if not isinstance(pending, DispatchPending):
        raise TypeError(
            "jf.moe.dispatch_done: pending must come from dispatch_start, got "
            f"{type(pending).__name__}"
        )
    p = pending
    out = _named_route_done(p.config, p.posted, p.x, p.ids, p.weights, p.token)
    return _api.dispatched(p.config, p.ids, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route_done(
    c: Config, posted: Any, x: _Array, ids: _Array, weights: _Array, token: _Array
) -> RouteOut:
    del x, ids, weights, token  # only their cotangents matter
    return _kernels(c).route_done(c, posted)


def _route_done_fwd(
    c: Config, posted: Any, x: _Array, ids: _Array, weights: _Array, token: _Array
) -> tuple[RouteOut, _vjp.Routes]:
    out = _route_done(c, posted, x, ids, weights, token)
    return out, _vjp.Routes(ids, out.recv_count, out.slot_row)


def _route_done_bwd(c: Config, routes: _vjp.Routes, ct: RouteOut) -> tuple[Any, ...]:
    return (None, *_vjp.route_bwd(c, routes, ct))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _named_route_done(
    c: Config, posted: Any, x: _Array, ids: _Array, weights: _Array, token: _Array
) -> RouteOut:
    return _vjp.named(c, _route_done(c, posted, x, ids, weights, token))


def _named_route_done_fwd(
    c: Config, posted: Any, x: _Array, ids: _Array, weights: _Array, token: _Array
) -> tuple[RouteOut, _vjp.Routes]:
    # Named here for the reason given in _vjp.
    out = _vjp.named(c, _route_done(c, posted, x, ids, weights, token))
    return out, _vjp.Routes(ids, out.recv_count, out.slot_row)


_route_done.defvjp(_route_done_fwd, _route_done_bwd)
_named_route_done.defvjp(_named_route_done_fwd, _route_done_bwd)


def combine_start(
    rows: _Array,
    plan: Plan,
    *,
    expand: bool = True,
    weighted: bool = True,
    accum_dtype: Any = jnp.float32,
    token: _Array | None = None,
    key: Hashable = None,
    timeout_s: float | None = None,
    name: str = "jaxfabric_combine",
) -> CombinePending:
    """First half of `combine`: same arguments, shapes, dtypes and errors.

    ``rows`` [R, D] are on their way when it returns. ``timeout_s`` (seconds) counts
    from here.

    Example::

      pending = jf.moe.combine_start(rows, d.plan)
      shared = mlp(x)                       # overlaps with the transfer
      y = jf.moe.combine_done(pending) + shared
    """
    op = "jf.moe.combine_start"
    call = _api.prepare_combine(
        op, rows, plan, expand, weighted, accum_dtype, token, key, timeout_s
    )
    c = call.config
    operands = (call.rows, call.weights, None, *call.routes, call.token)
    posted = _kernels(c).reduce_start(
        c, *lax.stop_gradient(operands), accum_dtype=call.accum_dtype
    )
    return CombinePending(
        posted=posted,
        rows=call.rows,
        weights=call.weights,
        routes=call.routes,
        token=call.token,
        config=c,
        accum_dtype=call.accum_dtype,
        name=name,
        returns_token=token is not None,
    )


def combine_done(pending: CombinePending) -> _Array | tuple[_Array, _Array]:
    """Second half of `combine`: waits, and returns what combine returns.

    Raises:
      TypeError: ``pending`` is not from combine_start.

    Example::

      y = jf.moe.combine_done(pending)      # [T, D]
    """
    op = "jf.moe.combine_done"
    if not isinstance(pending, CombinePending):
        raise TypeError(
            f"{op}: pending must come from combine_start, got {type(pending).__name__}"
        )
    p = pending
    y, token = _reduce_done(
        p.config, p.accum_dtype, p.posted, p.rows, p.weights, p.routes, p.token
    )
    y = _api.named_output(op, y, p.name)
    return (y, token) if p.returns_token else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reduce_done(
    c: Config,
    accum_dtype: Any,
    posted: Any,
    rows: _Array,
    weights: _Array | None,
    routes: _vjp.Routes,
    token: _Array,
) -> tuple[_Array, _Array]:
    del accum_dtype, rows, weights, routes, token  # only their cotangents matter
    y, _, token = _kernels(c).reduce_done(c, posted)
    return y, token


def _reduce_done_fwd(
    c: Config,
    accum_dtype: Any,
    posted: Any,
    rows: _Array,
    weights: _Array | None,
    routes: _vjp.Routes,
    token: _Array,
) -> tuple[tuple[_Array, _Array], _vjp.Reducible]:
    out = _reduce_done(c, accum_dtype, posted, rows, weights, routes, token)
    return out, _vjp.reduce_residuals(rows, weights, routes)


def _reduce_done_bwd(
    c: Config, accum_dtype: Any, saved: _vjp.Reducible, ct: tuple[_Array, _Array]
) -> tuple[Any, ...]:
    drows, dweights, _, _, token = _vjp.reduce_bwd(
        c, accum_dtype, saved, (ct[0], None, ct[1])
    )
    return None, drows, dweights, None, token


_reduce_done.defvjp(_reduce_done_fwd, _reduce_done_bwd)
