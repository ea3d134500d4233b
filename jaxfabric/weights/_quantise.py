"""e4m3 in blocks of 128x128: how quantised leaves are made.

The scale of a block is that of `jaxfabric.moe` (its contract is in
`jaxfabric.moe._plan`), but for blocks of two dimensions, as DeepSeek-V3's checkpoints
have them (``weight_scale_inv``; https://arxiv.org/abs/2412.19437, section 3.3.2).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from jaxfabric.weights._buckets import BLOCK, scale_shape

_AMAX_MIN = np.float32(2.0**-100)
_LARGEST = np.float32(448)  # of e4m3
_PER_AMAX = np.float32(1 / 448)


def quantise(
    values: npt.NDArray[Any],
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Payload and scales of a box that begins at a block.

    ``scale = amax * (1/448)``, ``payload = e4m3(x * (448/amax))``, each operation
    rounded to float32; a block with an infinity or NaN becomes NaN as a whole.

    Args:
      values: [..., r, c], any dtype of floats.

    Returns:
      payload: float8_e4m3fn[..., r, c]; scales: f32[..., ceil(r/128), ceil(c/128)].

    Example::

      payload, scales = quantise(np.ones((256, 300), np.float32))   # scales f32[2, 3]
    """
    shape = values.shape
    scales = np.empty(scale_shape(shape), np.float32)
    payload = np.empty(shape, ml_dtypes.float8_e4m3fn)
    for row in range(0, shape[-2], BLOCK):
        for column in range(0, shape[-1], BLOCK):
            box = (..., slice(row, row + BLOCK), slice(column, column + BLOCK))
            block = values[box].astype(np.float32)
            amax = np.abs(block).max(axis=(-2, -1), keepdims=True)
            finite = np.isfinite(amax)
            amax = np.where(finite, np.maximum(amax, _AMAX_MIN), np.float32(1))
            scaled = np.where(finite, block * (_LARGEST / amax), np.float32(np.nan))
            payload[box] = scaled.astype(ml_dtypes.float8_e4m3fn)
            scale = np.where(finite, amax * _PER_AMAX, np.float32(np.nan))
            scales[..., row // BLOCK, column // BLOCK] = scale[..., 0, 0]
    return payload, scales
