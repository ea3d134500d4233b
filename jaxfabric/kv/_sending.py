"""Sending: one request whose pages a sender writes, to one or several receivers."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Protocol

from jaxfabric._errors import FabricError
from jaxfabric._net_addr import MrDesc
from jaxfabric.kv._layout import PageLayout
from jaxfabric.kv._life_cycle import Event, State, advance
from jaxfabric.kv._outcome import Outcome


class Owner(Protocol):
    """What a request needs of its PageSender."""

    def send(
        self, request_id: int, layer: int, tokens: tuple[int, int] | None = None
    ) -> None:
        """See `PageSender.send`."""

    def send_tail(self, request_id: int, data: bytes = b"") -> None:
        """See `PageSender.send_tail`."""

    def _cancel(self, request: Sending) -> bool: ...


@dataclasses.dataclass(eq=False)
class Target:
    """A PageReceiver that has welcomed this sender."""

    peer: int
    layout: PageLayout
    pool: MrDesc
    tails: MrDesc
    tail_bytes: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """One write: some layers of some tokens; no layers for the tail."""

    layers: tuple[int, ...]
    first: int
    last: int
    nbytes: int


@dataclasses.dataclass(eq=False)
class Leg:
    """The part of a request that goes to one receiver."""

    target: Target
    number: int  # never used twice by this sender
    sending: Sending
    state: State = State.WAITING
    asked: bool = False  # the receiver has heard of it
    pages: tuple[int, ...] = ()  # of the receiver, once granted
    id: int = 0
    slot: int = 0
    pieces: list[Piece] = dataclasses.field(default_factory=list)  # not posted yet
    posted: list[Any] = dataclasses.field(default_factory=list)  # futures
    under_way: int = 0
    spoilt: bool = False  # a write ended badly: nobody knows what of it has landed
    done: list[Piece] = dataclasses.field(default_factory=list)

    def advance(self, event: Event) -> None:
        """Moves on in its life."""
        self.state = advance(self.state, event)

    def failed_pages(self) -> list[int]:
        """The receiver's pages of which something was not written."""
        size = self.target.layout.page_tokens
        written: dict[int, int] = {}  # tokens, over all layers, by place in pages
        for piece in self.done:
            for place in range(piece.first // size, -(-piece.last // size)):
                first = max(piece.first, place * size)
                last = min(piece.last, (place + 1) * size)
                more = (last - first) * len(piece.layers)
                written[place] = written.get(place, 0) + more
        whole = self.target.layout.layers
        failed = []
        for place, page in enumerate(self.pages):
            tokens = min(size, self.sending.num_tokens - place * size)
            if written.get(place, 0) < tokens * whole:
                failed.append(page)
        return failed


class Sending(Outcome):
    """A request that a PageSender sends; from `PageSender.begin`.

    It is done once no NIC reads its pages any more: all was written, or it failed.
    Until then its pages must stay as they are.

    Attributes:
      request_id: as given to ``begin``.
      num_tokens: as given to ``begin``.
      pages: of the sender's pool.

    Example::

      request = sender.begin(7, receiver, pages=[0, 1], num_tokens=100)
      for layer in range(layout.layers):
          compute(layer)
          request.send(layer)
      request.send_tail(hidden.tobytes())
      request.result()
    """

    def __init__(
        self,
        owner: Owner,
        request_id: int,
        num_tokens: int,
        pages: tuple[int, ...],
        timeout_s: float,
    ) -> None:
        super().__init__(f"send request {request_id}")
        self.request_id = request_id
        self.num_tokens = num_tokens
        self.pages = pages
        self.timeout_s = timeout_s
        self._owner = owner
        self._legs: list[Leg] = []
        self._peers: tuple[int, ...] = ()  # where they go
        self._sent: dict[int, list[tuple[int, int]]] = {}  # ranges, by layer
        self._transfers = 0
        self._slot: int | None = None
        self._tail: bytes | None = None
        self._timer: Any = None
        self._failure: FabricError | None = None
        self._failed_write = False  # what failed was a write
        self._begin = time.monotonic()

    def send(self, layer: int, tokens: tuple[int, int] | None = None) -> None:
        """The same as `PageSender.send`."""
        self._check()
        self._owner.send(self.request_id, layer, tokens)

    def send_tail(self, data: bytes = b"") -> None:
        """The same as `PageSender.send_tail`."""
        self._check()
        self._owner.send_tail(self.request_id, data)

    def cancel(self) -> bool:
        """Gives it up; ``False`` if it has ended. The receivers are told."""
        return self._owner._cancel(self)

    def _check(self) -> None:
        if self._failure is not None:  # its id may be another request's by now
            raise self._failure

    def _progress(self) -> str:
        """For messages: how long, and what was written."""
        state = ", ".join(
            f"receiver {leg.target.peer} {leg.state.value}, {len(leg.done)} writes done"
            for leg in self._legs
        )
        return (
            f"{state}, {time.monotonic() - self._begin:.1f} s into {self.timeout_s} s"
        )

    def _add(self, layer: int, first: int, last: int) -> None:
        """Notes that these tokens of a layer are sent; each once."""
        ranges = self._sent.setdefault(layer, [])
        for begin, end in ranges:
            if first < end and begin < last:
                raise FabricError(
                    f"send: request {self.request_id}: layer {layer}, tokens {first} "
                    f"to {last}: tokens {begin} to {end} of it were sent already"
                )
        ranges.append((first, last))

    def _missing(self, layers: int) -> list[int]:
        """Layers of which not all tokens were sent."""
        return [
            layer
            for layer in range(layers)
            if sum(b - a for a, b in self._sent.get(layer, ())) < self.num_tokens
        ]
