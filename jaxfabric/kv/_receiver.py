"""PageReceiver: a pool of pages that other jobs write requests into."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxfabric._errors import FabricError, PeerLostError, PlanMismatchError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric.kv import _frames
from jaxfabric.kv._arrivals import Arrivals
from jaxfabric.kv._layout import PageLayout
from jaxfabric.kv._life_cycle import Event, State
from jaxfabric.kv._peer_process import PeerProcess
from jaxfabric.kv._plan import check_bridge, source_ranks
from jaxfabric.kv._receiving import Leg, Receiving
from jaxfabric.kv._strays import Strays
from jaxfabric.kv._waits import is_u64

_PARKED_MAX = 4096  # asked for by one peer, and not expected yet


@dataclasses.dataclass
class _Sender:
    """A PageSender that has said hello."""

    number: int  # as it calls itself, however often it connects
    layout: PageLayout
    process: PeerProcess
    # Asked for, and not expected yet or without room for a tail: leg, tokens.
    parked: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)


class PageReceiver(Arrivals):
    """Owns a pool of KV pages, and takes requests into it that PageSenders send.

    Requests are told apart by ids of 64 bits that both jobs agree upon. A request's
    pages are chosen by `expect`, and written when a sender begins it, in whatever
    order that happens. A sender with another tensor-parallel degree or page size is
    welcome; where several senders hold the heads of this layout, all must send.

    Pages never go to another request while a write may still land in them: after a
    cancel, a deadline or the loss of a sender they wait until the sender has said
    that it is done with them. One that was lost says nothing: it is cut off from this
    host (over a network), or its process has ended (over ``"shm"``). Where neither can
    be had, as over libfabric 1, its pages stay out of use, and `stats` counts them.

    Args:
      engine: a TransferEngine of this receiver's own: it takes all its messages, and
        ids from 2**26 on.
      layout: of the pool.
      pool: registered memory of the layout's size, or a NumPy array to be registered
        (not over ``"shm"``); ``None`` makes one.
      tail_bytes: room for what comes with `PageSender.send_tail`.
      tails: how many tails there is room for, one for each sender of a request that
        is under way. A sender gets three quarters of what others leave.

    Attributes:
      pool: NumPy array of ``layout.shape`` and ``layout.dtype``.

    Raises:
      ValueError: the pool does not fit the layout.

    Example::

      engine = jf.TransferEngine(job="serving", token=token)
      receiver = jf.kv.PageReceiver(engine, layout)
      publish(engine.address().to_bytes())
      with receiver.expect(request_id=7, num_tokens=100, timeout_s=5) as request:
          request.result()
          decode(receiver.pool[:, list(request.pages)], request.tail)
    """

    def __init__(
        self,
        engine: TransferEngine,
        layout: PageLayout,
        *,
        pool: Any = None,
        tail_bytes: int = 1 << 15,
        tails: int = 256,
    ) -> None:
        super().__init__(engine, layout, pool, tail_bytes=tail_bytes, tails=tails)
        self._descs = (self._memory.region.desc, self._tails.desc)
        self._senders: dict[int, _Sender] = {}
        self._strays = Strays(self._waits, engine.transport != "shm", self._quieten)
        self._closed = False
        self._waits.listen(self._on_message)

    # --- For the caller ---

    def expect(
        self, request_id: int, num_tokens: int, timeout_s: float | None = None
    ) -> Receiving:
        """Takes pages for a request, and lets its sender write them.

        Args:
          request_id: below 2**64; once at a time.
          num_tokens: of the prompt; the sender must say the same number.
          timeout_s: until all is here; ``None`` is the engine's.

        Raises:
          CapacityError: too few pages are free.
          FabricError: the request is expected already, or the receiver is closed.

        Example::

          request = receiver.expect(7, 100)
          await request
        """
        is_u64("expect", request_id=request_id)
        if num_tokens < 1:
            raise ValueError(f"expect: num_tokens={num_tokens} must be 1 or more")
        limit_s = self.engine.timeout_s if timeout_s is None else float(timeout_s)
        self._strays.look()
        with self._lock:
            if self._closed or request_id in self._requests:
                why = "the PageReceiver is closed" if self._closed else "is expected"
                raise FabricError(f"expect: request {request_id}: {why} already")
            pages = self._pages.take(self.layout.pages_for(num_tokens))
            request = Receiving(self, request_id, num_tokens, pages, limit_s)
            try:
                request._timer = self._waits.after(
                    limit_s, lambda: self._expire(request)
                )
            except FabricError:  # the engine was closed
                self._pages.give(pages)
                raise
            self._requests[request_id] = request
            self._unwanted.pop(request_id, None)
            for peer, sender in self._senders.items():
                self._open_parked(peer, sender, request_id)
        return request

    def stats(self) -> dict[str, int]:
        """Pages ``free``, ``draining`` (until a sender has answered), ``stray``.

        Stray pages are those of senders that were lost, and of which it is not known
        (yet) that they write no more.
        """
        self._strays.look()
        with self._lock:
            stray = {leg.receiving for leg in self._strays.legs() if not leg.quiet}
            busy = {leg.receiving for leg in self._legs.values()}
            draining = {r for r in busy - stray if r.state is State.DRAINING}
            return {
                "free": self._pages.free,
                "draining": sum(len(r.pages) for r in draining),
                "stray": sum(len(r.pages) for r in stray),
                "requests": len(self._requests),
                "senders": len(self._senders),
            }

    def close(self) -> None:
        """Cancels what is expected, and listens no more; may be called again.

        The pool stays registered until the engine is closed: only then is it certain
        that nobody writes into it.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            requests = list(self._requests.values())
        for request in requests:
            self._cancel(request)
        self._strays.close()
        self._waits.close()
        with self._lock:
            for sender in self._senders.values():
                sender.process.close()

    def __enter__(self) -> PageReceiver:
        return self

    def __exit__(self, *rest: object) -> None:
        self.close()

    # --- Messages, on a thread of the engine's ---

    def _on_message(self, peer: int, data: bytes) -> None:
        try:
            kind, fields = _frames.decode(data)
        except FabricError as error:
            self._waits.tell(peer, "refuse", why=str(error))
            return
        if kind == "hello":
            self._hello(peer, fields)
            return
        with self._lock:
            sender = self._senders.get(peer)
            if sender is None or self._closed:
                return
            if kind == "open":
                self._open(peer, sender, *(fields[k] for k in _OPEN))
                return
            legs = [leg for (owner, _), leg in self._legs.items() if owner == peer]
            if kind == "bye":
                sender.parked.clear()
        if kind == "bye":
            for leg in legs:
                if not leg.ended:
                    self._end(leg, False, None, "its PageSender was closed")
        elif kind == "end":
            with self._lock:
                found = self._legs.get((peer, fields["leg"]))
                given_up = [
                    request
                    for request, (leg, _) in sender.parked.items()
                    if leg == fields["leg"]
                ]
                for request_id in given_up:
                    del sender.parked[request_id]
            if found is not None:
                found.written = fields["written"]
                self._end(found, fields["well"], fields["failed"], fields["why"])
            for request_id in given_up:
                self._given_up(request_id, sender.layout.tp_rank, fields["why"])

    def _hello(self, peer: int, fields: dict[str, Any]) -> None:
        try:
            if fields["version"] != _frames.VERSION:
                raise FabricError(
                    f"jf.kv: the sender speaks version {fields['version']}, the "
                    f"receiver {_frames.VERSION}: run the same jaxfabric on both sides"
                )
            layout = PageLayout.from_json(fields["layout"])
            check_bridge(layout, self.layout)
        except FabricError as error:
            self._waits.tell(peer, "refuse", why=str(error))
            return
        process = PeerProcess(
            fields["process"] if self.engine.transport == "shm" else {}
        )
        self._strays.came_back(fields["sender"])
        with self._lock:
            known = self._senders.get(peer)
            if self._closed or (known and known.number == fields["sender"]):
                process.close()
                if self._closed:
                    return
            else:  # a new one, or the engine's next: each has legs of its own
                self._senders[peer] = _Sender(fields["sender"], layout, process)
                if known is None:
                    self._waits.watch(peer, lambda error: self._lost(peer, error))
                else:
                    known.process.close()
        pool, tails = (desc.to_bytes().hex() for desc in self._descs)
        self._waits.tell(
            peer,
            "welcome",
            layout=self.layout.to_json(),
            pool=pool,
            tails=tails,
            tail_bytes=self._tail_bytes,
        )

    def _open(
        self, peer: int, sender: _Sender, number: int, request_id: int, tokens: int
    ) -> None:
        """Grants a sender its part of a request. Needs the lock."""
        request = self._requests.get(request_id)
        if request is None:
            if request_id in self._unwanted:
                self._refuse(peer, number, self._unwanted[request_id])
            elif len(sender.parked) < _PARKED_MAX:
                sender.parked[request_id] = (number, tokens)
            else:
                self._refuse(peer, number, f"{_PARKED_MAX} requests wait here")
            return
        if (peer, number) in self._legs:
            self._refuse(peer, number, f"leg {number} was opened twice")
            return
        layout = sender.layout
        if tokens != request.num_tokens:
            why = (
                f"request {request_id} has {tokens} tokens at the sender, and "
                f"{request.num_tokens} are expected"
            )
            self._refuse(peer, number, why)
            self._fail_soon(request, PlanMismatchError(f"jf.kv: {why}"))
            return
        known = request._source_tp_size or layout.tp_size
        if known != layout.tp_size or layout.tp_rank in request._legs:
            self._refuse(
                peer, number, f"request {request_id} has another sender already"
            )
            return
        if not self._has_slot(peer):
            sender.parked[request_id] = (number, tokens)
            self._on_slot[peer, request_id] = lambda: self._open_parked(
                peer, sender, request_id
            )
            return
        try:
            ids = self._ids.take()
        except FabricError as error:
            self._refuse(peer, number, str(error))
            return
        (slot,) = self._slots.take(1)
        self._slots_of.take([peer], 1)
        leg = Leg(peer, number, request, ids, slot)
        try:
            leg.waits.append(
                self._count(
                    *(leg, leg.ids + 1, 1), lambda error: self._tail_came(leg, error)
                )
            )
        except FabricError as error:
            self._slots.give([slot])
            self._slots_of.give([peer], 1)
            self._ids.give(ids, clean=True)
            self._refuse(peer, number, str(error))
            return
        request._source_tp_size = layout.tp_size
        request._sources = source_ranks(layout.tp_size, self.layout)
        request._legs[layout.tp_rank] = self._legs[peer, number] = leg
        if request.state is State.WAITING:
            request._advance(Event.GRANTED)
        self._waits.tell(
            *(peer, "grant"), leg=number, pages=request.pages, id=leg.ids, slot=slot
        )

    def _open_parked(self, peer: int, sender: _Sender, request_id: int) -> None:
        """Opens what has waited, if it is still asked for. Needs the lock."""
        if self._senders.get(peer) is sender and request_id in sender.parked:
            leg, tokens = sender.parked.pop(request_id)
            self._open(peer, sender, leg, request_id, tokens)

    def _given_up(self, request_id: int, tp_rank: int, why: str) -> None:
        """A sender waits no more for its part of a request."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is None or tp_rank in request._legs:
                return
        self._fail(request, FabricError(f"request {request_id}: {why}"))

    # --- Senders that are gone ---

    def _lost(self, peer: int, error: FabricError) -> None:
        with self._lock:
            if self._closed:
                return
            sender = self._senders.pop(peer)
            legs = [leg for (owner, _), leg in self._legs.items() if owner == peer]
        # Those that it had ended well are counted soon, or run into their deadline.
        open_legs = [leg for leg in legs if not leg.ended]
        for request in {leg.receiving for leg in open_legs}:
            text = (
                f"expect: request {request.request_id}: its sender was lost: {error}; "
                f"{request._progress()}; expect it again, for another sender"
            )
            self._fail(request, PeerLostError(text, (peer,)))
        if not open_legs or sender.process.ended():
            sender.process.close()
            self._quieten(open_legs)
            return
        self._strays.add(sender.number, sender.process, open_legs)
        with self._lock:  # it may have said hello again before this was handled
            back = any(s.number == sender.number for s in self._senders.values())
        if back:
            self._strays.came_back(sender.number)


_OPEN = ("leg", "request", "tokens")
