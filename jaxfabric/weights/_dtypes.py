"""Which dtypes may become which on the way."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np

E4M3 = "float8_e4m3fn"  # of leaves that are quantised in blocks


def wide_float(dtype: str) -> bool:
    """Whether it is of floats of two bytes or more, which can be quantised.

    Float8 is quantised already: it travels as it is, and so do its scales.
    """
    return _is_float(dtype) and np.dtype(dtype).itemsize > 1


def can_cast(source: str, target: str) -> bool:
    """Whether ``cast=True`` makes one of the other: rounded, or the same number.

    >>> can_cast("float32", "bfloat16"), can_cast("int32", "int64")
    (True, True)
    >>> can_cast("float32", "int32"), can_cast("float32", "float8_e4m3fn")
    (False, False)
    """
    if _is_float(source) and _is_float(target):
        # Float8 needs scales: without them it becomes NaN above 448, or other values.
        return wide_float(source) and wide_float(target)
    if _is_integer(source) and _is_integer(target):
        ours, theirs = ml_dtypes.iinfo(source), ml_dtypes.iinfo(target)
        return theirs.min <= ours.min and ours.max <= theirs.max
    return source == target


def _is_float(dtype: str) -> bool:
    return bool(jax.dtypes.issubdtype(np.dtype(dtype), np.floating))


def _is_integer(dtype: str) -> bool:
    return bool(jax.dtypes.issubdtype(np.dtype(dtype), np.integer))
