"""The messages of jf.kv: JSON, each field of which is checked before it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxfabric._json_frames import JsonFrames, is_text, is_u64

VERSION = 3


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(is_u64(item) for item in value)


def _is_numbers_or_null(value: Any) -> bool:
    return value is None or _is_numbers(value)


def _is_pair_or_null(value: Any) -> bool:
    return value is None or (_is_numbers(value) and len(value) == 2)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


# A leg is one sender's part in one request; the sender numbers them.
_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    # sender to receiver
    "hello": {
        "version": is_u64,
        "sender": is_u64,  # the same whenever it connects
        "layout": _is_object,
        "process": _is_object,
    },
    "open": {"leg": is_u64, "request": is_u64, "tokens": is_u64},
    "end": {
        "leg": is_u64,
        "well": _is_flag,
        "failed": _is_numbers_or_null,  # pages; null where all are
        "written": _is_pair_or_null,  # transfers, tails; null: nobody knows
        "why": is_text,
    },
    "bye": {},
    # receiver to sender
    "welcome": {
        "layout": _is_object,
        "pool": is_text,
        "tails": is_text,
        "tail_bytes": is_u64,
    },
    "refuse": {"why": is_text},
    "grant": {"leg": is_u64, "pages": _is_numbers, "id": is_u64, "slot": is_u64},
    "cancel": {"leg": is_u64, "why": is_text},
}


_FRAMES = JsonFrames("jf.kv", "PageSender or PageReceiver", _FIELDS)
encode, decode = _FRAMES.encode, _FRAMES.decode
