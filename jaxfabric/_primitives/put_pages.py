"""put_pages: pages of an array into pages of another rank's window, counted as one."""

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
    known,
    scalar,
)
from jaxfabric._window import Window


def put_pages(
    win: Window,
    pages: jax.Array,
    src_idx: jax.Array,
    dst_idx: jax.Array,
    dst: jax.Array | int,
    *,
    axis_name: _axes.AxisName,
    id: int = 0,
    token: jax.Array | None = None,
    timeout_s: float | None = None,
    key: Hashable = None,
    fabric: Any = None,
) -> jax.Array:
    """Writes ``pages[src_idx[i]]`` to page ``dst_idx[i]`` of ``win`` at rank ``dst``.

    One-sided, and counted there as one transfer, however many pages it has: also if
    every entry is padding. Neighbouring pages travel as one write.

    Args:
      win: from `Fabric.window`, of shape [Q, ...page].
      pages: [P, ...page] of the window's dtype, such as one layer of a paged KV cache.
      src_idx: int32[M], rows of ``pages``, may be traced; an entry that is negative
        here or in ``dst_idx`` is padding and writes nothing.
      dst_idx: int32[M], rows of the window, may be traced; none twice.
      dst: index on the axis, int32 scalar, may be traced; negative writes nothing
        and counts nothing.
      axis_name: mesh axis, or tuple of axes, that ``dst`` is an index on.
      id: under which ``dst`` counts the transfer, 0 to 255, static.
      token: float32[1], orders this call after the one that returned it.
      timeout_s: time limit in seconds; ``None`` inherits the Fabric's.
      key: hashable; tells calls apart that one traced function makes.
      fabric: the Fabric; ``None`` is the innermost open one with the axis.

    Returns:
      float32[1], the next token. The call is kept only if the token is used.

    Raises:
      TypeError, ValueError: pages, indices or ``id`` do not fit the window. Traced
        values out of range raise `jax.errors.JaxRuntimeError` in the program.

    Example::

      win = fabric.window((64, 16, 128), jnp.bfloat16)     # 64 pages at each rank
      tok = jf.put_pages(win, kv, jnp.array([3, 9]), jnp.array([0, 7]), 1,
                         axis_name="x", token=tok)         # kv: [256, 16, 128]
      y, tok = jf.wait(win, count=1, axis_name="x", token=tok)
    """
    op = "jf.put_pages"
    call, axis, size = _call.make(
        "put_pages", axis_name, fabric, timeout_s=timeout_s, key=key
    )
    check_window(op, win, call)
    pages = jnp.asarray(pages)
    if pages.ndim < 1 or pages.shape[1:] != win.shape[1:] or not win.shape:
        raise ValueError(
            f"{op}: pages has shape {pages.shape} and the window {win.shape}; they "
            "must be alike but for the first axis, which counts pages"
        )
    check_operand(op, win, pages, min(pages.size, win.size))
    src_idx = indices(op, "src_idx", src_idx)
    dst_idx = indices(op, "dst_idx", dst_idx)
    for name, index in (("src_idx", src_idx), ("dst_idx", dst_idx)):
        if index.ndim != 1 or index.dtype != jnp.int32 or index.shape != src_idx.shape:
            raise TypeError(
                f"{op}: {name} must be int32[{src_idx.size}], one entry per page, got "
                f"{index.dtype.name}{list(index.shape)}"
            )
    if (to := known(dst)) is not None and to >= size:
        raise ValueError(f"{op}: dst={dst}, but axis {axis} has size {size}")
    operands = _axes.unify(
        axis,
        pages,
        src_idx,
        dst_idx,
        scalar(op, "dst", dst),
        _call.checked_token(op, token),
    )
    (token,) = _call.bind(
        put_pages_p, call, *operands, window=win.index, id=check_id(op, id)
    )
    return token


put_pages_p = _call.define(
    "jaxfabric_put_pages",
    "jaxfabric_put_pages",
    lambda pages, src_idx, dst_idx, dst, token, call, window, id: [token],
    lambda window, id: {"window": np.int64(window), "id": np.int64(id)},
)
_call.refuse_derivative(put_pages_p, "jf.put_pages")
_call.refuse_vmap(put_pages_p, "jf.put_pages")
