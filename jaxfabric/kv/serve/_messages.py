"""What the router and jobs say to each other: JSON texts, each field checked.

| message | from | says |
| --- | --- | --- |
| hello | job | version, who and where it is, capacity, an address for each rank |
| welcome | router | the job is in |
| refused | router | it is not: why, and for how long it is worth another try |
| expect | router | decode job: tokens of the prompt and how many to make, until when |
| prefill | router | prefill job: the same, and the decode job's addresses |
| cancel | router | a request is over for this job |
| sent | prefill job | all pages have left, and may be used again |
| tokens | job | new tokens of requests |
| finished | job | a request has all of its tokens, and why it ended |
| failed | job | a request, why, and whether another job may try it |
| state | job | its addresses, as they are now, and numbers about it |
| leaving | job | no new requests, please |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

VERSION = 2
MESSAGE_BYTES_MAX = 1 << 22  # a prompt of PROMPT_TOKENS_MAX tokens, as JSON
PROMPT_TOKENS_MAX = 1 << 18
_TEXT_CHARS_MAX = 1024
_ADDRESS_CHARS_MAX = 1 << 14
_RANKS_MAX = 1024
_ITEMS_MAX = 1 << 14
_TOKEN_MAX = 1 << 31
_NUMBERS_MAX = 32
_NAME = re.compile("[a-z_]{1,32}")

ROLES = ("prefill", "decode")


class MessageError(ValueError):
    """Somebody sent what is no message."""


def _natural(limit: int, least: int = 0) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < limit


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _TEXT_CHARS_MAX


def _addresses(value: Any) -> bool:
    def is_address(entry: Any) -> bool:
        if not isinstance(entry, str) or not 0 < len(entry) <= _ADDRESS_CHARS_MAX:
            return False
        try:
            return bool(bytes.fromhex(entry))
        except ValueError:
            return False

    return (
        isinstance(value, list)
        and len(value) <= _RANKS_MAX
        and all(map(is_address, value))
    )


def is_tokens(value: Any, count_max: int = PROMPT_TOKENS_MAX) -> bool:
    """Whether it is a list of numbers of tokens, at least one."""
    token = _natural(_TOKEN_MAX)
    return (
        isinstance(value, list)
        and 0 < len(value) <= count_max
        and all(map(token, value))
    )


def _items(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _ITEMS_MAX
        and all(
            isinstance(item, list)
            and len(item) == 2
            and _id(item[0])
            and is_tokens(item[1])
            for item in value
        )
    )


def _seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e6


def _seconds_or_0(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e6


def _numbers(value: Any) -> bool:
    number = _natural(1 << 63)
    return (
        isinstance(value, dict)
        and len(value) <= _NUMBERS_MAX
        and all(_NAME.fullmatch(name) and number(n) for name, n in value.items())
    )


_id = _natural(1 << 64)
_REQUEST = {
    "request": _id,
    "tokens": is_tokens,
    "max_tokens": _natural(PROMPT_TOKENS_MAX, 1),
    "timeout_s": _seconds,
    "options": lambda value: isinstance(value, dict),
}
_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "hello": {
        "version": _natural(1 << 31),
        "role": lambda value: value in ROLES,
        "name": lambda value: _text(value) and bool(value),
        "capacity": _natural(1 << 16, 1),
        "addresses": _addresses,
        "instance": _id,
        "where": _text,
    },
    "welcome": {},
    "refused": {"why": _text, "again_s": _seconds_or_0},
    "expect": _REQUEST,
    "prefill": {**_REQUEST, "addresses": _addresses},
    "cancel": {"request": _id},
    "sent": {"request": _id},
    "tokens": {"items": _items},
    "finished": {"request": _id, "why": _text},
    "failed": {
        "request": _id,
        "why": _text,
        "again": lambda value: isinstance(value, bool),
    },
    "state": {"addresses": _addresses, "numbers": _numbers},
    "leaving": {},
}
OF_ROUTER = ("welcome", "refused", "expect", "prefill", "cancel")
OF_JOB = ("sent", "tokens", "finished", "failed", "state", "leaving")


def encode(kind: str, fields: Mapping[str, Any]) -> str:
    """A message as text; its own side's mistakes are found here.

    Raises:
      MessageError: a field is missing, wrong, or too large.
    """
    if isinstance(fields.get("why"), str):
        fields = {**fields, "why": fields["why"][:_TEXT_CHARS_MAX]}
    _check(kind, fields)
    return json.dumps({"kind": kind, **fields}, separators=(",", ":"))


def decode(text: Any, kinds: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """The kind of a message and its fields.

    Raises:
      MessageError: it is none of these kinds, or a field is not as it has to be.
    """
    if not isinstance(text, str) or len(text) > MESSAGE_BYTES_MAX:
        raise MessageError("a message is a JSON text of bounded length")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise MessageError("a message is no JSON") from None
    if not isinstance(value, dict) or value.get("kind") not in kinds:
        raise MessageError(f"a message is none of {', '.join(kinds)}")
    kind = value.pop("kind")
    _check(kind, value)
    return kind, value


def _check(kind: str, fields: Mapping[str, Any]) -> None:
    checks = _FIELDS[kind]
    if kind == "hello" and fields.get("version") != VERSION:
        raise MessageError(
            f"hello: version {str(fields.get('version'))[:16]}, the router has "
            f"{VERSION}: run the same jaxfabric on both sides"
        )
    if set(fields) != set(checks):
        raise MessageError(f"{kind}: has {sorted(fields)}, wants {sorted(checks)}")
    for name, check in checks.items():
        if not check(fields[name]):
            raise MessageError(f"{kind}: {name} is not as it has to be")
