"""Prompt: what a client asks for, checked; RequestError: why it does not get it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxfabric.kv.serve._messages import PROMPT_TOKENS_MAX, is_tokens

_OPTIONS_MAX = 16

# By reason: the status of an answer that has not begun.
STATUS = {
    "bad_request": 400,
    "full": 429,
    "failed": 502,
    "jobs_lost": 502,
    "no_jobs": 503,
    "deadline": 504,
}


class RequestError(Exception):
    """A request gets no answer, or not all of it.

    Attributes:
      reason: ``"bad_request"``, ``"full"`` (too many wait), ``"no_jobs"`` (none of a
        role is here), ``"jobs_lost"`` (each that tried was lost), ``"failed"`` (a job
        refuses it) or ``"deadline"``.
      status: of HTTP.
      retry_after_s: when it may be worth another try; ``None``: it is not.
    """

    def __init__(
        self, reason: str, message: str, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = STATUS[reason]
        self.retry_after_s = retry_after_s


class Text(Protocol):
    """Turns text into tokens and back."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""


class ByteText:
    """A token is a byte of UTF-8.

    Example::

      ByteText().encode("a b")     # [97, 32, 98]
    """

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; what is no UTF-8 becomes U+FFFD."""
        return bytes(token & 0xFF for token in tokens).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and what is to be made of it.

    Attributes:
      tokens: of the prompt.
      max_tokens: how many to make.
      timeout_s: for all of it; ``None`` is the router's.
      options: for the jobs, which the router hands on; up to 16 entries of short
        names and values.

    Raises:
      RequestError: something is not as it has to be (``"bad_request"``).

    Example::

      Prompt(tokens=[84, 104, 101], max_tokens=16)
    """

    tokens: list[int]
    max_tokens: int = 16
    timeout_s: float | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        def wants(right: bool, what: str) -> None:
            if not right:
                raise RequestError("bad_request", what)

        wants(is_tokens(self.tokens), "tokens: a list of numbers, at least one")
        most = PROMPT_TOKENS_MAX - len(self.tokens)
        wants(
            type(self.max_tokens) is int and 0 < self.max_tokens <= most,
            f"max_tokens={self.max_tokens!r}: a number, at least 1, and with the "
            f"prompt's {len(self.tokens)} tokens at most {PROMPT_TOKENS_MAX}",
        )
        limit = self.timeout_s
        wants(
            limit is None or (type(limit) in (int, float) and 0 < limit < 10**6),
            f"timeout_s={limit!r}: seconds, above 0 and below 10**6",
        )
        options = self.options
        wants(
            isinstance(options, dict)
            and len(options) <= _OPTIONS_MAX
            and all(
                isinstance(name, str)
                and len(name) <= 64
                and (
                    isinstance(value, bool | float)
                    or (isinstance(value, int) and abs(value) < 1 << 64)
                    or (isinstance(value, str) and len(value) <= 1024)
                )
                for name, value in options.items()
            ),
            "options: up to 16 short names with numbers or short strings",
        )

    @classmethod
    def from_json(cls, value: Any, text: Text) -> Prompt:
        """Reads a client's: ``prompt`` (text) or ``tokens``, and the other fields."""
        if not isinstance(value, Mapping):
            raise RequestError("bad_request", "the body is a JSON object")
        fields = dict(value)
        prompt = fields.pop("prompt", None)
        if (prompt is None) == ("tokens" not in fields):
            raise RequestError("bad_request", "give either a prompt or tokens")
        if prompt is not None:
            if not isinstance(prompt, str):
                raise RequestError("bad_request", "prompt: a string")
            try:
                fields["tokens"] = text.encode(prompt)
            except ValueError as error:
                raise RequestError("bad_request", f"prompt: {error}") from None
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(fields) - known:
            raise RequestError(
                "bad_request", f"unknown: {', '.join(sorted(unknown))[:256]}"
            )
        return cls(**fields)
