"""A slot: a bucket in registered memory, with a header that tells what it is."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxfabric._errors import FabricError

# version, bucket, nbytes, checksum of these and of the boxes' bytes
_HEADER = struct.Struct("<QIIQ")
HEADER_BYTES = 64  # so that boxes are aligned

Bytes = npt.NDArray[np.uint8]


class Checksum:
    """The checksum of a bucket, whose bytes are added part by part, in order.

    So each part is read while it is still in the cache of the core that copies it.
    """

    def __init__(self, version: int, bucket: int, nbytes: int) -> None:
        self._fields = version, bucket, nbytes
        seed = _xxhash().xxh3_64_intdigest(_HEADER.pack(*self._fields, 0))
        self._sum = _xxhash().xxh3_64(seed=seed)

    def add(self, part: Bytes) -> None:
        """The next bytes; contiguous."""
        self._sum.update(part.data)

    def header(self) -> bytes:
        """The header of a slot that holds all that was added."""
        return _HEADER.pack(*self._fields, self._sum.intdigest())


def seal(slot: Bytes, checksum: Checksum) -> None:
    """Writes the header of a slot whose bytes are there."""
    slot[: _HEADER.size] = memoryview(checksum.header())


def is_whole(slot: Bytes, checksum: Checksum) -> bool:
    """Whether the header of a slot says what was added to the checksum."""
    return checksum.header() == bytes(slot[: _HEADER.size])


def claimed(slot: Bytes) -> tuple[int, int]:
    """The version and bucket that a slot's header names; not checked yet."""
    version, bucket, _, _ = _HEADER.unpack(bytes(slot[: _HEADER.size]))
    return version, bucket


def _xxhash() -> Any:
    try:
        import xxhash
    except ImportError:
        raise FabricError(
            "jf.weights needs the package xxhash for its checksums: "
            "pip install 'jaxfabric[weights]'"
        ) from None
    return xxhash
