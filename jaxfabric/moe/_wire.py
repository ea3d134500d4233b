"""e4m3 with block scales: how rows travel with ``wire_dtype=jnp.float8_e4m3fn``.

The contract is in `jaxfabric.moe._plan`. Every operation here has one result on every
platform: each product is rounded once, and there is no division, which XLA turns into
a product (by a constant) or may approximate (on GPUs).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_Array = jax.Array

DTYPE = jnp.dtype(jnp.float8_e4m3fn)
BLOCK = 128
AMAX_MIN = 2.0**-100
# float32 nearest to 1/448, 448 being the largest number of e4m3.
_PER_AMAX = np.float32(1 / 448)
_NAN = 0x7F


def blocks(hidden: int) -> int:
    """Scales of a row of so many elements; the last block may be shorter."""
    return -(-hidden // BLOCK)


def quantize(x: _Array) -> tuple[_Array, _Array]:
    """x[T, D] to its payload, uint8[T, D], and scales, float32[T, blocks]."""
    tokens, hidden = x.shape
    values = _by_block(x.astype(jnp.float32))
    finite = jnp.isfinite(values).all(-1)
    amax = jnp.where(finite, jnp.abs(values).max(-1), 1)
    amax = jnp.maximum(amax, AMAX_MIN)
    scaled = values * _reciprocal(amax)[..., None]
    payload = lax.bitcast_convert_type(scaled.astype(DTYPE), jnp.uint8)
    payload = jnp.where(finite[..., None], payload, jnp.uint8(_NAN))
    scales = jnp.where(finite, amax * _PER_AMAX, jnp.nan)
    return payload.reshape(tokens, -1)[:, :hidden], scales


def dequantize(payload: _Array, scales: _Array, dtype: jnp.dtype) -> _Array:
    """Payload uint8[R, D] times scales float32[R, blocks], as ``dtype``."""
    values = _by_block(as_e4m3(payload).astype(jnp.float32)) * scales[..., None]
    return values.reshape(len(payload), -1)[:, : payload.shape[1]].astype(dtype)


def as_e4m3(payload: _Array) -> _Array:
    """uint8 to float8_e4m3fn, which not every collective takes."""
    return lax.bitcast_convert_type(payload, DTYPE)


def _by_block(rows: _Array) -> _Array:
    """[T, D] to [T, blocks, BLOCK], filled up with zeros."""
    count = blocks(rows.shape[1])
    padded = jnp.pad(rows, ((0, 0), (0, count * BLOCK - rows.shape[1])))
    return padded.reshape(len(rows), count, BLOCK)


def _reciprocal(amax: _Array) -> _Array:
    """448 / amax, rounded to nearest: long division of the significands."""
    bits = lax.bitcast_convert_type(amax, jnp.uint32)
    exponent = bits >> 23
    divisor = bits & 0x7FFFFF | 0x800000
    dividend = jnp.uint32(7 << 21)  # 448 is 7/4 times 2^8
    below_one = (divisor > dividend).astype(jnp.uint32)
    rest = dividend << below_one
    quotient = jnp.zeros_like(divisor)
    for _ in range(24):
        bit = (rest >= divisor).astype(jnp.uint32)
        quotient = quotient << 1 | bit
        rest = (rest - divisor * bit) << 1
    # Never a tie: 448 is no odd 25-bit number times a significand.
    quotient += (rest > divisor).astype(jnp.uint32)
    # The quotient's leading one adds the one that is taken off here.
    exponent = 2 * 127 + 8 - exponent - below_one - 1
    return lax.bitcast_convert_type((exponent << 23) + quotient, jnp.float32)
