"""The messages of jf.weights: JSON, or parts of what is too long for one message."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from jaxfabric._errors import FabricError

VERSION = 1
_PART_BYTES = 1 << 19
_WHOLE_BYTES_MAX = 1 << 28
_TEXT_CHARS_MAX = 4096
_PART = b"\x00"  # no JSON begins so


def _is_u64(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    # target to source; a layout follows in parts
    "hello": {
        "version": _is_u64,
        "rank": _is_u64,
        "name": _is_text,
        "nbytes": _is_u64,
    },
    "ready": {"slots": _is_u64, "id": _is_u64, "memory": _is_text},
    "go": {"version": _is_u64},
    "took": {"slot": _is_u64},
    "spoilt": {"slot": _is_u64},
    "have": {"version": _is_u64, "verify_us": _is_u64, "unpack_us": _is_u64},
    # either way: a version, or all of them (version 0), will not come about
    "refuse": {"version": _is_u64, "why": _is_text},
    # source to target; a plan follows in parts
    "welcome": {
        "version": _is_u64,
        "rank": _is_u64,
        "origin": _is_u64,  # tells this Sender from one of the same rank before it
        "nbytes": _is_u64,
    },
    "joined": {},
    "begin": {"version": _is_u64},
    # between the ranks of a target
    "join": {"rank": _is_u64},
    "newest": {"version": _is_u64, "origin": _is_u64, "number": _is_u64},
    "want": {"version": _is_u64, "number": _is_u64},
    "use": {"version": _is_u64, "number": _is_u64},
}


def encode(kind: str, **fields: Any) -> bytes:
    """A message; reasons are cut where they are long."""
    if "why" in fields:
        fields["why"] = fields["why"][:_TEXT_CHARS_MAX]
    return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode()


def decode(data: bytes) -> tuple[str, dict[str, Any]]:
    """The kind of a message, and its fields.

    Raises:
      FabricError: it is none of ours.
    """
    try:
        message = json.loads(data)
        kind = message.pop("kind")
        checks = _FIELDS[kind]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise FabricError(
            "jf.weights: a peer sent what is no message of jf.weights; is it a Sender "
            "or Receiver of this version?"
        ) from None
    if set(message) != set(checks) or not all(
        check(message[name]) for name, check in checks.items()
    ):
        raise FabricError(f"jf.weights: a peer sent a malformed {kind!r} message")
    return kind, message


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
