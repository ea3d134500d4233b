"""What all of our calls have in common: parameters, lowering, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxfabric import _axes, _cuda, _current, _ffi, _sites
from jaxfabric._time_limit import checked_limit

TOKEN_SHAPE = (1,)


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call, as a parameter of its primitive.

    ``op`` is the user's name for it. ``axis`` are names, ``axes`` the same as positions
    in the Fabric's mesh.
    ``timeout_s`` is 0 to inherit the Fabric's. ``key`` is the user's.
    """

    op: str
    fabric_key: int
    axis: tuple[str, ...]
    axes: tuple[int, ...]
    timeout_s: float
    key: Hashable


def make(
    op: str,
    axis_name: _axes.AxisName,
    fabric: Any,
    *,
    timeout_s: float | None = None,
    key: Hashable = None,
) -> tuple[Call, tuple[str, ...], int]:
    """Checks where a call stands; returns it, its axis names and their size."""
    axis = _axes.axis_tuple(op, axis_name)
    size = _axes.axis_size(op, axis)
    found = _current.require(op, axis, fabric)
    axes = tuple(found.mesh.axis_names.index(name) for name in axis)
    return (
        Call(
            op,
            found.key,
            axis,
            axes,
            checked_timeout(op, timeout_s),
            _hashable(op, key),
        ),
        axis,
        size,
    )


def checked_timeout(op: str, timeout_s: float | None) -> float:
    """``timeout_s`` in seconds, 0 for ``None``; raises ValueError."""
    if timeout_s is None:
        return 0.0
    return checked_limit(op, timeout_s)


def _hashable(op: str, key: Hashable) -> Hashable:
    try:
        hash(key)
    except TypeError:
        raise TypeError(f"{op}: key={key!r} must be hashable") from None
    return key


def checked_token(op: str, token: Any) -> jax.Array:
    """The token, or a fresh one for ``None``; raises TypeError."""
    import jax.numpy as jnp

    if token is None:
        return jnp.zeros(TOKEN_SHAPE, jnp.float32)
    token = jnp.asarray(token)
    if token.shape != TOKEN_SHAPE or token.dtype != jnp.float32:
        raise TypeError(
            f"{op}: token must be float32[1] as jf.token() makes it, got "
            f"{token.dtype.name}{list(token.shape)}"
        )
    return token


def bind(primitive: Primitive, call: Call, *operands: Any, **params: Any) -> Any:
    """Binds a primitive of ours; operands vary alike already.

    The rank's index goes along, so that a mesh which orders its devices otherwise than
    the Fabric's is an error and not a mix-up.
    """
    index = jax.lax.axis_index(call.axis).astype(np.int32)
    varying = _axes.unify(call.axis, index, *operands)
    return primitive.bind(*varying, call=call, **params)


def define(
    name: str,
    target: str,
    abstract_eval: Callable[..., Sequence[Any]],
    attributes: Callable[..., dict[str, Any]],
) -> Primitive:
    """A primitive with several results that calls an FFI target.

    On CPU, and on GPUs where `_cuda` has a target of this name.

    The first operand is the rank's index (see `bind`), and not shown to
    ``abstract_eval(*operands, call, **params)``, which gives the results' types;
    ``attributes(**params)`` the handler's own attributes.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(
        lambda index, *operands, call, **params: list(
            abstract_eval(*operands, call=call, **params)
        )
    )

    def lower(ctx: Any, *operands: Any, call: Call, **params: Any) -> Any:
        channel, label = _sites.next_site(ctx, call.op, call.key)
        rule = jax.ffi.ffi_lowering(target, has_side_effect=True)
        return rule(
            ctx,
            *operands,
            fabric=np.int64(call.fabric_key),
            channel=np.int64(channel),
            label=label,
            timeout_s=np.float64(call.timeout_s),
            axes=np.asarray(call.axes, np.int64),
            **attributes(**params),
        )

    def lower_on_cpu(ctx: Any, *operands: Any, **params: Any) -> Any:
        _ffi.register_targets()
        return lower(ctx, *operands, **params)

    def lower_on_cuda(ctx: Any, *operands: Any, **params: Any) -> Any:
        _cuda.register_targets()
        return lower(ctx, *operands, **params)

    # Not cacheable: JAX would lower equal calls once, and they would share a site.
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu", cacheable=False)
    if target in _cuda.TARGETS:
        mlir.register_lowering(
            primitive, lower_on_cuda, platform="cuda", cacheable=False
        )
    return primitive


def refuse_on_gpus(primitive: Primitive, op: str, way_out: str) -> None:
    """Lowering it for GPUs raises, with the way out."""

    def lower(*args: Any, **params: Any) -> NoReturn:
        raise NotImplementedError(f"{op} is for programs on CPU: {way_out}")

    mlir.register_lowering(primitive, lower, platform="cuda")


def refuse_derivative(primitive: Primitive, op: str) -> None:
    """Differentiating it raises, with the way out."""

    def rule(*args: Any, **params: Any) -> NoReturn:
        raise NotImplementedError(
            f"{op} has no derivative: bytes land in memory that JAX does not see. "
            "Use jf.exchange, which is differentiable, or wrap its operands in "
            "jax.lax.stop_gradient"
        )

    ad.primitive_jvps[primitive] = rule


def refuse_vmap(primitive: Primitive, op: str) -> None:
    """Batching it raises, with the way out."""

    def rule(*args: Any, **params: Any) -> NoReturn:
        raise NotImplementedError(
            f"{op} under jax.vmap would be one communication per batch element; "
            "give it the whole batch as one array, or loop with jax.lax.scan"
        )

    batching.primitive_batchers[primitive] = rule


def retyped(like: Any, shape: Sequence[int], dtype: Any) -> Any:
    """The type ``like`` (how it varies) with another shape and dtype."""
    return like.update(shape=tuple(shape), dtype=np.dtype(dtype), weak_type=False)
