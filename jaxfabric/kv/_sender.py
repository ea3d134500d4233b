"""PageSender: writes the pages of requests into the pools of PageReceivers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from jaxfabric._errors import CapacityError, FabricError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric.kv._layout import PageLayout
from jaxfabric.kv._plan import plan_copies
from jaxfabric.kv._pool import TAIL_HEADER
from jaxfabric.kv._programs import Programs
from jaxfabric.kv._sending import Leg, Piece, Sending
from jaxfabric.kv._targets import Targets
from jaxfabric.kv._waits import is_u64


class PageSender(Targets):
    """Sends the KV pages of requests to PageReceivers, layer by layer.

    What it sends lies in its pool, in pages that it chooses; the receiver chooses its
    own. Each layer is on its way as soon as `send` is called, if the receiver expects
    the request and there is room for more; otherwise as soon as that is so.

    Args:
      engine: a TransferEngine of this sender's own: it takes all its messages.
      layout: of the pool.
      pool: a Region or NumPy array of the layout's size; ``None`` makes one.
      whole_tokens: a prompt of up to so many tokens goes in one write when its tail
        is sent, not layer by layer: that is faster for short ones.
      requests: so many are under way at a time; others wait for their turn.
      waiting: so many may wait; beyond that `begin` raises.
      bytes_max: bytes that are being written at a time; others wait. Of these three,
        a receiver gets three quarters of what others leave, so that one that hangs
        holds up nobody else; who has no write under way may have one.
      tail_bytes: room for a tail.

    Attributes:
      pool: NumPy array of ``layout.shape`` and ``layout.dtype``.

    Example::

      sender = jf.kv.PageSender(jf.TransferEngine(job="serving", token=t), layout)
      receiver = sender.connect(address).result()
      request = sender.begin(7, receiver, pages=[0, 1], num_tokens=100)
      for layer in range(layout.layers):
          sender.pool[layer, [0, 1]] = prefill(layer)
          request.send(layer)
      request.send_tail(hidden.tobytes())
      request.result()
    """

    def __init__(
        self,
        engine: TransferEngine,
        layout: PageLayout,
        *,
        pool: Any = None,
        whole_tokens: int = 0,
        requests: int = 64,
        waiting: int = 1024,
        bytes_max: int = 1 << 28,
        tail_bytes: int = 1 << 15,
    ) -> None:
        for name, count in (("requests", requests), ("bytes_max", bytes_max)):
            if count < 1:
                raise ValueError(f"PageSender: {name}={count} must be 1 or more")
        super().__init__(
            *(engine, layout, pool),
            requests=requests,
            waiting=waiting,
            bytes_max=bytes_max,
            tail_bytes=tail_bytes,
        )
        self._tail_bytes = tail_bytes
        self._whole_tokens = whole_tokens
        self._waiting_max = waiting
        # Not where another sender of this engine has begun: legs of it may linger.
        self._next_leg = secrets.randbits(62)
        self._programs: Programs | None = None
        self._left = False  # said bye
        self._waits.listen(self._on_message)

    def begin(
        self,
        request_id: int,
        receivers: int | Sequence[int],
        *,
        pages: Sequence[int],
        num_tokens: int,
        timeout_s: float | None = None,
    ) -> Sending:
        """Begins a request; nothing is read before `send`.

        Args:
          request_id: below 2**64, as the receiver expects it.
          receivers: from `connect`; several where they share this sender's heads.
          pages: of this sender's pool, in the order of the tokens.
          num_tokens: of the prompt.
          timeout_s: for all of it; ``None`` is the engine's.

        Raises:
          CapacityError: too many requests wait for their turn.
          PeerLostError: a receiver is gone.
          FabricError: the request is under way already.

        Example::

          request = sender.begin(7, [r0, r1], pages=[4, 2], num_tokens=30)
        """
        is_u64("begin", request_id=request_id)
        numbers = [receivers] if isinstance(receivers, int) else list(receivers)
        if num_tokens < 1 or not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"begin: num_tokens={num_tokens}, receivers={receivers}: at least one "
                "token, and one receiver or several different ones"
            )
        limit_s = self.engine.timeout_s if timeout_s is None else float(timeout_s)
        chosen = tuple(int(page) for page in pages)
        with self._lock:
            if self._closed or request_id in self._requests:
                why = "the PageSender is closed" if self._closed else "is under way"
                raise FabricError(f"begin: request {request_id}: {why} already")
            targets = [self._target(number) for number in numbers]
            for target in targets:  # refuses wrong pages
                places = range(target.layout.pages_for(num_tokens))
                layouts = self.layout, target.layout
                if len(places) > target.layout.pages:
                    raise CapacityError(
                        f"begin: {num_tokens} tokens need {len(places)} pages at the "
                        f"receiver, which has {target.layout.pages}"
                    )
                plan_copies(*layouts, (), chosen, places, num_tokens)
            full = len(self._waiting) >= self._waiting_max
            if full or not self._queued.has_room(numbers, 1):
                raise CapacityError(
                    f"begin: {len(self._waiting)} requests wait for their turn, at "
                    f"receivers {numbers} {[self._queued.held(n) for n in numbers]}; "
                    "await some, or give a larger waiting="
                )
            request = Sending(self, request_id, num_tokens, chosen, limit_s)
            request._peers = tuple(numbers)
            self._requests[request_id] = request
            for target in targets:
                leg = Leg(target, self._next_leg, request)
                self._next_leg += 1
                self._legs[leg.number] = leg
                request._legs.append(leg)
            try:
                request._timer = self._waits.after(
                    limit_s, lambda: self._expire(request)
                )
            except FabricError:  # the engine was closed
                del self._requests[request_id]
                for leg in request._legs:
                    del self._legs[leg.number]
                raise
            self._waiting.append(request)
            self._queued.take(numbers, 1)
            self._admit()
        return request

    def send(
        self, request_id: int, layer: int, tokens: tuple[int, int] | None = None
    ) -> None:
        """Sends a layer's pages of a request; returns at once.

        Args:
          request_id: as given to `begin`.
          layer: whose pages are final now.
          tokens: the first, and the one after the last, for a prompt that is computed
            in chunks; ``None`` for all.

        Raises:
          FabricError: the request has failed (with the reason), or this was sent.

        Example::

          sender.send(7, layer=0, tokens=(0, 512))
        """
        with self._lock:
            request = self._live(request_id, "send")
            first, last = (0, request.num_tokens) if tokens is None else tokens
            if not 0 <= first < last <= request.num_tokens or not (
                0 <= layer < self.layout.layers
            ):
                raise ValueError(
                    f"send: layer {layer} of {self.layout.layers}, tokens {first} to "
                    f"{last} of {request.num_tokens}: out of range"
                )
            if request._tail is not None:
                raise FabricError(f"send: request {request_id}: its tail was sent")
            request._add(layer, first, last)
            if request.num_tokens <= self._whole_tokens:
                return
            self._queue(request, self._piece((layer,), first, last))
        self._pump()

    def send_tail(self, request_id: int, data: bytes = b"") -> None:
        """Sends what decoding begins with; the last that is sent of a request.

        Args:
          request_id: as given to `begin`.
          data: the last hidden state, sampling state and so on; bytes for the user.

        Raises:
          FabricError: the request has failed, or layers of it were not sent.

        Example::

          sender.send_tail(7, hidden.tobytes())
        """
        programs = self._programs
        if programs is not None:
            programs.send_noted()
        with self._lock:
            request = self._live(request_id, "send_tail")
            missing = request._missing(self.layout.layers)
            if missing or request._tail is not None:
                why = f"layers {missing} were not sent" if missing else "it was sent"
                raise FabricError(f"send_tail: request {request_id}: {why}")
            room = min(
                self._tail_bytes, *(leg.target.tail_bytes for leg in request._legs)
            )
            if len(data) > room:
                raise CapacityError(
                    f"send_tail: {len(data)} bytes; there is room for {room}: give "
                    "both sides a larger tail_bytes="
                )
            if request.num_tokens <= self._whole_tokens:
                layers = tuple(range(self.layout.layers))
                self._queue(request, self._piece(layers, 0, request.num_tokens))
            header = TAIL_HEADER.pack(request_id, request._transfers, len(data))
            request._tail = header + bytes(data)
            self._fill_tail(request)
            self._queue(request, Piece((), 0, 0, len(request._tail)))
        self._pump()

    def programs(self) -> Programs:
        """What jitted programs send by; see `jf.kv.send_layer`."""
        with self._lock:
            if self._closed:
                raise FabricError("jf.kv.send_layer: the PageSender is closed")
            if self._programs is None:
                self._programs = Programs(self)
            return self._programs

    def stats(self) -> dict[str, int]:
        """How many ``requests`` there are, ``waiting`` ones, ``bytes`` under way."""
        with self._lock:
            return {
                "requests": len(self._requests),
                "waiting": len(self._waiting),
                "bytes": self._bytes.used,
                "receivers": len(self._targets),
            }

    def close(self, timeout_s: float | None = None) -> None:
        """Cancels what is under way, and takes leave; may be called again.

        Call it before the engine is closed: the receivers then know that their pages
        are free.

        Raises:
          TimeoutError: writes did not end within ``timeout_s`` (``None``: the
            engine's); it has not taken leave then, so call it again.
        """
        limit_s = self.engine.timeout_s if timeout_s is None else timeout_s
        with self._lock:
            if self._left:
                return
            self._closed = True
            requests = list(self._requests.values())
            programs, self._programs = self._programs, None
        if programs is not None:
            programs.close()
        for request in requests:
            self._cancel(request)
        until = time.monotonic() + limit_s
        for request in requests:
            request.exception(max(0.0, until - time.monotonic()))
        with self._lock:
            if self._left:
                return
            self._left = True
            targets = list(self._targets.values())
        for target in targets:
            self._waits.tell(target.peer, "bye")
        self._end_connecting()
        self._waits.close()
        if not self.engine.closed:
            self.engine.drain(max(0.1, until - time.monotonic()))

    def __enter__(self) -> PageSender:
        return self

    def __exit__(self, *rest: object) -> None:
        self.close()

    def _live(self, request_id: int, what: str) -> Sending:
        request = self._requests.get(request_id)
        if request is None:
            raise FabricError(
                f"{what}: request {request_id} is not under way (any more)"
            )
        if request._failure is not None:
            raise request._failure
        return request
