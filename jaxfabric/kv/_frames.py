"""The messages of jf.kv: JSON, each field of which is checked before it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jaxfabric._errors import FabricError

VERSION = 2
_TEXT_CHARS_MAX = 4096


def _is_u64(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_u64(item) for item in value)


def _is_numbers_or_null(value: Any) -> bool:
    return value is None or _is_numbers(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


# A leg is one sender's part in one request; the sender numbers them.
_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    # sender to receiver
    "hello": {
        "version": _is_u64,
        "sender": _is_u64,  # the same whenever it connects
        "layout": _is_object,
        "process": _is_object,
    },
    "open": {"leg": _is_u64, "request": _is_u64, "tokens": _is_u64},
    "end": {
        "leg": _is_u64,
        "well": _is_flag,
        "failed": _is_numbers_or_null,  # pages; null where all are
        "why": _is_text,
    },
    "bye": {},
    # receiver to sender
    "welcome": {
        "layout": _is_object,
        "pool": _is_text,
        "tails": _is_text,
        "tail_bytes": _is_u64,
    },
    "refuse": {"why": _is_text},
    "grant": {"leg": _is_u64, "pages": _is_numbers, "id": _is_u64, "slot": _is_u64},
    "cancel": {"leg": _is_u64, "why": _is_text},
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
            "jf.kv: a peer sent what is no message of jf.kv; is it a PageSender or "
            "PageReceiver of this version?"
        ) from None
    if set(message) != set(checks) or not all(
        check(message[name]) for name, check in checks.items()
    ):
        raise FabricError(f"jf.kv: a peer sent a malformed {kind!r} message")
    return kind, message
