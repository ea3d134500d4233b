"""Call sites: what a call is matched by on the other ranks.

Each of our calls in a lowered program has a channel: a hash of the program's name, the
number of the call in the program, what it does and its ``key=``. It is computed while
lowering, from the program alone, so ranks agree whatever they traced before.

JAX lowers a function that is called twice only once, and then both calls would share
one channel, although nothing may order them. So functions with our calls inside are
kept out of JAX's lowering caches: each call of them is lowered, and numbered, anew.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Hashable
from typing import Any

import jax

from jaxfabric._errors import FabricError

# The attributes of JAX's ModuleContext that hold lowered functions.
_CACHES = ("lowering_cache", "cached_primitive_lowerings")
# What JAX's lowering functions call their contexts.
_CONTEXT_NAMES = ("ctx", "mod_ctx")


class _Counter:
    """The calls lowered so far into one module; kept in its list of keep-alives."""

    def __init__(self) -> None:
        self.calls = 0


class _CallFreeCache(dict[Any, Any]):
    """A lowering cache that does not take functions with our calls inside."""

    def __init__(self, entries: dict[Any, Any], counter: _Counter) -> None:
        super().__init__(entries)
        self._counter = counter
        self._calls_at_miss: dict[Any, int] = {}

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self._calls_at_miss[key] = self._counter.calls
        return super().get(key, default)

    def __missing__(self, key: Any) -> Any:
        self._calls_at_miss[key] = self._counter.calls
        raise KeyError(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        # Lowering that began before this cache was in place holds a call of ours.
        if self._calls_at_miss.pop(key, -1) == self._counter.calls:
            super().__setitem__(key, value)


def next_site(ctx: Any, op: str, key: Hashable) -> tuple[int, str]:
    """The channel and the label of the call that is being lowered.

    Args:
      ctx: JAX's LoweringRuleContext.
      op: what the call is, as users know it.
      key: the user's ``key=``, or ``None``.

    Returns:
      A number that fits a signed 64-bit attribute, and "dispatch (jit_step, call 3)".
    """
    module = ctx.module_context
    counter = _counter_of(module)
    _keep_out_of_caches(module, counter)
    number = counter.calls
    counter.calls += 1
    attribute = module.module.operation.attributes["sym_name"]
    program = str(attribute).strip('"')
    signature = (program, number, op, repr(key), [str(a) for a in ctx.avals_in])
    digest = hashlib.blake2b(repr(signature).encode(), digest_size=8).digest()
    keyed = "" if key is None else f", key {key!r}"
    return (
        int.from_bytes(digest, "little") >> 1,
        f"{op} ({program}, call {number}{keyed})",
    )


def _counter_of(module: Any) -> _Counter:
    for kept in module.keepalives:
        if isinstance(kept, _Counter):
            return kept
    counter = _Counter()
    module.keepalives.append(counter)
    return counter


def _keep_out_of_caches(module: Any, counter: _Counter) -> None:
    """Replaces the caches of all module contexts that are lowering right now.

    Contexts are copied for nested functions, and each copy refers to the caches, so
    every one on the stack is changed. A jax that has other caches is refused: calls of
    one body would share a channel, and might be swapped in silence.
    """
    if not all(hasattr(module, name) for name in _CACHES):
        raise FabricError(
            f"jax {jax.__version__} keeps lowered functions where jaxfabric does not "
            "know; install a version that it was tested with (0.10.2 to 0.12), or a "
            "newer jaxfabric"
        )
    if all(isinstance(getattr(module, c, None), _CallFreeCache) for c in _CACHES):
        return
    replaced: dict[int, _CallFreeCache] = {}
    for context in [module, *_contexts_on_stack()]:
        for name in _CACHES:
            cache = getattr(context, name, None)
            if cache is None or isinstance(cache, _CallFreeCache):
                continue
            if id(cache) not in replaced:
                replaced[id(cache)] = _CallFreeCache(cache, counter)
            setattr(context, name, replaced[id(cache)])


def _contexts_on_stack() -> list[Any]:
    contexts = []
    frame = sys._getframe()
    while frame is not None:
        for name in _CONTEXT_NAMES:
            context = frame.f_locals.get(name)
            contexts += [context, getattr(context, "module_context", None)]
        frame = frame.f_back  # type: ignore[assignment]
    return [c for c in contexts if hasattr(c, _CACHES[0])]
