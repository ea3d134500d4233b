"""Region: memory that is registered with a TransferEngine, and buffers in general."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxfabric._net_addr import MrDesc


class Region:
    """Registered memory; from `TransferEngine.alloc` or ``register_memory``.

    It keeps the memory, and stays registered until ``unregister_memory`` or the end of
    the engine.

    Attributes:
      array: the memory as a NumPy array.
      nbytes: its size.
    """

    def __init__(
        self, key: int, array: npt.NDArray[Any], describe: Callable[[int], Any]
    ) -> None:
        self.key = key
        self.array = array
        self.nbytes = array.nbytes
        self.address = address_of(array)
        self._describe = describe

    @property
    def desc(self) -> MrDesc:
        """What a peer needs to write into it.

        Raises:
          TransportUnavailableError: this transport (shm) writes only into memory of
            the engine's own, from `TransferEngine.alloc`.
        """
        return MrDesc(self._describe(self.key))

    def __repr__(self) -> str:
        return f"Region({self.key}, {self.nbytes} bytes)"


def address_of(array: npt.NDArray[Any]) -> int:
    """Where an array's first byte is."""
    return int(array.__array_interface__["data"][0])


def as_array(buffer: Any, what: str) -> npt.NDArray[Any]:
    """A contiguous NumPy array over the same memory, never a copy.

    Takes NumPy arrays, whatever has DLPack and lies in host memory, and whatever has
    the buffer protocol.
    """
    if isinstance(buffer, np.ndarray):
        array = buffer
    elif hasattr(buffer, "__dlpack__"):
        deleted = getattr(buffer, "is_deleted", None)  # a jax.Array's
        if deleted is not None and deleted():
            raise ValueError(f"{what}: this array was deleted, or donated to a program")
        device, _ = buffer.__dlpack_device__()
        if int(device) != _DLPACK_CPU:
            raise ValueError(
                f"{what}: a {type(buffer).__name__} on DLPack device {int(device)}; "
                "only host memory can be registered"
            )
        array = np.from_dlpack(buffer)
    else:
        try:
            array = np.frombuffer(memoryview(buffer).cast("B"), np.uint8)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{what}: a {type(buffer).__name__} is no contiguous buffer; pass a "
                f"NumPy array, or what has DLPack or the buffer protocol ({error})"
            ) from None
    if not array.flags.c_contiguous:
        raise ValueError(
            f"{what}: an array of shape {array.shape} that is not contiguous; register "
            "np.ascontiguousarray of it, and keep that"
        )
    if array.dtype.hasobject:
        raise ValueError(f"{what}: an array of Python objects has no bytes to send")
    return array


_DLPACK_CPU = 1  # kDLCPU


def page_indices(values: Any, what: str) -> npt.NDArray[np.uint64]:
    """Indices of pages as u64[n], each at least 0."""
    indices = np.asarray(values)
    if indices.size == 0:
        indices = indices.astype(np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(
            f"{what}: page indices are integers[n], not "
            f"{indices.dtype}{list(indices.shape)}"
        )
    if indices.size and int(indices.min()) < 0:
        raise ValueError(f"{what}: a page index is {int(indices.min())}")
    return np.ascontiguousarray(indices, np.uint64)
