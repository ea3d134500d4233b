"""jf.moe.dispatch and jf.moe.combine: checks, choice of implementation, gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxfabric import _axes
from jaxfabric._axes import AxisName
from jaxfabric.moe import _checks, _ragged, _vjp
from jaxfabric.moe._plan import Config, Dispatched, Plan, RouteOut

_Array = jax.Array


def dispatch(
    x: _Array,
    ids: _Array,
    weights: _Array,
    *,
    axis_name: AxisName,
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
) -> Dispatched:
    """Sends each token to the ranks of its experts, grouped by local expert there.

    Call it inside a fully manual ``jax.shard_map``. With T tokens and K experts per
    token on each rank, hidden size D, N ranks and L = ``num_experts`` / N experts on
    each, a rank receives at most R = N*T*min(K, L) expert rows (plus alignment).
    Differentiable in ``x`` and ``weights``.

    Args:
      x: float32, bfloat16 or float16 [T, D], this rank's tokens.
      ids: int32[T, K], their experts, 0 <= id < ``num_experts``; -1 means none. Ranks
        with fewer tokens fill up with -1.
      weights: float32[T, K], their routing weights.
      axis_name: mesh axis (or tuple of axes) over which experts are sharded.
      num_experts: experts of all ranks; divisible by the size of the axis.
      capacity: most expert rows this rank keeps, equal on all ranks; the first in
        (source rank, token, k) order stay, the others are counted in ``stats``.
        ``None`` drops nothing.
      expert_alignment: rounds each non-empty group up to a multiple of this, in rows.
      expand: repeat a row for each of its experts; with ``False`` each row comes once
        and ``row_index`` tells the row of each expert slot.
      zero_tail: zero the rows past the last group. Without, their content is
        unspecified, which saves the time to write them.
      wire_dtype: ``None`` sends rows as they are, ``jnp.float8_e4m3fn`` as e4m3 with
        a float32 scale for each 128 elements: about half the bytes of bfloat16. An
        element is off by at most 1/16 of itself, or 2^-18 of its block's largest.
      dequantize: with ``wire_dtype``: ``tokens`` in the dtype of ``x``. ``False``
        keeps float8_e4m3fn, with ``scales``, for grouped matmuls that take them; such
        a call has no gradient.
      implementation: ``"fabric"``, ``"reference"`` (pure JAX, any backend),
        ``"ragged"`` (`jax.lax.ragged_all_to_all`, not on CPU), or ``None``: fabric
        if a Fabric with this axis is open, else reference.
      active: must be ``None``.
      token: float32[1], runs this call after the one that returned it.
      key: distinguishes calls that one traced function makes through the same line.
      timeout_s: seconds until the call fails; ``None`` inherits the Fabric's.
      fabric: the Fabric to use; ``None`` is the innermost open one with this axis.
      name: checkpoint name of all outputs, for ``save_only_these_names``.

    Returns:
      Dispatched: ``tokens`` [R, D], ``group_sizes`` int32[L] for
      `jax.lax.ragged_dot`, ``weights`` float32[R], ``stats``, and the ``plan``. With
      ``dequantize=False`` also ``scales`` float32[R, ceil(D/128)].

    Raises:
      TypeError, ValueError: arguments that do not fit, named in the message.
      NotImplementedError: ``active=``, ragged on CPU, or a gradient of a call with
        ``dequantize=False``.
      FabricError: ``implementation="fabric"`` without an open Fabric for the axis.

    Example::

      # 2 ranks, 4 experts: rank 0 owns experts 0 and 1, rank 1 owns 2 and 3.
      # rank 0: x = [a], ids = [[0, 3]];  rank 1: x = [b], ids = [[0, 1]]
      d = jf.moe.dispatch(x, ids, weights, axis_name="expert", num_experts=4)
      # rank 0: d.tokens = [a, b, b, 0], d.group_sizes = [2, 1]
      # rank 1: d.tokens = [a, 0, 0, 0], d.group_sizes = [0, 1]
      y = jf.moe.combine(jax.lax.ragged_dot(d.tokens, w, d.group_sizes), d.plan)
    """
    call = prepare_dispatch(
        "jf.moe.dispatch",
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
    out = _vjp.route(call.config, call.x, call.ids, call.weights, call.token)
    return dispatched(call.config, call.ids, out)


class DispatchCall(NamedTuple):
    """Checked operands, varying over the same axes."""

    config: Config
    x: _Array
    ids: _Array
    weights: _Array
    token: _Array


def prepare_dispatch(
    op: str,
    x: _Array,
    ids: _Array,
    weights: _Array,
    *,
    axis_name: AxisName,
    num_experts: int,
    capacity: int | None,
    expert_alignment: int,
    expand: bool,
    zero_tail: bool,
    wire_dtype: Any,
    dequantize: bool,
    implementation: str | None,
    active: _Array | None,
    token: _Array | None,
    key: Hashable,
    timeout_s: float | None,
    fabric: Any,
    name: str,
) -> DispatchCall:
    """Checks the arguments and chooses the implementation."""
    if active is not None:
        raise NotImplementedError(f"{op}: active= comes with elastic membership")
    x, ids, weights = jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights)
    axis = _axes.axis_tuple(op, axis_name)
    ranks = _axes.axis_size(op, axis)
    _checks.rows(op, "x", x, "pass this rank's tokens as [T, D]")
    _checks.routes(op, x, ids, weights)
    _checks.experts(op, axis, num_experts, ranks, ids.shape[1])
    if capacity is not None:
        _checks.positive(op, "capacity", capacity, "capacity=None drops nothing")
    _checks.positive(
        op, "expert_alignment", expert_alignment, "expert_alignment=1 is no padding"
    )
    _checks.call(op, name, key, timeout_s)
    implementation, fabric_key = _choose(op, implementation, axis, fabric)
    config = Config(
        axis_name=axis,
        num_ranks=ranks,
        num_experts=int(num_experts),
        tokens=x.shape[0],
        hidden=x.shape[1],
        k=ids.shape[1],
        capacity=None if capacity is None else int(capacity),
        expert_alignment=int(expert_alignment),
        expand=bool(expand),
        zero_tail=bool(zero_tail),
        wire_dtype=_checks.wire(op, wire_dtype, dequantize),
        dequantize=bool(dequantize),
        implementation=implementation,
        name=name,
        key=key,
        timeout_s=None if timeout_s is None else float(timeout_s),
        fabric_key=fabric_key,
    )
    operands = _axes.unify(axis, x, ids, weights, _checks.token(op, token))
    return DispatchCall(config, *operands)


def find_fabric(axis: tuple[str, ...], fabric: Any) -> Any:
    try:
        from jaxfabric._current import find
    except ImportError:  # without the native module only pure JAX is left
        return None
    return find(axis, fabric)


def _choose(
    op: str, implementation: str | None, axis: tuple[str, ...], fabric: Any
) -> tuple[str, int | None]:
    """The implementation and, for "fabric", the key of the Fabric."""
    _checks.choice(op, implementation)
    if implementation in ("reference", "ragged"):
        if fabric is not None:
            raise ValueError(
                f"{op}: fabric= was given, but implementation={implementation!r} uses "
                "none; drop one of the two"
            )
        if implementation == "ragged":
            _ragged.check_platform(jax.default_backend())
        return implementation, None
    found = find_fabric(axis, fabric)
    if found is not None:
        return "fabric", found.key
    if implementation is None:
        return "reference", None
    from jaxfabric._errors import FabricError

    shown = axis[0] if len(axis) == 1 else axis
    raise FabricError(
        f"{op}: implementation='fabric', but no open Fabric has axis {shown!r}; open "
        "one with jf.Fabric(mesh) around the call, or use implementation='reference'"
    )


def dispatched(config: Config, ids: _Array, out: RouteOut) -> Dispatched:
    """Puts what a kernel returned into the form that users see."""
    plan = Plan(ids, out.recv_count, out.slot_row, out.weights, config)
    return Dispatched(
        tokens=out.tokens,
        group_sizes=out.group_sizes,
        weights=out.weights,
        row_index=out.row_index,
        scales=out.scales,
        stats=out.stats,
        plan=plan,
        token=out.token,
    )


@overload
def combine(
    rows: _Array,
    plan: Plan,
    *,
    expand: bool = True,
    weighted: bool = True,
    accum_dtype: Any = jnp.float32,
    token: None = None,
    key: Hashable = None,
    timeout_s: float | None = None,
    name: str = "jaxfabric_combine",
) -> _Array: ...


@overload
def combine(
    rows: _Array,
    plan: Plan,
    *,
    expand: bool = True,
    weighted: bool = True,
    accum_dtype: Any = jnp.float32,
    token: _Array,
    key: Hashable = None,
    timeout_s: float | None = None,
    name: str = "jaxfabric_combine",
) -> tuple[_Array, _Array]: ...


def combine(
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
) -> _Array | tuple[_Array, _Array]:
    """Brings expert rows back and sums them for each token: dispatch's counterpart.

    Rows are summed first at the expert's rank, then at the token's rank, each time in
    a fixed order in ``accum_dtype``; one row per token and rank travels, in the dtype
    of ``rows``. Implementation, axis and Fabric are those of the plan.
    Differentiable in ``rows`` and ``plan.weights``.

    Args:
      rows: float32, bfloat16 or float16 [R, D], one for each expert row of the plan.
        Padding and tail are never read. D may differ from dispatch's.
      plan: from dispatch, under the same mesh; may be used any number of times.
      expand: ``False`` if the program has weighted and summed the rows of each rank's
        experts, [N*T, D] as dispatch with ``expand=False`` has them; needs
        ``weighted=False``.
      weighted: multiply each row with its routing weight; ``False`` sums as is.
      accum_dtype: dtype of products and sums.
      token: float32[1]; if given, the next token is returned too.
      key: as in dispatch; ``None`` takes the plan's.
      timeout_s: seconds; ``None`` takes the plan's.
      name: checkpoint name of the output.

    Returns:
      y of the dtype of ``rows``, [T, D], in the order of dispatch's ``x``; zeros for
      tokens whose rows were all skipped or dropped. With ``token``: (y, token).

    Raises:
      TypeError, ValueError: arguments that do not fit, named in the message.

    Example::

      y = jf.moe.combine(d.tokens, d.plan)   # sum of weights[t] times x[t]
    """
    op = "jf.moe.combine"
    call = prepare_combine(
        op, rows, plan, expand, weighted, accum_dtype, token, key, timeout_s
    )
    y, _, out_token = _vjp.reduce(
        call.config,
        call.accum_dtype,
        call.rows,
        call.weights,
        None,
        call.routes,
        call.token,
    )
    y = named_output(op, y, name)
    return y if token is None else (y, out_token)


def named_output(op: str, y: _Array, name: str) -> _Array:
    """Tags combine's output for jax.checkpoint."""
    _checks.call(op, name, None, None)
    return checkpoint_name(y, name)


