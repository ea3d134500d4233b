"""wait: until transfers have come, then reads the window."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from jaxfabric import _axes
from jaxfabric._primitives import _call
from jaxfabric._primitives.window import check_id, check_window
from jaxfabric._window import Window


def wait(
    win: Window,
    *,
    axis_name: _axes.AxisName,
    id: int = 0,
    count: int = 1,
    token: jax.Array | None = None,
    timeout_s: float | None = None,
    key: Hashable = None,
    fabric: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Waits for ``count`` transfers under ``id``, then copies the region out.

    Transfers are counted, not named: those that this call waits for are consumed, and
    more of them carry over to the next. Overwriting the region before its reader's
    ``wait`` is the writer's error, unless a `barrier` stands between.

    Args:
      win: from `Fabric.window`.
      axis_name: mesh axis, or tuple of axes, as given to `put`; says which Fabric.
      id: 0 to 255, static.
      count: how many transfers, static; 0 reads at once.
      token: float32[1], orders this call after the one that returned it.
      timeout_s: time limit in seconds; ``None`` inherits the Fabric's.
      key: hashable; tells calls apart that one traced function makes.
      fabric: the Fabric; ``None`` is the innermost open one with the axis.

    Returns:
      (y, token): y of the window's shape and dtype, and the next token.

    Raises:
      ValueError: ``count`` or ``id`` out of range.

    Example::

      y, tok = jf.wait(win, count=2, id=7, axis_name="x", token=tok)
    """
    op = "jf.wait"
    call, axis, _ = _call.make("wait", axis_name, fabric, timeout_s=timeout_s, key=key)
    check_window(op, win, call)
    if int(count) < 0 or int(count) >= 1 << 31:
        raise ValueError(f"{op}: count={count} must be in 0..2^31-1")
    (token,) = _axes.unify(axis, _call.checked_token(op, token))
    y, token = _call.bind(
        wait_p,
        call,
        token,
        window=win.index,
        id=check_id(op, id),
        count=int(count),
        shape=win.shape,
        dtype=win.dtype,
    )
    return y, token


wait_p = _call.define(
    "jaxfabric_wait",
    "jaxfabric_wait",
    lambda token, call, window, id, count, shape, dtype: [
        _call.retyped(token, shape, dtype),
        token,
    ],
    lambda window, id, count, shape, dtype: {
        "window": np.int64(window),
        "id": np.int64(id),
        "count": np.int64(count),
    },
)
_call.refuse_derivative(wait_p, "jf.wait")
_call.refuse_vmap(wait_p, "jf.wait")
