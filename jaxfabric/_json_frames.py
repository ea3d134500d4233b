"""Messages between jobs: JSON, each field of which is checked before it is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxfabric._errors import FabricError

_TEXT_CHARS_MAX = 4096

Fields = Mapping[str, Callable[[Any], bool]]


def is_u64(value: Any) -> bool:
    """Whether it is an integer of 64 bits."""
    return type(value) is int and 0 <= value < 1 << 64


def is_text(value: Any) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


class JsonFrames:
    """The messages of one protocol.

    Args:
      owner: whose they are, such as ``"jf.kv"``.
      sides: who speaks it, for errors.
      kinds: for each kind of message, its fields and what they have to be.
    """

    def __init__(self, owner: str, sides: str, kinds: Mapping[str, Fields]) -> None:
        self._owner, self._sides, self._kinds = owner, sides, kinds

    def encode(self, kind: str, **fields: Any) -> bytes:
        """A message; reasons (``why``) are cut where they are long."""
        if "why" in fields:
            fields["why"] = fields["why"][:_TEXT_CHARS_MAX]
        return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode()

    def decode(self, data: bytes) -> tuple[str, dict[str, Any]]:
        """The kind of a message, and its fields.

        Raises:
          FabricError: it is none of these.
        """
        try:
            message = json.loads(data)
            kind = message.pop("kind")
            checks = self._kinds[kind]
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise FabricError(
                f"{self._owner}: a peer sent what is no message of {self._owner}; is "
                f"it a {self._sides} of this version?"
            ) from None
        if set(message) != set(checks) or not all(
            check(message[name]) for name, check in checks.items()
        ):
            raise FabricError(
                f"{self._owner}: a peer sent a malformed {kind!r} message"
            )
        return kind, message
