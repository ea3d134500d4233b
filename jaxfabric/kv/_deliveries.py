"""Deliveries: the requests of a PageSender, from their turn to their end."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from jaxfabric._errors import FabricError, PeerLostError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric.kv._layout import PageLayout
from jaxfabric.kv._life_cycle import Event, State
from jaxfabric.kv._pages import FreeList
from jaxfabric.kv._plan import plan_copies
from jaxfabric.kv._pool import TAIL_HEADER, Pool
from jaxfabric.kv._sending import Leg, Piece, Sending
from jaxfabric.kv._shares import Shares
from jaxfabric.kv._waits import Waits

_OVER = (State.COMPLETE, State.RELEASED)


class Deliveries:
    """The part of a PageSender that takes requests in turn, posts, and ends them."""

    def __init__(
        self,
        engine: TransferEngine,
        layout: PageLayout,
        pool: Any,
        *,
        requests: int,
        waiting: int,
        bytes_max: int,
        tail_bytes: int,
    ) -> None:
        self.engine, self.layout = engine, layout
        self._waits = Waits(engine)
        self._memory = Pool(engine, layout, pool, "PageSender")
        self.pool = self._memory.array
        self._tails = engine.alloc((requests, TAIL_HEADER.size + tail_bytes))
        self._lock = threading.RLock()
        self._slots = FreeList("tails", requests)
        self._requests: dict[int, Sending] = {}
        self._legs: dict[int, Leg] = {}
        self._waiting: deque[Sending] = deque()
        # Granted and not posted, by peer: the first one is the next one's turn.
        self._ready: dict[int, deque[tuple[Leg, Piece]]] = {}
        # None of these goes to one receiver alone, which may hang.
        self._places = Shares(requests)  # requests that have a slot
        self._queued = Shares(waiting)  # those that wait for one
        self._bytes = Shares(bytes_max)  # under way
        self._closed = False

    # --- What is sent, and when ---

    def _admit(self) -> None:
        """Asks the receivers of those whose turn has come. Needs the lock."""
        full: set[int] = set()
        for request in list(self._waiting):
            if not self._slots.free:
                return
            peers = request._peers
            if not full.isdisjoint(peers) or not self._places.has_room(peers, 1):
                full.update(p for p in peers if not self._places.has_room([p], 1))
                continue
            self._waiting.remove(request)
            self._queued.give(peers, 1)
            self._places.take(peers, 1)
            (request._slot,) = self._slots.take(1)
            self._fill_tail(request)
            for leg in request._legs:
                self._ask(leg)

    def _ask(self, leg: Leg) -> None:
        leg.asked = True
        self._waits.tell(
            *(leg.target.peer, "open"),
            leg=leg.number,
            request=leg.sending.request_id,
            tokens=leg.sending.num_tokens,
        )

    def _piece(self, layers: tuple[int, ...], first: int, last: int) -> Piece:
        token_bytes = self.layout.nbytes // (
            self.layout.layers * self.layout.pages * self.layout.page_tokens
        )
        return Piece(layers, first, last, len(layers) * (last - first) * token_bytes)

    def _queue(self, request: Sending, piece: Piece) -> None:
        if piece.layers:
            request._transfers += 1
        for leg in request._legs:
            if leg.state is State.MOVING:
                self._make_ready(leg, piece)
            elif leg.state is State.WAITING:
                leg.pieces.append(piece)

    def _make_ready(self, leg: Leg, *pieces: Piece) -> None:
        """It is posted as soon as there is room. Needs the lock."""
        queue = self._ready.setdefault(leg.target.peer, deque())
        queue.extend((leg, piece) for piece in pieces)

    def _next_ready(self) -> tuple[Leg, Piece] | None:
        """Takes what is to be posted next, if there is room. Needs the lock."""
        for peer, queue in self._ready.items():
            if queue and self._bytes.has_room([peer], queue[0][1].nbytes):
                leg, piece = queue.popleft()
                del self._ready[peer]
                if queue:  # the others have their turn first
                    self._ready[peer] = queue
                leg.under_way += 1
                self._bytes.take([peer], piece.nbytes)
                return leg, piece
        return None

    def _pump(self) -> None:
        """Posts what there is room for. Copies may run here: never under the lock."""
        while True:
            with self._lock:
                ready = self._next_ready()
            if ready is None:
                return  # until a write has ended
            leg, piece = ready
            try:
                future = self._post(leg, piece)
            except FabricError as error:
                self._written(leg, piece, error)
                continue
            except Exception as error:  # whatever it is, nothing is under way
                self._written(leg, piece, FabricError(f"{error}"))
                continue
            with self._lock:
                leg.posted.append(future)
                give_up = leg.state is not State.MOVING
            if give_up:
                future.cancel()
            future.add_done_callback(
                lambda done, leg=leg, piece=piece: self._written(
                    leg, piece, done.exception(0)
                )
            )

    def _post(self, leg: Leg, piece: Piece) -> Any:
        request, target = leg.sending, leg.target
        if not piece.layers:
            return self._post_tail(leg, piece.nbytes)
        copies = plan_copies(
            self.layout,
            target.layout,
            piece.layers,
            request.pages,
            leg.pages,
            request.num_tokens,
            (piece.first, piece.last),
        )
        return self.engine.submit_paged_writes(
            self._memory.region,
            copies.source,
            target.pool,
            copies.target,
            copies.nbytes,
            leg.id,
            source_stride=1,
            target_stride=1,
            timeout_s=request.timeout_s,
        )

    def _fill_tail(self, request: Sending) -> None:
        """Copies it to where it is sent from, once both are there. Needs the lock."""
        if request._slot is not None and request._tail is not None:
            row = self._tails.array[request._slot]
            row[: len(request._tail)] = memoryview(request._tail)

    def _post_tail(self, leg: Leg, nbytes: int) -> Any:
        return self.engine.submit_single_write(
            self._tails.array[leg.sending._slot][:nbytes],
            leg.target.tails,
            leg.id + 1,
            target_offset=leg.slot * (TAIL_HEADER.size + leg.target.tail_bytes),
            timeout_s=leg.sending.timeout_s,
        )

    def _written(self, leg: Leg, piece: Piece, error: FabricError | None) -> None:
        with self._lock:
            leg.under_way -= 1
            self._bytes.give([leg.target.peer], piece.nbytes)
            if error is None:
                leg.done.append(piece)
            else:
                leg.spoilt = True
        if error is not None:
            self._fail_write(leg.sending, error)
        self._settle(leg.sending)
        self._pump()

    # --- How it ends ---

    def _cancel(self, request: Sending) -> bool:
        return self._fail(
            request,
            FabricError(f"request {request.request_id}: cancelled by the sender"),
        )

    def _expire(self, request: Sending) -> None:
        self._fail(
            request,
            self._waits.out_of_time(
                f"send: request {request.request_id}: {request._progress()}; does the "
                "receiver expect it?",
            ),
        )

    def _fail_request(self, request_id: int, error: FabricError) -> bool:
        with self._lock:
            request = self._requests.get(request_id)
        return request is not None and self._fail(request, error)

    def _fail_write(self, request: Sending, error: FabricError) -> None:
        """The loss of a peer is why its other writes were refused, before or after."""
        with self._lock:
            if request._failed_write and isinstance(error, PeerLostError):
                request._failure = error
            if request._failure is None:
                request._failed_write = True
        self._fail(request, error)

    def _fail(self, request: Sending, error: FabricError) -> bool:
        """Gives up all that is not over; what is under way still has to end."""
        cancelled = []
        with self._lock:
            if request._failure is not None or request.done():
                return False
            if all(leg.state in _OVER for leg in request._legs):
                return False
            request._failure = error
            for leg in request._legs:
                if leg.state in (State.WAITING, State.MOVING):
                    leg.advance(Event.FAIL)
                    leg.pieces.clear()
                    cancelled += leg.posted
                queue = self._ready.pop(leg.target.peer, ())
                if kept := deque(each for each in queue if each[0] is not leg):
                    self._ready[leg.target.peer] = kept
        for future in cancelled:
            future.cancel()
        self._settle(request)
        return True

    def _settle(self, request: Sending) -> None:
        """Ends the legs of which nothing is under way, and the request with them."""
        with self._lock:
            for leg in request._legs:
                if leg.number not in self._legs or leg.under_way:
                    continue
                well = len(leg.done) == request._transfers + 1
                if leg.state is State.MOVING and well and request._tail is not None:
                    leg.advance(Event.ALL_HERE)
                elif leg.state is State.DRAINING:
                    leg.advance(Event.QUIET)
                elif leg.state is not State.RELEASED:
                    continue
                self._end(leg)
            if request.done() or any(leg.number in self._legs for leg in request._legs):
                return
            if self._requests.get(request.request_id) is not request:
                return  # another thread has done it
            del self._requests[request.request_id]
            request._timer.cancel()
            if request._slot is None:
                self._waiting.remove(request)
                self._queued.give(request._peers, 1)
            else:
                self._slots.give([request._slot])
                self._places.give(request._peers, 1)
            self._admit()
        request._resolve(None, request._failure)

    def _end(self, leg: Leg) -> None:
        """Tells the receiver that nothing of a leg is under way. Needs the lock."""
        del self._legs[leg.number]
        if not leg.asked:  # it never had its turn, and the receiver waits for it
            self._ask(leg)
        well = leg.state is State.COMPLETE
        if well:
            leg.advance(Event.RELEASE)
        layers = sum(1 for piece in leg.done if piece.layers)
        self._waits.tell(
            *(leg.target.peer, "end"),
            leg=leg.number,
            well=well,
            failed=leg.failed_pages() if leg.pages else None,
            written=None if leg.spoilt else [layers, len(leg.done) - layers],
            why="" if well else str(leg.sending._failure),
        )
