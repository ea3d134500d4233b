"""Windows as operands of put, scatter and wait: checks that they share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxfabric._primitives import _call
from jaxfabric._window import USER_IDS_MAX, Window


def check_window(op: str, win: Any, call: _call.Call) -> None:
    """Raises unless ``win`` is a window of the call's Fabric."""
    if not isinstance(win, Window):
        raise TypeError(
            f"{op}: win must be made by fabric.window(shape, dtype), got "
            f"{type(win).__name__}"
        )
    if win.fabric_key != call.fabric_key:
        raise ValueError(
            f"{op}: the window is of another Fabric than the one in force; pass "
            "fabric= or make the window with this Fabric"
        )


def check_id(op: str, id: int) -> int:
    """The id as an int; raises ValueError out of range."""
    if not 0 <= int(id) < USER_IDS_MAX:
        raise ValueError(f"{op}: id={id} must be in 0..{USER_IDS_MAX - 1}")
    return int(id)


def check_operand(op: str, win: Window, x: jax.Array, elements: int) -> None:
    """Raises unless ``elements`` of ``x``'s dtype fit the window."""
    if x.dtype != win.dtype:
        raise TypeError(
            f"{op}: x is {x.dtype.name} but the window holds {win.dtype.name}; cast "
            f"one, as in x.astype(jnp.{win.dtype.name})"
        )
    if elements > win.size:
        raise ValueError(
            f"{op}: {elements} elements do not fit a window of {win.size} (shape "
            f"{win.shape}); make a larger one with fabric.window"
        )


def scalar(op: str, what: str, value: Any) -> jax.Array:
    """An int32 scalar; raises TypeError for anything else."""
    array = jnp.asarray(value)
    if array.shape != () or not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{op}: {what} must be an integer scalar, got "
            f"{array.dtype.name}{list(array.shape)}"
        )
    return array.astype(jnp.int32)
