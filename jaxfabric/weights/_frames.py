"""The messages of jf.weights: JSON, or parts of what is too long for one message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from jaxfabric._errors import FabricError
from jaxfabric._json_frames import JsonFrames, is_text, is_u64

VERSION = 2
_PART_BYTES = 1 << 19
_WHOLE_BYTES_MAX = 1 << 28
_PART = b"\x00"  # no JSON begins so


_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    # target to source; a layout follows in parts
    "hello": {
        "version": is_u64,
        "rank": is_u64,
        "name": is_text,
        "connection": is_u64,  # what answers it says so: older ones may cross it
        "nbytes": is_u64,
    },
    "ready": {"slots": is_u64, "id": is_u64, "memory": is_text},
    "go": {"version": is_u64},
    "took": {"slot": is_u64},
    "spoilt": {"slot": is_u64},
    "have": {"version": is_u64, "verify_us": is_u64, "unpack_us": is_u64},
    # either way: a version, or all of them (version 0), will not come about
    "refuse": {"version": is_u64, "why": is_text, "connection": is_u64},
    # source to target; a plan follows in parts
    "welcome": {
        "version": is_u64,
        "rank": is_u64,
        "origin": is_u64,  # tells this Sender from one of the same rank before it
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
