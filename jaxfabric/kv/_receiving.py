"""Receiving: one request whose pages a receiver expects."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Protocol

from jaxfabric.kv._life_cycle import Event, State, advance
from jaxfabric.kv._outcome import Outcome


class Owner(Protocol):
    """What a request needs of its PageReceiver."""

    def _cancel(self, request: Receiving) -> bool: ...

    def _release(self, request: Receiving) -> None: ...


class Receiving(Outcome):
    """A request that a PageReceiver expects; from `PageReceiver.expect`.

    It is done when all pages and the tail are here, or when it has failed. Pages of
    a request that failed are not the caller's: some may still be written.

    Attributes:
      request_id: as given to ``expect``.
      num_tokens: as given to ``expect``.
      pages: of the pool, in the order of the tokens.
      failed_pages: those that are not whole; the first of them decides from which
        token on the prompt has to be computed again.

    Example::

      with receiver.expect(request_id, num_tokens=100) as request:
          request.result()
          decode(receiver.pool[:, list(request.pages)], request.tail)
    """

    def __init__(
        self,
        owner: Owner,
        request_id: int,
        num_tokens: int,
        pages: tuple[int, ...],
        timeout_s: float,
    ) -> None:
        super().__init__(f"receive request {request_id}")
        self.request_id = request_id
        self.num_tokens = num_tokens
        self.pages = pages
        self.failed_pages: tuple[int, ...] = pages
        self.timeout_s = timeout_s
        self._owner = owner
        self._state = State.WAITING
        self._begin = time.monotonic()
        self._sources: tuple[int, ...] = ()  # tp_ranks, once the first has come
        self._source_tp_size = 0
        self._legs: dict[int, Leg] = {}  # by tp_rank
        self._timer: Any = None

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    @property
    def tail(self) -> bytes:
        """What the first of its senders gave to ``send_tail``; empty until done."""
        if not self._legs or self._state is not State.COMPLETE:
            return b""
        return self._legs[min(self._legs)].tail

    def cancel(self) -> bool:
        """Gives it up; ``False`` if it has ended. The senders are told."""
        return self._owner._cancel(self)

    def release(self) -> None:
        """Gives its pages back to the pool; may be called again.

        One that is still under way is cancelled, and its pages go back once no write
        can land in them any more.
        """
        self._owner._release(self)

    def __enter__(self) -> Receiving:
        return self

    def __exit__(self, *rest: object) -> None:
        self.release()

    def _advance(self, event: Event) -> None:
        self._state = advance(self._state, event)

    def _progress(self) -> str:
        """For messages: how long, and what has come."""
        come = [rank for rank, leg in self._legs.items() if leg.counted]
        if not self._sources:
            what = "no sender has begun"
        else:
            what = f"of senders with tp_rank {list(self._sources)}, {come} are done"
        return f"{what}, {time.monotonic() - self._begin:.1f} s into {self.timeout_s} s"


@dataclasses.dataclass(eq=False)
class Leg:
    """One sender's part in a request, as its receiver sees it."""

    peer: int
    number: int  # the sender's
    receiving: Receiving
    ids: int  # the first id counts writes, the second one the tail
    slot: int  # of the tail
    waits: list[Any] = dataclasses.field(default_factory=list)
    tail: bytes = b""
    tail_counted: bool = False
    counted: bool = False  # all of it is here
    ended: bool = False  # the sender says that no write of it is under way
    written: list[int] | None = None  # and so many transfers and tails came to an end
    quiet: bool = False  # no write can land any more
