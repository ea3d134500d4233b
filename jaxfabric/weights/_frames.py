"""The messages of jf.weights: JSON, parts of what is too long for one, and credits."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from jaxfabric._errors import FabricError
from jaxfabric._json_frames import JsonFrames, is_text, is_u64

VERSION = 4
_PART_BYTES = 1 << 19
_WHOLE_BYTES_MAX = 1 << 28
_PART = b"\x00"  # no JSON begins so
_CREDIT = struct.Struct("<BBI")  # the tag, whether the bucket was whole, its slot
_CREDIT_TAG = 1

_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    # target to source; a layout follows in parts
    "hello": {
        "version": is_u64,
        "rank": is_u64,
        "name": is_text,
        "connection": is_u64,  # what answers it says so: older ones may cross it
        "nbytes": is_u64,
    },
    "ready": {"slots": is_u64, "id": is_u64, "memory": is_text, "cut": is_u64},
    "go": {"version": is_u64},
    "have": {"version": is_u64, "verify_us": is_u64, "unpack_us": is_u64},
    # either way: a version, or all of them (version 0), will not come about. It tells
    # other versions of the protocol what is wrong, so its fields stay as they are
    "refuse": {"version": is_u64, "why": is_text, "connection": is_u64},
    # the same of a version, since a rank of the trainer has given it up
    "dropped": {"version": is_u64, "why": is_text, "connection": is_u64},
    # source to target; a plan follows in parts
    "welcome": {
        "version": is_u64,
        "rank": is_u64,
        "origin": is_u64,  # tells this Sender from one of the same rank before it
        "run": is_text,  # of its job
        "nbytes": is_u64,
        "connection": is_u64,
    },
    "joined": {"connection": is_u64},
    "begin": {"version": is_u64, "connection": is_u64},
    # between the ranks of a target
    "join": {"rank": is_u64},
    "newest": {"version": is_u64, "origin": is_u64, "number": is_u64},
    "want": {"version": is_u64, "number": is_u64},
    "use": {"version": is_u64, "number": is_u64},
    "gone": {"rank": is_u64, "number": is_u64},
}


_FRAMES = JsonFrames("jf.weights", "Sender or Receiver", _FIELDS)
encode, decode = _FRAMES.encode, _FRAMES.decode


def credit(slot: int, whole: bool) -> bytes:
    """Target to source: a slot is free again, and whether what was in it was whole.

    There is one for each bucket, so it is shorter to write and to read than JSON.
    """
    return _CREDIT.pack(_CREDIT_TAG, whole, slot)


def credited(data: bytes) -> tuple[int, bool] | None:
    """The slot and outcome that a `credit` tells of; ``None`` for other messages."""
    if len(data) != _CREDIT.size or data[0] != _CREDIT_TAG:
        return None
    _, whole, slot = _CREDIT.unpack(data)
    return slot, bool(whole)


def in_parts(data: bytes) -> Iterator[bytes]:
    """Messages that carry what is too long for one."""
    for begin in range(0, len(data), _PART_BYTES):
        yield _PART + data[begin : begin + _PART_BYTES]


def is_part(data: bytes) -> bool:
    """Whether a message is one of `in_parts`."""
    return data[:1] == _PART


class Parts:
    """Puts together what came `in_parts`."""

    def __init__(self, nbytes: int) -> None:
        if nbytes > _WHOLE_BYTES_MAX:
            raise FabricError(f"jf.weights: a peer announces {nbytes} bytes")
        self._left = nbytes
        self._parts: list[bytes] = []

    def add(self, message: bytes) -> bytes | None:
        """Takes the next message; all of it, once it is there."""
        part = message[len(_PART) :]
        self._left -= len(part)
        if self._left < 0 or not part:
            raise FabricError("jf.weights: a peer sent more than it announced")
        self._parts.append(part)
        return b"".join(self._parts) if not self._left else None
