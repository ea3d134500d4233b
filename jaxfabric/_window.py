"""Window: a symmetric region that peers write."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

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
