"""Messages between TransferEngines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from jaxfabric._errors import CapacityError
from jaxfabric._transfer_base import TransferBase, native_errors
from jaxfabric._transfer_future import TransferFuture

_RECEIVE_SLICE_S = 0.2  # so that Ctrl-C is noticed while a thread waits


class Message(NamedTuple):
    """What `TransferEngine.receive` gives: who sent it, and the bytes."""

    peer: int
    data: bytes


class Messages(TransferBase):
    """The part of TransferEngine that sends and receives messages."""

    def submit_send(
        self,
        peer: int,
        message: bytes | bytearray | memoryview,
        timeout_s: float | None = None,
    ) -> TransferFuture:
        """Sends up to 1 MiB; whole, and in order with others to the same peer.

        It is done once the bytes are on their way.

        Raises:
          TypeError: ``message`` is not bytes, a bytearray or a memoryview.
          FabricError: it is too long, or there is no such peer.
        """
        if not isinstance(message, (bytes, bytearray, memoryview)):
            raise TypeError(
                f"submit_send: a message is bytes, not a {type(message).__name__}"
            )
        with native_errors():
            return self._future(
                self._native.submit_send(peer, bytes(message), timeout_s)
            )

    def submit_recvs(self, callback: Callable[[int, bytes], object] | None) -> None:
        """Calls ``callback(peer, message)`` for each, on a thread for callbacks.

        One call at a time, in order. ``None`` keeps messages for `receive` again.
        A CapacityError as in `receive` goes to ``sys.unraisablehook``, like all that
        a callback raises.
        """

        def take(peer: int, data: bytes, dropped: int) -> None:
            if dropped:
                raise _lost(peer, dropped)
            if callback is not None:
                callback(peer, data)

        with native_errors():
            self._native.submit_recvs(None if callback is None else take)

    def receive(self, timeout_s: float | None = None) -> Message:
        """Waits for the next message of any peer.

        Up to 2**16 messages, or 1 GiB, wait here for who takes them; what comes
        beyond is lost.

        Raises:
          TimeoutError: none came within ``timeout_s`` (``None``: the engine's).
          CapacityError: the next messages of a peer were lost, since too many waited.
            Those that came later can still be received.
        """
        left = self.timeout_s if timeout_s is None else timeout_s
        while True:
            with native_errors():
                found = self._native.receive(max(0.0, min(left, _RECEIVE_SLICE_S)))
            if found is not None:
                return _message(found)
            left -= _RECEIVE_SLICE_S
            if left <= 0:
                raise TimeoutError("receive: no message came in time")

    async def messages(self) -> AsyncIterator[Message]:
        """The messages of all peers, under asyncio; raises what `receive` raises.

        It takes each message when it is asked for the next one: whoever leaves the
        loop early loses none.

        Example::

          async for peer, data in engine.messages():
              await engine.submit_send(peer, b"seen")
        """
        loop = asyncio.get_running_loop()
        while True:
            with native_errors():
                found = self._native.receive(0.0)
            if found is not None:
                yield _message(found)
                continue
            ready = asyncio.Event()

            def wake(ready: asyncio.Event = ready) -> None:
                with contextlib.suppress(RuntimeError):  # the loop was closed
                    loop.call_soon_threadsafe(ready.set)

            with native_errors():
                self._native.on_message(wake)
            await ready.wait()


def _message(found: tuple[int, bytes, int]) -> Message:
    peer, data, dropped = found
    if dropped:
        raise _lost(peer, dropped)
    return Message(peer, data)


def _lost(peer: int, count: int) -> CapacityError:
    return CapacityError(
        f"receive: {count} messages of peer {peer} were lost here: 2**16 messages or "
        "1 GiB waited, and nobody took them; call receive() or submit_recvs() sooner, "
        "or let the sender wait for answers"
    )
