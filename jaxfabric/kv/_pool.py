"""Pool: the registered memory of a layout, and what tails look like."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxfabric._transfer_engine import TransferEngine
from jaxfabric._transfer_memory import Region
from jaxfabric.kv._layout import PageLayout

TAIL_HEADER = struct.Struct("<QQQ")  # request, transfers, bytes that follow


class Pool:
    """The registered memory of a layout.

    Args:
      pool: a Region, a NumPy array to be registered, or ``None`` to make one.

    Raises:
      ValueError: it has another size.
    """

    def __init__(
        self, engine: TransferEngine, layout: PageLayout, pool: Any, who: str
    ) -> None:
        if pool is None:
            pool = engine.alloc(layout.shape, layout.numpy_dtype)
        if pool.nbytes != layout.nbytes:
            raise ValueError(
                f"{who}: the pool has {pool.nbytes} bytes, the layout {layout.nbytes}"
            )
        if isinstance(pool, np.ndarray):
            pool = engine.register_memory(pool)
        self.region: Region = pool
        flat = pool.array.reshape(-1).view(np.uint8)
        self.array: npt.NDArray[Any]
        self.array = flat.view(layout.numpy_dtype).reshape(layout.shape)
