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

from jaxfabric import _ffi
from jaxfabric._transfer_memory import address_of
from jaxfabric.weights._buckets import scale_shape

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_F32 = np.dtype(np.float32)
# Names in the native module; of a dtype's own name NumPy makes a string each time.
_NATIVE = {
    np.dtype(name): name for name in ("float32", "float64", "bfloat16", "float16")
}


def quantise(
    values: npt.NDArray[Any],
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Payload and scales of a box that begins at a block.

    ``scale = amax * (1/448)``, ``payload = e4m3(x * (448/amax))``, each operation
    rounded to float32; amax is at least 2**-100. A block with an infinity or NaN
    becomes NaN as a whole.

    Args:
      values: [..., r, c], any dtype of floats; what is wider than float32 is rounded
        to it first.

    Returns:
      payload: float8_e4m3fn[..., r, c]; scales: f32[..., ceil(r/128), ceil(c/128)].

    Example::

      payload, scales = quantise(np.ones((256, 300), np.float32))   # scales f32[2, 3]
    """
    payload = np.empty(values.shape, _E4M3)
    scales = np.empty(scale_shape(values.shape), np.float32)
    quantise_into(values, payload, scales)
    return payload, scales


def quantise_into(
    values: npt.NDArray[Any],
    payload: npt.NDArray[Any],
    scales: npt.NDArray[np.float32],
) -> None:
    """`quantise` into arrays that are there; other threads run meanwhile.

    Args:
      values: of any strides.
      payload, scales: of the shapes and dtypes that `quantise` returns, contiguous.

    Raises:
      ValueError: one of them is not so.
    """
    if values.ndim < 2:
        raise ValueError(f"quantise: values{values.shape} have no blocks of 128x128")
    _check("payload", payload, values.shape, _E4M3)
    _check("scales", scales, scale_shape(values.shape), _F32)
    if values.dtype not in _NATIVE:
        values = values.astype(_F32)
    _ffi.native().quantise_blocks(
        _NATIVE[values.dtype],
        address_of(values),
        values.shape,
        values.strides,
        address_of(payload),
        address_of(scales),
    )


def _check(
    name: str, array: npt.NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"quantise: {name} are {array.dtype}{array.shape}, not {dtype}{shape}"
        )
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(
            f"quantise: {name} must be contiguous and writeable; "
            f"they have strides {array.strides}"
        )
