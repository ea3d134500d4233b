"""A slot: a bucket in registered memory, with a header that tells what it is."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxfabric._errors import FabricError
from jaxfabric.weights._buckets import Bucket

# version, bucket, nbytes, checksum of these and of all strips' checksums
_HEADER = struct.Struct("<QIIQ")
HEADER_BYTES = 64  # so that boxes are aligned

Bytes = npt.NDArray[np.uint8]


class Checksum:
    """The checksum of a bucket: of those of its strips, which may come in any order.

    So each is read while it is in the cache of the core that copies it, and several
    threads share a bucket.
    """

    def __init__(self, version: int, bucket: int, nbytes: int) -> None:
        self._fields = version, bucket, nbytes
        self._sums: dict[int, int] = {}
        self._one, self._new = _xxhash().xxh3_64_intdigest, _xxhash().xxh3_64

    def add(self, strip: int, parts: Sequence[Bytes]) -> None:
        """The bytes of a strip, each part contiguous. Any thread."""
        if len(parts) == 1:
            self._sums[strip] = self._one(parts[0].data)
            return
        whole = self._new()
        for part in parts:
            whole.update(part.data)
        self._sums[strip] = whole.intdigest()

    def header(self) -> bytes:
        """The header of a slot that holds all that was added."""
        sums = [self._sums[strip] for strip in sorted(self._sums)]
        data = _HEADER.pack(*self._fields, 0) + struct.pack(f"<{len(sums)}Q", *sums)
        return _HEADER.pack(*self._fields, self._one(data))


def cut_of(buckets: Sequence[Bucket], strip_bytes: int) -> int:
    """A number that two sides share which cut a plan into the same buckets and strips.

    Each computes them, so that another jaxfabric may find others.
    """
    sizes = [n for bucket in buckets for n in (bucket.nbytes, len(bucket.moves))]
    found = _xxhash().xxh3_64_intdigest(repr((strip_bytes, sizes)).encode())
    return int(found)


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
