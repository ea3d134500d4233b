"""send_layer: a program hands a layer's pages over, and computes the next one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.experimental import io_callback
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxfabric import _ffi
from jaxfabric._dtypes import refuse_packed
from jaxfabric._primitives import _call
from jaxfabric.kv._programs import find_programs
from jaxfabric.kv._sender import PageSender
from jaxfabric.kv._waits import is_u64

_OP = "jf.kv.send_layer"


def request_operand(request_id: int) -> npt.NDArray[np.uint32]:
    """A request's id as a program takes it, uint32[2]: JAX may have no 64 bits.

    Example::

      program(x, jf.kv.request_operand(7))
    """
    is_u64("request_operand", request_id=request_id)
    return np.array([request_id & 0xFFFFFFFF, request_id >> 32], np.uint32)


def send_layer(
    sender: PageSender,
    request: jax.Array | int,
    layer: int,
    kv: jax.Array,
    pages: jax.Array,
    *,
    pool_pages: jax.Array | None = None,
    token: jax.Array | None = None,
) -> jax.Array:
    """Copies a layer's pages to the sender's pool, and sends them from there.

    The copy is done when the program goes on; the writes begin then, and are under way
    while it computes what follows. The request must have begun (`PageSender.begin`).
    Its tail is sent when the program has ended. On a GPU the pages come to the host
    by a callback of JAX's, for which the stream waits.

    Args:
      sender: a PageSender, whose layout's order begins with ``"layers", "pages"``.
        Programs hold its number, the how-manieth of this process, so processes that
        share a compile cache make their senders in the same order.
      request: the id of the request, uint32[2] from `request_operand`, may be traced.
      layer: static.
      kv: [P, ...page] of the layout's dtype; a page is ``layout.shape[2:]``.
      pages: int32[M], rows of ``kv``, may be traced; negative entries are padding.
      pool_pages: int32[M], the pages of the pool that they go to, those of the
        request; ``None``: the same numbers.
      token: float32[1], orders this call after the one that returned it.

    Returns:
      float32[1], the next token. The call is kept only if the token is used.

    Raises:
      TypeError, ValueError: the operands do not fit the layout, or have elements of
        less than a byte (send their bytes, as uint8); in the program, a page is out of
        range, or the sender was closed. A request that had this layer already fails by
        itself.

    Example::

      @jax.jit
      def prefill(x, request, rows, pages):
          tok = jf.token()
          for layer in range(layers):
              x, kv = block(x, layer)               # kv: [rows, 2, 16, 8, 64]
              tok = jf.kv.send_layer(sender, request, layer, kv, rows,
                                     pool_pages=pages, token=tok)
          return x, tok
    """
    kv, pages = jnp.asarray(kv), jnp.asarray(pages)
    target = pages if pool_pages is None else jnp.asarray(pool_pages)
    if isinstance(request, int):
        request = jnp.asarray(request_operand(request))
    _check(sender, request, layer, kv, pages, target)
    token = _call.checked_token(_OP, token)
    return send_layer_p.bind(
        *(kv, pages, target, request, token),
        pool=sender.programs().id,
        layer=int(layer),
    )


def _check(
    sender: PageSender,
    request: jax.Array,
    layer: int,
    kv: jax.Array,
    pages: jax.Array,
    target: jax.Array,
) -> None:
    """Raises what `send_layer` raises."""
    if not isinstance(sender, PageSender):
        raise TypeError(f"{_OP}: sender is a {type(sender).__name__}, not a PageSender")
    layout = sender.layout
    refuse_packed(_OP, kv.dtype)
    if kv.dtype != layout.numpy_dtype or kv.shape[1:] != layout.shape[2:]:
        raise TypeError(
            f"{_OP}: kv is {kv.dtype}{list(kv.shape)}, and pages of the sender are "
            f"{layout.dtype}[P, {', '.join(map(str, layout.shape[2:]))}]"
        )
    for name, index in (("pages", pages), ("pool_pages", target)):
        if index.ndim != 1 or index.dtype != jnp.int32 or index.shape != pages.shape:
            raise TypeError(
                f"{_OP}: {name} must be int32[{pages.size}], one entry per page, got "
                f"{index.dtype}{list(index.shape)}"
            )
    if not 0 <= layer < layout.layers:
        raise ValueError(f"{_OP}: layer={layer} is not in 0 to {layout.layers - 1}")
    if request.shape != (2,) or request.dtype != jnp.uint32:
        raise TypeError(
            f"{_OP}: request must be uint32[2], from jf.kv.request_operand(id), got "
            f"{request.dtype}{list(request.shape)}"
        )


def _lower(ctx: Any, *operands: Any, pool: int, layer: int) -> Any:
    _ffi.register_targets()
    rule = jax.ffi.ffi_lowering("jaxfabric_send_layer", has_side_effect=True)
    return rule(ctx, *operands, pool=np.int64(pool), layer=np.int64(layer))


def _through_host(
    kv: jax.Array,
    pages: jax.Array,
    target: jax.Array,
    request: jax.Array,
    token: jax.Array,
    *,
    pool: int,
    layer: int,
) -> jax.Array:
    """The same where the operands do not lie in host memory."""

    def put(rows: Any, target: Any, request: Any, token: Any) -> Any:
        low, high = np.asarray(request).tolist()
        find_programs(pool).put(
            high << 32 | low, layer, np.asarray(rows), np.asarray(target)
        )
        return np.asarray(token)

    rows = kv[jnp.clip(pages, 0, kv.shape[0] - 1)]  # no more leaves the device
    target = jnp.where(pages < 0, -1, target)
    like = jax.ShapeDtypeStruct(token.shape, token.dtype)
    result: jax.Array = io_callback(put, like, rows, target, request, token)
    return result


send_layer_p = Primitive("jaxfabric_send_layer")
send_layer_p.def_impl(jax.jit(send_layer_p.bind, static_argnames=("pool", "layer")))
send_layer_p.def_abstract_eval(
    lambda kv, pages, target, request, token, pool, layer: token
)
mlir.register_lowering(send_layer_p, _lower, platform="cpu")
mlir.register_lowering(
    send_layer_p,
    mlir.lower_fun(_through_host, multiple_results=False),
    platform="cuda",
)
_call.refuse_derivative(send_layer_p, _OP)
_call.refuse_vmap(send_layer_p, _OP)
