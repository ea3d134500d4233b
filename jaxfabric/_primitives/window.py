"""Windows as operands of put, scatter and wait: checks that they share."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    """The id as an int; raises TypeError or ValueError."""
    number = operator.index(id)
    if not 0 <= number < USER_IDS_MAX:
        raise ValueError(f"{op}: id={id} must be in 0..{USER_IDS_MAX - 1}")
    return number


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


def indices(op: str, what: str, value: Any) -> jax.Array:
    """As an array; integers that are known here as int32.

    `jnp.asarray` alone would wrap them in silence.

    Raises:
      ValueError: a number that is known here is beyond int32.
    """
    if not isinstance(value, jax.Array):
        known = np.asarray(value)
        if known.dtype.kind in "iu" and known.size:
            limits = np.iinfo(np.int32)
            for number in (int(known.min()), int(known.max())):
                if not limits.min <= number <= limits.max:
                    raise ValueError(f"{op}: {what} holds {number}, beyond int32")
            return jnp.asarray(known, jnp.int32)
    return jnp.asarray(value)


def scalar(op: str, what: str, value: Any) -> jax.Array:
    """An int32 scalar; raises TypeError for anything else, and as `indices`."""
    array = indices(op, what, value)
    if array.shape != () or not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{op}: {what} must be an integer scalar, got "
            f"{array.dtype.name}{list(array.shape)}"
        )
    if array.dtype.itemsize > 4:
        raise TypeError(
            f"{op}: {what} is {array.dtype.name}, of which some would wrap; make it "
            "int32, as in x.astype(jnp.int32)"
        )
    return array.astype(jnp.int32)


def known(value: Any) -> int | None:
    """The number, where it is one that does not depend on the program."""
    return int(value) if isinstance(value, (int, np.integer)) else None
