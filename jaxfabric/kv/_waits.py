"""What both sides ask of the engine: its messages, timers, and news of losses."""

from __future__ import annotations

import itertools
import logging
import operator
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from jaxfabric._errors import DeadlineError, FabricError, PeerLostError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric.kv import _frames
from jaxfabric.kv._pages import IDS_END

_FOREVER_S = 1e9
_TIMERS_BEGIN = IDS_END - (1 << 25)  # legs have those below
_CALLBACKS_S = 10.0
_LOOK_S = 2e-3

_log = logging.getLogger("jaxfabric")

# An engine has one callback for messages; two owners would take each other's.
_claimed: weakref.WeakSet[TransferEngine] = weakref.WeakSet()


class Wait:
    """What is waited for."""

    def __init__(self) -> None:
        self.cancelled = False
        self.thread = 0  # that calls back just now
        self._future: Any = None

    def cancel(self) -> None:
        """Ends it."""
        self.cancelled = True
        if self._future is not None:
            self._future.cancel()

    def hold(self, future: Any) -> None:
        """It goes on under this one."""
        self._future = future
        if self.cancelled:
            future.cancel()


class Waits:
    """Waits of one owner; each calls back on a thread of the engine's.

    What they return can be cancelled. They end with the owner: no thread of the
    engine's comes back into Python after `close`, when the interpreter may end.
    """

    def __init__(self, engine: TransferEngine) -> None:
        if engine in _claimed:
            raise FabricError(
                "jf.kv: this engine has a PageSender or PageReceiver already; give "
                "each a TransferEngine of its own"
            )
        _claimed.add(engine)
        self._engine = engine
        self._changed = threading.Condition()
        self._live: set[Wait] = set()
        self._timers = itertools.count()

    @property
    def engine_closed(self) -> bool:
        """Whether nothing can land any more, and nothing be waited for."""
        return self._engine.closed

    def listen(self, callback: Callable[[int, bytes], object]) -> None:
        """Takes all messages of the engine; also those that have come already."""
        self._engine.submit_recvs(callback)

    def tell(self, peer: int, kind: str, **fields: Any) -> None:
        """Sends one of `_frames`."""
        try:
            self._engine.submit_send(peer, _frames.encode(kind, **fields))
        except FabricError:
            return  # it is lost, which is noticed elsewhere

    def count(
        self,
        id: int,
        transfers: int,
        timeout_s: float,
        callback: Callable[[FabricError | None], object],
    ) -> Wait:
        """Calls with ``None`` once they have come, else with the reason.

        Raises:
          FabricError: nothing can be waited for; it does not call then.
        """

        def done(error: FabricError | None) -> bool:
            callback(error)
            return True

        wait = Wait()
        self._expect(wait, done, id, transfers, timeout_s=timeout_s)
        return wait

    def fence(
        self, timeout_s: float, callback: Callable[[FabricError | None], object]
    ) -> Wait:
        """Calls with ``None`` once peers lost so far are cut off, else the reason.

        Raises:
          FabricError: it cannot be asked for; it does not call then.
        """

        def done(error: FabricError | None) -> bool:
            callback(error)
            return True

        wait = Wait()
        self._track(wait, done, self._engine.submit_fence(timeout_s))
        return wait

    def after(self, timeout_s: float, callback: Callable[[], object]) -> Wait:
        """Calls once ``timeout_s`` has passed, or the engine is closed."""
        until = time.monotonic() + timeout_s

        def done(error: FabricError | None) -> bool:
            over = isinstance(error, DeadlineError) or self._engine.closed
            if over:
                callback()
            return over

        def left() -> dict[str, Any]:
            return {"timeout_s": max(0.0, until - time.monotonic())}

        return self._never(done, left)

    def out_of_time(self, what: str) -> FabricError:
        """Why `after` called."""
        if self._engine.closed:
            return FabricError(f"{what}: its TransferEngine was closed")
        return DeadlineError(what)

    def watch(self, peer: int, callback: Callable[[FabricError], object]) -> Wait:
        """Calls once ``peer`` is lost, and what it had said before is handled."""

        def done(error: FabricError | None) -> bool:
            if isinstance(error, PeerLostError):
                self._after_messages(lambda: callback(error))
                return True
            return self._engine.closed

        return self._never(done, lambda: {"peers": [peer], "timeout_s": _FOREVER_S})

    def _after_messages(self, callback: Callable[[], object]) -> None:
        """Calls once the messages that are here now have been handled."""
        here: int | None = None

        def look() -> None:
            nonlocal here
            try:
                stats = self._engine.stats()
                here = stats["messages_arrived"] if here is None else here
                if stats["messages_handled"] < here:
                    self.after(_LOOK_S, look)
                    return
            except FabricError:  # it was closed
                return
            callback()

        look()

    def close(self) -> None:
        """Cancels all of them, and waits for callbacks that are under way."""
        _claimed.discard(self._engine)
        if not self._engine.closed:
            self._engine.submit_recvs(None)
        with self._changed:
            live = list(self._live)
        for wait in live:
            wait.cancel()
        here = threading.get_ident()  # may be in such a callback itself

        def all_back() -> bool:
            return all(wait.thread == here for wait in self._live)

        with self._changed:
            if not self._changed.wait_for(all_back, _CALLBACKS_S):
                _log.warning(
                    "jf.kv: a callback of an outcome has not returned for %g s; close "
                    "goes on without it",
                    _CALLBACKS_S,
                )

    def _never(
        self,
        done: Callable[[FabricError | None], bool],
        options: Callable[[], dict[str, Any]],
    ) -> Wait:
        """A wait for what nobody sends.

        A peer that counts under its id all the same, or spoils it, gains nothing: the
        wait goes on under another id.
        """
        wait = Wait()

        def arm() -> None:
            id = _TIMERS_BEGIN + next(self._timers) % (IDS_END - _TIMERS_BEGIN)
            self._expect(wait, ended, id, 1, **options())

        def ended(error: FabricError | None) -> bool:
            if wait.cancelled or done(error):
                return True
            try:
                arm()
            except FabricError as failure:
                return done(failure)
            return False

        arm()
        return wait

    def _expect(
        self,
        wait: Wait,
        ended: Callable[[FabricError | None], bool],
        id: int,
        transfers: int,
        **options: Any,
    ) -> None:
        future = self._engine.expect_imm_count(id, transfers, **options)
        self._track(wait, ended, future)

    def _track(
        self, wait: Wait, ended: Callable[[FabricError | None], bool], future: Any
    ) -> None:
        def done(over: Any) -> None:
            finished = True
            wait.thread = threading.get_ident()
            try:
                finished = ended(over.exception(0))
            finally:
                wait.thread = 0
                if finished:
                    with self._changed:
                        self._live.discard(wait)
                        self._changed.notify_all()

        with self._changed:
            self._live.add(wait)
        wait.hold(future)
        future.add_done_callback(done)


def is_u64(what: str, **numbers: Any) -> None:
    """Raises ValueError unless all are integers below 2**64."""
    for name, number in numbers.items():
        try:
            fits = 0 <= operator.index(number) < 1 << 64
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{what}: {name}={number!r} must be an integer, at least 0 and below "
                "2**64"
            )
