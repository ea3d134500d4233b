"""JobLink: a job's connection to its router, made again whenever it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from jaxfabric._errors import FabricError
from jaxfabric.kv.serve import _messages

_log = logging.getLogger("jaxfabric")

_PAUSE_S = 0.2  # before it connects again; twice as long each time
_PAUSE_MAX_S = 5.0


class JobLink:
    """Registers a job with a router, and carries what they say to each other.

    The router may be started before or after the job, and again: the link connects
    until it is closed. Whatever the router said before is void after a loss.

    Args:
      url: of the router, such as ``"http://host:8000"``.
      token: that the router wants to see.
      role: ``"prefill"`` or ``"decode"``.
      name: of the job; no other one that is alive may have it.
      capacity: how many requests it takes at a time.
      addresses: of a decode job's PageReceivers, one for each rank.
      on_message: called in the loop with (kind, fields): ``"prefill"``, ``"expect"``
        or ``"cancel"``, with the fields ``request``, ``tokens``, ``max_tokens``,
        ``timeout_s``, ``options`` and (prefill) ``addresses``.
      on_lost: called in the loop when the router is lost: no request is wanted any
        more.
      heartbeat_s: the router is asked so often whether it is there, and lost if it
        does not answer within half of that.

    Example::

      link = JobLink("http://router:8000", token="secret", role="decode", name="d0",
                     capacity=16, addresses=[engine.address().to_bytes()],
                     on_message=handle, on_lost=cancel_all)
      await link.run()                              # until link.close()
      link.send("tokens", items=[[request, [17]]])  # from any thread
    """

    def __init__(
        self,
        url: str,
        *,
        token: str,
        role: str,
        name: str,
        capacity: int,
        addresses: Sequence[bytes] = (),
        on_message: Callable[[str, dict[str, Any]], object],
        on_lost: Callable[[], object] = lambda: None,
        heartbeat_s: float = 5.0,
    ) -> None:
        self._url = url.rstrip("/") + "/jobs"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._hello = {
            "version": _messages.VERSION,
            "role": role,
            "name": name,
            "capacity": capacity,
            "addresses": [address.hex() for address in addresses],
            "instance": secrets.randbits(64),
            "where": f"{socket.gethostname()[:256]}, process {os.getpid()}",
        }
        _messages.encode("hello", self._hello)  # its mistakes show here
        self._on_message, self._on_lost = on_message, on_lost
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox: asyncio.Queue[str] | None = None
        self._heartbeat_s = heartbeat_s
        self._closed = asyncio.Event()
        self._is_closed = False
        self._tries_until: float | None = None  # while the router refuses this job

    def send(self, kind: str, **fields: Any) -> None:
        """Says something to the router, from any thread; lost if it is not there.

        ``sent(request)``, ``tokens(items)``, ``finished(request, why)``,
        ``failed(request, why, again)``, ``state(addresses, numbers)``, ``leaving()``.
        """
        text = _messages.encode(kind, fields)
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._put, text)

    def _put(self, text: str) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(text)

    def close(self) -> None:
        """Ends `run`, from any thread; also one that has not begun."""
        self._is_closed = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._closed.set)

    async def run(self) -> None:
        """Connects, and serves until `close`.

        Raises:
          FabricError: the router wants another token, or refuses this job: what it
            says is malformed, or another job has its name, and still has when a dead
            one would have been lost.
        """
        self._loop = asyncio.get_running_loop()
        if self._is_closed:  # before there was a loop to tell
            self._closed.set()
        pause_s = _PAUSE_S
        async with aiohttp.ClientSession() as session:
            while not self._closed.is_set():
                try:
                    async with session.ws_connect(
                        self._url,
                        headers=self._headers,
                        heartbeat=self._heartbeat_s,
                        max_msg_size=_messages.MESSAGE_BYTES_MAX,
                    ) as connection:
                        await self._serve(connection)
                        pause_s = _PAUSE_S
                except aiohttp.WSServerHandshakeError as error:
                    if error.status == 401:
                        raise FabricError(
                            f"JobLink: {self._url} wants another token"
                        ) from None
                    _log.warning("JobLink: %s: %s", self._url, error)
                except (aiohttp.ClientError, OSError) as error:
                    _log.info("JobLink: %s: %s", self._url, error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._closed.wait()
                pause_s = min(_PAUSE_MAX_S, 2 * pause_s)

    async def _serve(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        outbox: asyncio.Queue[str] = asyncio.Queue()
        self._outbox = outbox
        await connection.send_str(_messages.encode("hello", self._hello))

        async def write() -> None:
            while True:
                await connection.send_str(await outbox.get())

        tasks = [
            asyncio.create_task(each)
            for each in (write(), self._listen(connection), self._closed.wait())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                failure = task.exception()
                if isinstance(failure, _messages.MessageError):
                    raise FabricError(f"JobLink: {self._url}: {failure}") from None
                if failure is not None and not isinstance(failure, OSError):
                    raise failure
        finally:
            self._outbox = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._on_lost()
        if connection.close_code == aiohttp.WSCloseCode.POLICY_VIOLATION:
            _log.warning("JobLink: the router closed the connection")

    async def _listen(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        async for message in connection:
            if message.type is not aiohttp.WSMsgType.TEXT:
                return
            kind, fields = _messages.decode(message.data, _messages.OF_ROUTER)
            if kind == "welcome":
                self._tries_until = None
            elif kind == "refused":
                self._refused(fields["why"], fields["again_s"])
            else:
                self._on_message(kind, fields)

    def _refused(self, why: str, again_s: float) -> None:
        """Raises FabricError once it is not worth another try."""
        now = asyncio.get_running_loop().time()
        if self._tries_until is None:
            self._tries_until = now + again_s
            if again_s > 0:
                _log.warning(
                    "JobLink: %s: %s; trying for %g s", self._url, why, again_s
                )
        if now >= self._tries_until:
            raise FabricError(f"JobLink: {self._url}: {why}")
