"""barrier: no rank passes before all have come."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import jax

from jaxfabric import _axes
from jaxfabric._primitives import _call


def barrier(
    axis_name: _axes.AxisName,
    *,
    token: jax.Array | None = None,
    timeout_s: float | None = None,
    key: Hashable = None,
    fabric: Any = None,
) -> jax.Array:
    """Waits until every rank of the axis has come; returns the next token.

    Under `jax.grad`, cotangents of tokens pass a barrier of their own, so the
    backward pass meets in exactly reversed order.

    Args:
      axis_name: mesh axis, or tuple of axes, whose ranks meet.
      token: float32[1], orders this call after the one that returned it.
      timeout_s: time limit in seconds; ``None`` inherits the Fabric's.
      key: hashable; tells calls apart that one traced function makes.
      fabric: the Fabric; ``None`` is the innermost open one with the axis.

    Returns:
      float32[1], the next token. The call is kept only if the token is used.

    Raises:
      FabricError: no open Fabric has the axis. Inside a program, a rank that is lost
        or late raises `jax.errors.JaxRuntimeError` naming it.

    Example::

      tok = jf.barrier("expert", token=jf.token())
    """
    call, axis, _ = _call.make(
        "barrier", axis_name, fabric, timeout_s=timeout_s, key=key
    )
    (token,) = _axes.unify(axis, _call.checked_token("jf.barrier", token))
    return _barrier(call, token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _barrier(call: _call.Call, token: jax.Array) -> jax.Array:
    (token,) = _call.bind(barrier_p, call, token)
    return token


def _forward(call: _call.Call, token: jax.Array) -> tuple[jax.Array, None]:
    return _barrier(call, token), None


def _backward(call: _call.Call, _: None, ct: jax.Array) -> tuple[jax.Array]:
    return (_barrier(call, ct),)


_barrier.defvjp(_forward, _backward)

barrier_p = _call.define(
    "jaxfabric_barrier",
    "jaxfabric_barrier",
    lambda token, call: [token],
    lambda: {},
)
_call.refuse_vmap(barrier_p, "jf.barrier")
