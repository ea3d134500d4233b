"""Arrivals: the requests of a PageReceiver, from their grant to their end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from jaxfabric._errors import FabricError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric.kv._layout import PageLayout
from jaxfabric.kv._life_cycle import Event, State
from jaxfabric.kv._pages import FreeList, ids_of
from jaxfabric.kv._pool import TAIL_HEADER, Pool
from jaxfabric.kv._receiving import Leg, Receiving
from jaxfabric.kv._shares import Shares
from jaxfabric.kv._waits import Waits

_LATE_COUNTS_S = 60.0
_UNWANTED_MAX = 4096


class Arrivals:
    """The part of a PageReceiver that counts what comes, and ends requests."""

    def __init__(
        self,
        engine: TransferEngine,
        layout: PageLayout,
        pool: Any,
        *,
        tail_bytes: int,
        tails: int,
    ) -> None:
        self.engine, self.layout = engine, layout
        self._waits = Waits(engine)
        self._memory = Pool(engine, layout, pool, "PageReceiver")
        self.pool = self._memory.array
        self._tail_bytes = tail_bytes
        self._tails = engine.alloc((tails, TAIL_HEADER.size + tail_bytes))
        self._lock = threading.RLock()
        self._pages = FreeList("pages", layout.pages)
        self._slots = FreeList("tails", tails)
        self._slots_of = Shares(tails)  # by sender, which may hang
        # Who waits for one, by peer and request; the first one waits longest.
        self._on_slot: dict[tuple[int, int], Callable[[], None]] = {}
        self._ids = ids_of(engine)
        self._requests: dict[int, Receiving] = {}
        self._legs: dict[tuple[int, int], Leg] = {}
        # Requests that the caller does not want any more, and why: of senders who
        # come late. One that lost its sender may still get another.
        self._unwanted: dict[int, str] = {}

    def _count(
        self, leg: Leg, id: int, transfers: int, then: Callable[[Any], None]
    ) -> Any:
        limit_s = leg.receiving.timeout_s + _LATE_COUNTS_S
        return self._waits.count(id, transfers, limit_s, then)

    def _tail_came(self, leg: Leg, error: FabricError | None) -> None:
        if error is not None:
            self._count_failed(leg, error)
            return
        with self._lock:
            leg.tail_counted = True
            if leg.quiet:
                return
        row = self._tails.array[leg.slot]
        request, transfers, nbytes = TAIL_HEADER.unpack_from(row)
        of = leg.receiving
        most = self.layout.layers * of.num_tokens, self._tail_bytes
        if request != of.request_id or transfers > most[0] or nbytes > most[1]:
            self._fail(
                of, FabricError(f"request {of.request_id}: its tail is malformed")
            )
            return
        leg.tail = row[TAIL_HEADER.size : TAIL_HEADER.size + nbytes].tobytes()
        try:
            with self._lock:
                leg.waits.append(
                    self._count(
                        *(leg, leg.ids, transfers),
                        lambda error: self._all_came(leg, error),
                    )
                )
        except FabricError as failure:
            self._count_failed(leg, failure)

    def _all_came(self, leg: Leg, error: FabricError | None) -> None:
        if error is not None:
            self._count_failed(leg, error)
            return
        leg.counted = True
        self._quieten([leg])

    def _count_failed(self, leg: Leg, error: FabricError) -> None:
        if not leg.quiet:  # else it was cancelled here
            self._fail(leg.receiving, error)

    # --- How it ends ---

    def _end(self, leg: Leg, well: bool, failed: list[int] | None, why: str) -> None:
        """The sender says that no write of this leg is under way any more."""
        leg.ended = True
        request = leg.receiving
        if not well:
            # Of several senders, each knows only what happened to its own heads.
            known = failed is not None and len(request._sources) == 1
            named = set(failed or ())
            pages = tuple(page for page in request.pages if page in named)
            error = FabricError(f"request {request.request_id}: {why}")
            self._fail(request, error, pages if known else None)
        if not well or request.state is State.DRAINING:
            self._quieten([leg])

    def _cancel(self, request: Receiving) -> bool:
        return self._fail(
            request,
            FabricError(f"request {request.request_id}: cancelled by the receiver"),
            unwanted=True,
        )

    def _expire(self, request: Receiving) -> None:
        self._fail(
            request,
            self._waits.out_of_time(
                f"expect: request {request.request_id}: {request._progress()}; look at "
                "the senders, or give a larger timeout_s",
            ),
            unwanted=True,
        )

    def _fail_soon(self, request: Receiving, error: FabricError) -> None:
        """Fails it on another thread, for callers that hold the lock."""
        with contextlib.suppress(FabricError):  # it was closed, which ends it too
            self._waits.after(0.0, lambda: self._fail(request, error))

    def _fail(
        self,
        request: Receiving,
        error: FabricError,
        failed: tuple[int, ...] | None = None,
        *,
        unwanted: bool = False,
    ) -> bool:
        """Ends it badly, if it has not ended. ``failed``: pages; ``None`` for all."""
        with self._lock:
            if request.state not in (State.WAITING, State.MOVING):
                return False
            was_waiting = request.state is State.WAITING
            request._advance(Event.FAIL)
            del self._requests[request.request_id]
            request._timer.cancel()
            request.failed_pages = request.pages if failed is None else failed
            if unwanted:
                self._unwanted[request.request_id] = str(error)
                if len(self._unwanted) > _UNWANTED_MAX:
                    del self._unwanted[next(iter(self._unwanted))]
            if was_waiting:
                self._pages.give(request.pages)
            for leg in request._legs.values():
                if not leg.quiet and not leg.ended:
                    self._refuse(leg.peer, leg.number, str(error))
            ended = [leg for leg in request._legs.values() if leg.ended]
        request._resolve(None, error)
        self._quieten(ended, request)
        return True

    def _release(self, request: Receiving) -> None:
        self._cancel(request)
        with self._lock:
            if request.state is State.COMPLETE:
                request._advance(Event.RELEASE)
                self._pages.give(request.pages)

    def _quieten(self, legs: list[Leg], *others: Receiving) -> None:
        """No write of these legs can land any more: what follows for requests."""
        complete = []
        with self._lock:
            for leg in legs:
                if leg.quiet:
                    continue
                leg.quiet = True
                del self._legs[leg.peer, leg.number]
                self._slots.give([leg.slot])
                self._slots_of.give([leg.peer], 1)
                if leg.written is not None or not leg.ended:
                    for wait in leg.waits:
                        wait.cancel()
                self._give_ids(leg)
            for request in {leg.receiving for leg in legs}.union(others):
                if request.state is State.MOVING:
                    parts = [request._legs.get(rank) for rank in request._sources]
                    if all(leg is not None and leg.counted for leg in parts):
                        request._advance(Event.ALL_HERE)
                        request.failed_pages = ()
                        del self._requests[request.request_id]
                        request._timer.cancel()
                        complete.append(request)
                elif request.state is State.DRAINING and all(
                    leg.quiet for leg in request._legs.values()
                ):
                    request._advance(Event.QUIET)
                    self._pages.give(request.pages)
            for waiting in list(self._on_slot):
                if self._has_slot(waiting[0]):
                    self._on_slot.pop(waiting)()
        for request in complete:
            request._resolve(None)

    def _has_slot(self, peer: int) -> bool:
        """Whether there is room for a tail of this sender. Needs the lock."""
        return self._slots.free > 0 and self._slots_of.has_room([peer], 1)

    def _give_ids(self, leg: Leg) -> None:
        """Gives them back, once all is counted that was written. Needs the lock."""
        if not leg.counted and leg.written is not None:
            transfers, tails = leg.written
            tails -= leg.tail_counted
            most = self.layout.layers * leg.receiving.num_tokens
            if transfers <= most and 0 <= tails <= 1:
                self._count_rest(leg.ids, [(leg.ids + 1, tails), (leg.ids, transfers)])
                return
        self._ids.give(leg.ids, clean=leg.counted)

    def _count_rest(self, ids: int, rest: list[tuple[int, int]]) -> None:
        """Counts what nobody waits for any more, so that nothing of it is left."""

        def counted(error: FabricError | None) -> None:
            if error is None:
                self._count_rest(ids, rest)
            else:
                self._ids_over(ids, clean=False)

        while rest:
            id, count = rest.pop()
            if count:
                try:
                    self._waits.count(id, count, _LATE_COUNTS_S, counted)
                except FabricError:
                    self._ids_over(ids, clean=False)
                return
        self._ids_over(ids, clean=True)

    def _ids_over(self, ids: int, *, clean: bool) -> None:
        with self._lock:
            self._ids.give(ids, clean=clean)

    def _refuse(self, peer: int, leg: int, why: str) -> None:
        self._waits.tell(peer, "cancel", leg=leg, why=why)
