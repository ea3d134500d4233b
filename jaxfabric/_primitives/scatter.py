"""scatter: one slice to each rank of the axis."""

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
    indices,
)
from jaxfabric._window import Window


def scatter(
    win: Window,
    x: jax.Array,
    dst_offsets: jax.Array,
    *,
    axis_name: _axes.AxisName,
    id: int = 0,
    token: jax.Array | None = None,
    timeout_s: float | None = None,
    key: Hashable = None,
    fabric: Any = None,
) -> jax.Array:
    """Writes slice ``x[i]`` into rank i's region of ``win``, for each rank i.

    The same as N calls of `put`, in one: each rank counts one transfer under ``id``.

    Args:
      win: from `Fabric.window`.
      x: [N, ...] of the window's dtype, N the size of the axis.
      dst_offsets: int32[N], first element of the window (flattened) that slice i is
        written to; negative writes nothing to rank i. May be traced.
      axis_name: mesh axis, or tuple of axes.
      id: under which the ranks count the transfer, 0 to 255, static.
      token: float32[1], orders this call after the one that returned it.
      timeout_s: time limit in seconds; ``None`` inherits the Fabric's.
      key: hashable; tells calls apart that one traced function makes.
      fabric: the Fabric; ``None`` is the innermost open one with the axis.

    Returns:
      float32[1], the next token. The call is kept only if the token is used.

    Raises:
      TypeError, ValueError: as for `put`.

    Example::

      me = jax.lax.axis_index("x")               # 4 ranks, win of shape (4, 8)
      tok = jf.scatter(win, x, jnp.full(4, me * 8), axis_name="x", token=tok)
      y, tok = jf.wait(win, count=4, axis_name="x", token=tok)   # an all-to-all
    """
    op = "jf.scatter"
    call, axis, size = _call.make(
        "scatter", axis_name, fabric, timeout_s=timeout_s, key=key
    )
    check_window(op, win, call)
    x = jnp.asarray(x)
    dst_offsets = indices(op, "dst_offsets", dst_offsets)
    if x.ndim < 1 or x.shape[0] != size:
        raise ValueError(
            f"{op}: x has shape {x.shape}, but axis {axis} has size {size}; give one "
            f"slice to each rank, [{size}, ...]"
        )
    if dst_offsets.shape != (size,) or dst_offsets.dtype != jnp.int32:
        raise TypeError(
            f"{op}: dst_offsets must be int32[{size}], got "
            f"{dst_offsets.dtype.name}{list(dst_offsets.shape)}"
        )
    check_operand(op, win, x, x.size // size)
    operands = _axes.unify(axis, x, dst_offsets, _call.checked_token(op, token))
    (token,) = _call.bind(
        scatter_p, call, *operands, window=win.index, id=check_id(op, id)
    )
    return token


scatter_p = _call.define(
    "jaxfabric_scatter",
    "jaxfabric_scatter",
    lambda x, offsets, token, call, window, id: [token],
    lambda window, id: {"window": np.int64(window), "id": np.int64(id)},
)
_call.refuse_derivative(scatter_p, "jf.scatter")
_call.refuse_vmap(scatter_p, "jf.scatter")