class CombineCall(NamedTuple):
    """Checked operands, varying over the same axes."""

    config: Config
    accum_dtype: Any
    rows: _Array
    weights: _Array | None
    routes: _vjp.Routes
    token: _Array


def prepare_combine(
    op: str,
    rows: _Array,
    plan: Plan,
    expand: bool,
    weighted: bool,
    accum_dtype: Any,
    token: _Array | None,
    key: Hashable,
    timeout_s: float | None,
) -> CombineCall:
    """Checks the arguments against the plan."""
    if not isinstance(plan, Plan):
        raise TypeError(
            f"{op}: plan must be the .plan of what dispatch returned, got "
            f"{type(plan).__name__}"
        )
    c = plan.config
    rows = jnp.asarray(rows)
    ranks = _axes.axis_size(op, c.axis_name)
    shown = c.axis_name[0] if len(c.axis_name) == 1 else c.axis_name
    if ranks != c.num_ranks:
        raise ValueError(
            f"{op}: the plan is for {c.num_ranks} ranks but axis {shown!r} has {ranks} "
            "here; combine under the mesh of the dispatch"
        )
    _checks.rows(op, "rows", rows, "pass one row for each expert row, [R, D]")
    _checks.combined_rows(op, rows.shape[0], c, expand, weighted)
    _checks.call(op, "-", key, timeout_s)
    config = dataclasses.replace(
        c,
        expand=bool(expand),
        key=c.key if key is None else key,
        timeout_s=c.timeout_s if timeout_s is None else float(timeout_s),
    )
    accum = _checks.accumulator(op, accum_dtype)
    routes = _vjp.Routes(plan.ids, plan.recv_count, plan.slot_row)
    row_weights = plan.weights if weighted else None
    operands = _axes.unify(
        c.axis_name, rows, row_weights, routes, _checks.token(op, token)
    )
    return CombineCall(config, accum, *operands)
