"""signal: bumps a Watcher, so that an engine starts to work at this point."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxfabric import _ffi
from jaxfabric._primitives import _call


def signal(watcher: Any, *, by: int = 1, token: jax.Array | None = None) -> jax.Array:
    """Bumps ``watcher`` when the program comes to this point.

    The TransferEngine that made the watcher calls its callback with the value before
    and after, on a thread of its own: work on memory that the engine owns begins while
    the program goes on. Each device that runs the program bumps once, so ``by`` counts
    devices too. Needs no Fabric, and no shard_map.

    Args:
      watcher: from `TransferEngine.alloc_watcher`. Programs hold its number, the
        how-manieth of this process it is, so processes that share a program or a
        compile cache make their watchers in the same order.
      by: how much to add, 1 or more, static.
      token: float32[1], orders this call after the one that returned it.

    Returns:
      float32[1], the next token. The call is kept only if the token is used.

    Raises:
      TypeError, ValueError: no watcher, or ``by`` below 1. A watcher that was closed
        raises `jax.errors.JaxRuntimeError` in the program.
      NotImplementedError: the program is compiled for GPUs.

    Example::

      watcher = engine.alloc_watcher(lambda before, after: print(after))
      step = jax.jit(lambda x, tok: (x * 2, jf.signal(watcher, token=tok)))
      y, tok = step(x, jf.token())      # prints 1
    """
    op = "jf.signal"
    number = getattr(watcher, "id", None)
    if not isinstance(number, int):
        raise TypeError(
            f"{op}: watcher must be made by engine.alloc_watcher(callback), got "
            f"{type(watcher).__name__}"
        )
    if int(by) < 1:
        raise ValueError(f"{op}: by={by} must be 1 or more")
    token = _call.checked_token(op, token)
    return signal_p.bind(token, watcher=number, by=int(by))


def _lower(ctx: Any, token: Any, *, watcher: int, by: int) -> Any:
    _ffi.register_targets()
    rule = jax.ffi.ffi_lowering("jaxfabric_signal", has_side_effect=True)
    return rule(ctx, token, watcher=np.int64(watcher), by=np.int64(by))


signal_p = Primitive("jaxfabric_signal")
signal_p.def_impl(jax.jit(signal_p.bind, static_argnames=("watcher", "by")))
signal_p.def_abstract_eval(lambda token, watcher, by: token)
mlir.register_lowering(signal_p, _lower, platform="cpu")
_call.refuse_on_gpus(
    signal_p,
    "jf.signal",
    "a kernel cannot wake the engine's worker; call jax.block_until_ready and then "
    "watcher.bump() from Python",
)
_call.refuse_derivative(signal_p, "jf.signal")
_call.refuse_vmap(signal_p, "jf.signal")
