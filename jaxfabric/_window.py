"""Window: a symmetric region that peers write."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfabric._dtypes import refuse_packed

# Ids of transfers hold a window's index and the user's id in 7 and 8 bits.
WINDOWS_MAX = 128
USER_IDS_MAX = 256


@dataclasses.dataclass(frozen=True)
class Window:
    """A region of the same size on each rank, which peers write with `put`.

    A static handle: closed over by programs, never a traced value.

    Attributes:
      shape: of the region on each rank.
      dtype: of its elements.
      index: which window of the Fabric it is, in the order of creation.
      fabric_key: the stable key of the Fabric.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    index: int
    fabric_key: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def checked_region(
    shape: Sequence[int] | int, dtype: Any
) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a window, as JAX has them.

    Raises:
      TypeError: a length is no integer; the dtype is not of numbers, or of less than a
        byte.
      ValueError: a length is below zero.
    """
    lengths = [shape] if isinstance(shape, int) else list(shape)
    shape = tuple(operator.index(length) for length in lengths)
    if any(length < 0 for length in shape):
        raise ValueError(f"fabric.window: shape {shape} has a length below zero")
    kind = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    if not (jnp.issubdtype(kind, jnp.number) or kind == np.bool_):
        raise TypeError(f"fabric.window: dtype {kind} is none that JAX computes with")
    refuse_packed("fabric.window", kind)
    return shape, kind
