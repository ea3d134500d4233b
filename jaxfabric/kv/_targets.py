"""Targets: the PageReceivers that a PageSender is connected to."""

from __future__ import annotations

import secrets
import time
from typing import Any

from jaxfabric._errors import (
    DeadlineError,
    FabricError,
    PeerLostError,
    PlanMismatchError,
)
from jaxfabric._net_addr import MrDesc, NetAddr
from jaxfabric.kv import _frames
from jaxfabric.kv._deliveries import Deliveries
from jaxfabric.kv._layout import PageLayout
from jaxfabric.kv._life_cycle import Event, State
from jaxfabric.kv._outcome import Outcome
from jaxfabric.kv._pages import IDS_END
from jaxfabric.kv._peer_process import this_process
from jaxfabric.kv._plan import check_bridge, plan_copies
from jaxfabric.kv._pool import TAIL_HEADER
from jaxfabric.kv._sending import Leg, Target

_PAUSE_S = 0.01  # then it is looked again whether writes have ended


class Targets(Deliveries):
    """The part of a PageSender that connects, and hears what receivers say."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._targets: dict[int, Target] = {}
        self._connecting: dict[int, list[Outcome]] = {}
        self._watched: set[int] = set()  # greeted, and not lost
        self._number = secrets.randbits(64)

    def connect(
        self, address: NetAddr | bytes, timeout_s: float | None = None
    ) -> Outcome:
        """Connects to a PageReceiver; the result is its number here, for `begin`.

        Raises (from the result):
          PlanMismatchError: the layouts cannot be bridged; it names both values.
          DeadlineError: no PageReceiver answered.

        Example::

          receiver = await sender.connect(address)
        """
        limit_s = self.engine.timeout_s if timeout_s is None else float(timeout_s)
        outcome = Outcome("connect to a PageReceiver")
        begin = time.monotonic()

        def connected(future: Any) -> None:
            error = future.exception(0)
            if error is None:
                left_s = max(0.0, limit_s - (time.monotonic() - begin))
                self._greet(future.result(0), outcome, left_s)
            else:
                outcome._resolve(None, error)

        self.engine.connect(address, limit_s).add_done_callback(connected)
        return outcome

    def _greet(self, peer: int, outcome: Outcome, left_s: float) -> None:
        try:
            self._greet_or_wait(peer, outcome, left_s)
        except FabricError as error:  # the engine was closed
            outcome._resolve(None, error)

    def _greet_or_wait(self, peer: int, outcome: Outcome, left_s: float) -> None:
        alive = self.engine.peers()
        with self._lock:
            closed, known = self._closed, peer in self._targets
            # Those who greet say that nothing of an earlier connection is under way.
            busy = any(
                leg.under_way and leg.target.peer not in alive
                for leg in self._legs.values()
            )
            if not closed and not known and not busy:
                if peer not in self._watched:
                    self._waits.watch(peer, lambda error: self._lost(peer, error))
                    self._watched.add(peer)
                self._connecting.setdefault(peer, []).append(outcome)
        if closed or known:
            outcome._resolve(peer, self._closed_error() if closed else None)
            return
        if busy and left_s <= 0:
            why = DeadlineError(
                "connect: writes to a receiver that was lost are still under way; "
                "connect again, or give a larger timeout_s"
            )
            outcome._resolve(None, why)
            return
        if busy:
            later = left_s - _PAUSE_S
            self._waits.after(_PAUSE_S, lambda: self._greet(peer, outcome, later))
            return
        why = DeadlineError(
            f"connect: no PageReceiver answered in time at peer {peer}; is it a "
            "PageReceiver's address?"
        )
        self._waits.after(left_s, lambda: self._unanswered(peer, outcome, why))
        self._waits.tell(
            peer,
            "hello",
            version=_frames.VERSION,
            sender=self._number,
            layout=self.layout.to_json(),
            process=this_process(),
        )

    def _unanswered(self, peer: int, outcome: Outcome, why: FabricError) -> None:
        with self._lock:
            waiting = self._connecting.get(peer, [])
            if outcome in waiting:
                waiting.remove(outcome)
                if not waiting:
                    del self._connecting[peer]
        outcome._resolve(None, why)

    def _welcome(self, peer: int, fields: dict[str, Any]) -> None:
        failure: FabricError | None = None
        try:
            layout = PageLayout.from_json(fields["layout"])
            check_bridge(self.layout, layout)
            pool, tails = (
                MrDesc.from_bytes(bytes.fromhex(fields[k])) for k in ("pool", "tails")
            )
            if pool.nbytes != layout.nbytes:
                raise FabricError(
                    f"the receiver's pool has {pool.nbytes} bytes, and its layout "
                    f"{layout.nbytes}"
                )
        except (FabricError, ValueError) as error:
            failure = PlanMismatchError(str(error))
        with self._lock:
            waiting = self._connecting.pop(peer, [])
            if failure is None and peer not in self._targets and not self._closed:
                room = fields["tail_bytes"]
                self._targets[peer] = Target(peer, layout, pool, tails, room)
        for outcome in waiting:
            outcome._resolve(peer, failure)

    def _closed_error(self) -> FabricError:
        return FabricError("connect: the PageSender was closed")

    def _end_connecting(self) -> None:
        with self._lock:
            waiting = [o for outcomes in self._connecting.values() for o in outcomes]
            self._connecting.clear()
        for outcome in waiting:
            outcome._resolve(None, self._closed_error())

    def _target(self, number: int) -> Target:
        target = self._targets.get(number)
        if target is None:
            raise PeerLostError(
                f"begin: there is no receiver {number} (any more): connect to it, or "
                "to its successor",
                (number,),
            )
        return target

    def _lost(self, peer: int, error: FabricError) -> None:
        with self._lock:
            self._targets.pop(peer, None)
            self._watched.discard(peer)
            greeted = self._connecting.pop(peer, [])
            requests = {
                leg.sending for leg in self._legs.values() if leg.target.peer == peer
            }
        for outcome in greeted:
            outcome._resolve(None, PeerLostError(f"connect: {error}", (peer,)))
        for request in requests:
            text = (
                f"send: request {request.request_id}: its receiver was lost: {error}; "
                f"{request._progress()}; connect to its successor, and begin it again"
            )
            self._fail(request, PeerLostError(text, (peer,)))

    # --- Messages, on a thread of the engine's ---

    def _on_message(self, peer: int, data: bytes) -> None:
        try:
            kind, fields = _frames.decode(data)
        except FabricError as error:
            kind, fields = "refuse", {"why": str(error)}
        if kind == "hello":
            self._waits.tell(
                peer, "refuse", why="the peer is a PageSender, not a PageReceiver"
            )
        elif kind == "welcome":
            self._welcome(peer, fields)
        elif kind == "refuse":
            with self._lock:
                waiting = self._connecting.pop(peer, [])
            for outcome in waiting:
                outcome._resolve(None, PlanMismatchError(fields["why"]))
        elif kind in ("grant", "cancel"):
            with self._lock:
                leg = self._legs.get(fields["leg"])
            if leg is None or leg.target.peer != peer:
                return
            if kind == "grant":
                self._granted(leg, fields)
            else:
                self._fail(
                    leg.sending, FabricError(f"the receiver says: {fields['why']}")
                )

    def _granted(self, leg: Leg, fields: dict[str, Any]) -> None:
        layout, tokens = leg.target.layout, leg.sending.num_tokens
        target, id, slot = leg.target, fields["id"], fields["slot"]
        try:
            plan_copies(
                self.layout, layout, (), leg.sending.pages, fields["pages"], tokens
            )
            tail_bytes = TAIL_HEADER.size + target.tail_bytes
            if id + 1 >= IDS_END or (slot + 1) * tail_bytes > target.tails.nbytes:
                raise ValueError(f"id {id}, slot {slot}")
        except ValueError as error:
            self._fail(leg.sending, FabricError(f"a malformed grant: {error}"))
            return
        with self._lock:
            if leg.state is not State.WAITING:
                return
            leg.advance(Event.GRANTED)
            leg.pages = tuple(fields["pages"])
            leg.id, leg.slot = id, slot
            self._make_ready(leg, *leg.pieces)
            leg.pieces.clear()
        self._pump()
