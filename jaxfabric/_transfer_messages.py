"""Messages between TransferEngines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

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
        self, peer: int, message: bytes, timeout_s: float | None = None
    ) -> TransferFuture:
        """Sends up to 1 MiB; whole, and in order with others to the same peer.

        It is done once the bytes are on their way.
        """
        with native_errors():
            return self._future(
                self._native.submit_send(peer, bytes(message), timeout_s)
            )

    def submit_recvs(self, callback: Callable[[int, bytes], object] | None) -> None:
        """Calls ``callback(peer, message)`` for each message, on a thread of its own.

        One call at a time, in order. ``None`` keeps messages for `receive` again.
        """
        with native_errors():
            self._native.submit_recvs(callback)

    def receive(self, timeout_s: float | None = None) -> Message:
        """Waits for the next message of any peer.

        Raises:
          TimeoutError: none came within ``timeout_s`` (``None``: the engine's).
        """
        left = self.timeout_s if timeout_s is None else timeout_s
        while True:
            with native_errors():
                found = self._native.receive(max(0.0, min(left, _RECEIVE_SLICE_S)))
            if found is not None:
                return Message(*found)
            left -= _RECEIVE_SLICE_S
            if left <= 0:
                raise TimeoutError("receive: no message came in time")

    async def messages(self) -> AsyncIterator[Message]:
        """The messages of all peers, under asyncio.

        Example::

          async for peer, data in engine.messages():
              await engine.submit_send(peer, b"seen")
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Message] = asyncio.Queue()

        def put(peer: int, data: bytes) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, Message(peer, data))

        self.submit_recvs(put)
        try:
            while True:
                yield await queue.get()
        finally:
            if not self.closed:
                self.submit_recvs(None)
