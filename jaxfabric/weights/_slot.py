"""A slot: a bucket in registered memory, with a header that tells what it is."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxfabric._errors import FabricError

# version, bucket, nbytes, checksum of these and the bytes
_HEADER = struct.Struct("<QIIQ")
HEADER_BYTES = 64  # so that boxes are aligned

Bytes = npt.NDArray[np.uint8]


def seal(slot: Bytes, version: int, bucket: int, nbytes: int) -> None:
    """Writes the header of a slot whose bytes are there."""
    checksum = _checksum(slot, version, bucket, nbytes)
    slot[: _HEADER.size] = memoryview(_HEADER.pack(version, bucket, nbytes, checksum))


def is_whole(slot: Bytes, version: int, bucket: int, nbytes: int) -> bool:
    """Whether a slot holds this bucket, and every byte of it is right."""
    checksum = _checksum(slot, version, bucket, nbytes)
    return _HEADER.pack(version, bucket, nbytes, checksum) == bytes(
        slot[: _HEADER.size]
    )


def _checksum(slot: Bytes, version: int, bucket: int, nbytes: int) -> int:
    header = _HEADER.pack(version, bucket, nbytes, 0)
    seed = _xxhash().xxh3_64_intdigest(header)
    content = slot[HEADER_BYTES : HEADER_BYTES + nbytes]
    return int(_xxhash().xxh3_64_intdigest(content.data, seed=seed))


def _xxhash() -> Any:
    try:
        import xxhash
    except ImportError:
        raise FabricError(
            "jf.weights needs the package xxhash for its checksums: "
            "pip install 'jaxfabric[weights]'"
        ) from None
    return xxhash
