"""put: one-sided write into another rank's window."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfabric import _axes
from jaxfabric._primitives import _call
from jaxfabric._primitives.window import (
    check_id,
    check_operand,
    check_window,
    known,
    scalar,
)
from jaxfabric._window import Window


def put(
    win: Window,
    x: jax.Array,
    dst: jax.Array | int,
    *,
    axis_name: _axes.AxisName,
    offset: jax.Array | int = 0,
    id: int = 0,
    token: jax.Array | None = None,
    timeout_s: float | None = None,
    key: Hashable = None,
    fabric: Any = None,
) -> jax.Array:
    """Writes ``x`` into rank ``dst``'s region of ``win``, and counts it there.

    One-sided: ``dst`` takes no part. It sees the bytes once its `wait` for ``id`` has
    counted this transfer; between two writes there is no order.

    Args:
      win: from `Fabric.window`.
      x: of the window's dtype, any shape; lands contiguously.
      dst: index on the axis, int32 scalar, may be traced; negative writes nothing.
      axis_name: mesh axis, or tuple of axes, that ``dst`` is an index on.
      offset: first element of the window (flattened) to write, int32 scalar, may be
        traced.
      id: under which ``dst`` counts the transfer, 0 to 255, static.
      token: float32[1], orders this call after the one that returned it.
      timeout_s: time limit in seconds; ``None`` inherits the Fabric's.
      key: hashable; tells calls apart that one traced function makes.
      fabric: the Fabric; ``None`` is the innermost open one with the axis.

    Returns:
      float32[1], the next token. The call is kept only if the token is used.

    Raises:
      TypeError, ValueError: ``x`` does not fit the window; ``id`` out of range.
        Traced values out of range raise `jax.errors.JaxRuntimeError` in the program.

    Example::

      right = (jax.lax.axis_index("x") + 1) % 4
      tok = jf.put(win, x, right, axis_name="x", token=tok)
      y, tok = jf.wait(win, count=1, axis_name="x", token=tok)   # the left one's x
    """
    op = "jf.put"
    call, axis, size = _call.make(
        "put", axis_name, fabric, timeout_s=timeout_s, key=key
    )
    check_window(op, win, call)
    x = jnp.asarray(x)
    check_operand(op, win, x, x.size)
    if (to := known(dst)) is not None and to >= size:
        raise ValueError(f"{op}: dst={dst}, but axis {axis} has size {size}")
    begin = known(offset)
    if begin is not None and not 0 <= begin <= win.size - x.size:
        raise ValueError(
            f"{op}: offset={offset} and {x.size} elements do not fit a window of "
            f"{win.size}"
        )
    operands = _axes.unify(
        axis,
        x,
        scalar(op, "dst", dst),
        scalar(op, "offset", offset),
        _call.checked_token(op, token),
    )
    (token,) = _call.bind(put_p, call, *operands, window=win.index, id=check_id(op, id))
    return token


put_p = _call.define(
    "jaxfabric_put",
    "jaxfabric_put",
    lambda x, dst, offset, token, call, window, id: [token],
    lambda window, id: {"window": np.int64(window), "id": np.int64(id)},
)
_call.refuse_derivative(put_p, "jf.put")
_call.refuse_vmap(put_p, "jf.put")
