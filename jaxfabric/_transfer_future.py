"""TransferFuture: the outcome of one operation of a TransferEngine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Generator
from typing import Any, Protocol

from jaxfabric._errors import FabricError, from_status

_SLICE_S = 0.2  # so that Ctrl-C is noticed while a thread waits
_GOES_ON = -1  # of NativeTransferFuture.wait, beside status codes


class Engine(Protocol):
    """What a future needs of its engine."""

    def _cancel(self, native: Any) -> bool:
        """Asks the operation to end early; ``False`` if it is done."""


class TransferFuture:
    """The outcome of one operation, to be waited for by a thread or awaited.

    The operation ends by its own ``timeout_s``, or shortly after it, when no NIC
    touches its buffers any more; until then they must not be reused.

    Example::

      write = engine.submit_single_write(region, desc, id=7)
      write.result()        # in a thread; raises what went wrong
      await write           # the same under asyncio
    """

    __slots__ = ("__weakref__", "_engine", "_native", "_value")

    def __init__(
        self, native: Any, engine: Engine, value: Callable[[Any], Any] | None = None
    ) -> None:
        self._native = native
        self._engine = engine
        self._value = value

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return bool(self._native.done())

    def result(self, timeout_s: float | None = None) -> Any:
        """Waits for the end; the peer for ``connect``, else ``None``.

        Args:
          timeout_s: how long to wait, in seconds; ``None`` until the operation ends
            by its own time limit.

        Raises:
          TimeoutError: it has not ended within ``timeout_s``; it goes on.
          FabricError: it failed; a DeadlineError, PeerLostError and so on.
        """
        if self._native.wait(0.0 if timeout_s is not None else _SLICE_S) != 0:
            failure = self.exception(timeout_s)
            if failure is not None:
                raise failure
        return None if self._value is None else self._value(self._native)

    def exception(self, timeout_s: float | None = None) -> FabricError | None:
        """Waits like `result`, but returns what went wrong instead of raising it."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = _SLICE_S if until is None else until - time.monotonic()
            code = self._native.wait(max(0.0, min(_SLICE_S, left)))
            if code == 0:
                return None
            if code != _GOES_ON:
                peer = self._native.peer
                peers = () if peer is None else (peer,)
                return from_status(code, self._native.failure, peers)
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(
                    f"{self._native.label}: not done after {timeout_s} s of waiting; "
                    "it goes on"
                )

    def cancel(self) -> bool:
        """Asks it to end early; ``False`` if it is done.

        It then fails with FabricError, unless it still succeeds. Where a part of a
        transfer was sent, the receiver's waits under its id fail, and neither side
        takes the id again: a later transfer could not be told from that part.
        """
        return self._engine._cancel(self._native)

    def add_done_callback(self, function: Callable[[TransferFuture], object]) -> None:
        """Calls ``function(self)`` once it is done, on a thread for callbacks.

        They begin in the order in which operations ended. One that blocks delays those
        behind it by 10 ms, after which they go on without it.
        """
        self._native.on_done(lambda: function(self))

    def __await__(self) -> Generator[Any, None, Any]:
        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        def done() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(wake)

        self._native.on_done(done)
        try:
            yield from woken
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self.result(0)

    def __repr__(self) -> str:
        state = "done" if self.done() else "under way"
        return f"TransferFuture({self._native.label}, {state})"
