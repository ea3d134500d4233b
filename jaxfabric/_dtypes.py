"""Dtypes that programs hold otherwise than NumPy and the engine."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def refuse_packed(op: str, dtype: Any) -> None:
    """Raises TypeError for elements of less than a byte.

    XLA's buffers hold two or four of them in a byte, NumPy's one, and a handler is told
    sizes as if it were one.

    Example::

      refuse_packed("exchange", jnp.int4)  # TypeError
    """
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return  # such as keys, whose buffers hold whole words
    kind = np.dtype(dtype)
    if jnp.issubdtype(kind, jnp.integer):
        bits = int(jnp.iinfo(kind).bits)
    elif jnp.issubdtype(kind, jnp.floating):
        bits = int(jnp.finfo(kind).bits)
    else:
        return
    if bits < 8:
        raise TypeError(
            f"{op}: programs pack elements of {kind.name}, {8 // bits} to a byte; send "
            f"the bytes: with x of [..., n], x.reshape(..., n // {8 // bits}, "
            f"{8 // bits}) and jax.lax.bitcast_convert_type to jnp.uint8"
        )
