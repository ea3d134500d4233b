"""exchange: put and wait in one, along a static permutation."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import batching

from jaxfabric import _axes
from jaxfabric._dtypes import refuse_packed
from jaxfabric._primitives import _call

Permutation = tuple[tuple[int, int], ...]


def exchange(
    x: jax.Array,
    perm: Sequence[tuple[int, int]],
    *,
    axis_name: _axes.AxisName,
    token: jax.Array | None = None,
    timeout_s: float | None = None,
    key: Hashable = None,
    fabric: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Sends ``x`` along a permutation of the ranks; differentiable.

    The same contract as `jax.lax.ppermute`: rank d gets what the rank s with
    ``(s, d)`` in ``perm`` gave, or zeros if there is none. Its transpose is the
    exchange along the inverse permutation.

    Args:
      x: any shape, and dtype of whole bytes, equal on all ranks.
      perm: pairs (source, destination) of indices on the axis; each index at most
        once as source and once as destination. Static, equal on all ranks.
      axis_name: mesh axis, or tuple of axes.
      token: float32[1], orders this call after the one that returned it.
      timeout_s: time limit in seconds; ``None`` inherits the Fabric's.
      key: hashable; tells calls apart that one traced function makes.
      fabric: the Fabric; ``None`` is the innermost open one with the axis.

    Returns:
      (y, token): y of the shape and dtype of ``x``, and the next token.

    Raises:
      TypeError: elements of ``x`` have less than a byte.
      ValueError: ``perm`` is no permutation of the axis.
      FabricError: no open Fabric has the axis.

    Example::

      # 3 ranks hold 10, 20, 30
      y, tok = jf.exchange(x, [(0, 1), (1, 2), (2, 0)], axis_name="x", token=tok)
      # y is 30, 10, 20
    """
    call, axis, size = _call.make(
        "exchange", axis_name, fabric, timeout_s=timeout_s, key=key
    )
    pairs = _checked(perm, size, axis)
    x = jnp.asarray(x)
    refuse_packed("jf.exchange", x.dtype)
    x, token = _axes.unify(axis, x, _call.checked_token("jf.exchange", token))
    return _exchange(call, pairs, x, token)


def _checked(
    perm: Sequence[tuple[int, int]], size: int, axis: tuple[str, ...]
) -> Permutation:
    pairs = tuple((int(s), int(d)) for s, d in perm)
    for what, indices in (
        ("source", [s for s, _ in pairs]),
        ("destination", [d for _, d in pairs]),
    ):
        if len(set(indices)) != len(indices):
            raise ValueError(
                f"jf.exchange: perm={pairs} names a {what} twice; each rank of axis "
                f"{axis} may be {what} once"
            )
        wrong = [i for i in indices if not 0 <= i < size]
        if wrong:
            raise ValueError(
                f"jf.exchange: perm={pairs} names {what} {wrong[0]}, but axis {axis} "
                f"has size {size}"
            )
    return pairs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(
    call: _call.Call, perm: Permutation, x: jax.Array, token: jax.Array
) -> tuple[jax.Array, jax.Array]:
    y, token = _call.bind(exchange_p, call, x, token, perm=perm)
    return y, token


def _forward(
    call: _call.Call, perm: Permutation, x: jax.Array, token: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], None]:
    return _exchange(call, perm, x, token), None


def _backward(
    call: _call.Call, perm: Permutation, _: None, ct: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    inverse = tuple((d, s) for s, d in perm)
    return _exchange(call, inverse, *ct)


_exchange.defvjp(_forward, _backward)

exchange_p = _call.define(
    "jaxfabric_exchange",
    "jaxfabric_exchange",
    lambda x, token, call, perm: [x, token],
    lambda perm: {"pairs": np.asarray(perm, np.int64).reshape(-1)},
)


def _batch(
    operands: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[Sequence[Any], Sequence[Any]]:
    # The batch travels as one larger array: one exchange, whatever its size.
    if dims[2] is not None:
        raise NotImplementedError(
            "jf.exchange: a token cannot be batched; make it outside of jax.vmap"
        )
    return exchange_p.bind(*operands, **params), (dims[1], None)


batching.primitive_batchers[exchange_p] = _batch
