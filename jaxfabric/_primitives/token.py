"""Tokens: the order of calls, as data."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxfabric._primitives._call import TOKEN_SHAPE


def token() -> jax.Array:
    """Makes a fresh token, float32[1].

    Every call takes a token and returns the next; calls that share no token and no
    data run in any order, and in different orders on different ranks. float32, so that
    under `jax.grad` the cotangents of tokens order the backward pass in reverse.

    Example::

      tok = jf.token()
      tok = jf.put(win, x, dst, axis_name="x", token=tok)
      y, tok = jf.wait(win, count=1, axis_name="x", token=tok)
    """
    return jnp.zeros(TOKEN_SHAPE, jnp.float32)
