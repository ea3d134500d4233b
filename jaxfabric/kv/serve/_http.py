"""The router's HTTP side: prompts, jobs' websockets, metrics, health."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from jaxfabric.kv.serve import _messages
from jaxfabric.kv.serve._jobs import Job, NameTakenError
from jaxfabric.kv.serve._prompt import ByteText, Prompt, RequestError, Text
from jaxfabric.kv.serve._router import Router

_log = logging.getLogger("jaxfabric")

BODY_BYTES_MAX = 1 << 21
_HELLO_S = 10.0
_BODY_S = 30.0  # until a client has sent its request
_READ_S = 30.0  # until it has taken what it was sent
_OUTBOX_MAX = 4096  # messages that a job has not taken yet; more, and it is lost
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    router: Router,
    *,
    token: str,
    text: Text | None = None,
    heartbeat_s: float = 5.0,
) -> web.Application:
    """The router as an application of aiohttp.

    ``POST /generate`` takes JSON (``prompt`` or ``tokens``, ``max_tokens``,
    ``timeout_s``, ``options``) and streams server-sent events; ``GET /jobs`` is the
    websocket of jobs, ``GET /metrics`` for Prometheus, ``GET /health`` is 200 when a
    job of each role is here.

    Args:
      router: what does the work.
      token: that jobs must show. Clients need none.
      text: turns prompts into tokens; by default a token is a byte.
      heartbeat_s: a job is asked so often whether it is there, and lost if it does
        not answer within half of that.

    Example::

      aiohttp.web.run_app(create_app(Router(), token="secret"), port=8000,
                          handler_cancellation=True)   # clients that leave are noticed
    """
    if not token:
        raise ValueError(
            "create_app: token must not be empty: jobs show that they know it"
        )
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    http = _Http(router, token.encode(), text or ByteText(), heartbeat_s)
    app.router.add_post("/generate", http.generate)
    app.router.add_get("/jobs", http.job)
    app.router.add_get("/metrics", http.metrics)
    app.router.add_get("/health", http.health)
    app.on_shutdown.append(http.close_jobs)
    return app


class _Http:
    def __init__(
        self, router: Router, token: bytes, text: Text, heartbeat_s: float
    ) -> None:
        self._router, self._token, self._text = router, token, text
        self._heartbeat_s = heartbeat_s

    # --- Clients ---

    async def generate(self, request: web.Request) -> web.StreamResponse:
        response: web.StreamResponse | None = None
        count = 0
        try:
            async with asyncio.timeout(_BODY_S):
                body = await _json(request)
            prompt = Prompt.from_json(body, self._text)
            pieces = self._router.generate(prompt)
            async with contextlib.aclosing(pieces):
                async for tokens in pieces:
                    if response is None:
                        response = await _begin_events(request)
                    count += len(tokens)
                    text = self._text.decode(tokens)
                    await _event(response, {"tokens": tokens, "text": text})
            if response is None:
                response = await _begin_events(request)
            await _event(response, {"finished": True, "tokens_made": count})
        except TimeoutError:
            if response is None:
                error = RequestError("bad_request", f"no whole body in {_BODY_S} s")
                return _refusal(error, {"reason": error.reason, "message": str(error)})
            raise ConnectionResetError("the client does not read") from None
        except RequestError as error:
            about = {"reason": error.reason, "message": str(error)}
            if response is None:
                return _refusal(error, about)
            await _event(response, {"error": about})
        await response.write_eof()
        return response

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._router.metrics.text(), headers={"Content-Type": METRICS_TYPE}
        )

    async def health(self, _: web.Request) -> web.Response:
        jobs = self._router.jobs
        missing = jobs.missing_roles()
        about = {
            "missing": missing,
            "waiting": jobs.waiting,
            "jobs": [
                {
                    "name": job.name,
                    "role": job.role,
                    "ranks": len(job.addresses),
                    "requests": len(job.attempts),
                    "capacity": job.capacity,
                    "leaving": job.leaving,
                    "numbers": job.numbers,
                }
                for job in jobs.by_name.values()
            ],
        }
        return web.json_response(about, status=503 if missing else 200)

    # --- Jobs ---

    async def job(self, request: web.Request) -> web.StreamResponse:
        header = request.headers.get("Authorization", "")
        shown = header.encode(errors="surrogateescape")
        if not hmac.compare_digest(shown, b"Bearer " + self._token):
            return web.json_response(
                {"error": {"reason": "token", "message": "another token"}}, status=401
            )
        socket = web.WebSocketResponse(
            heartbeat=self._heartbeat_s, max_msg_size=_messages.MESSAGE_BYTES_MAX
        )
        await socket.prepare(request)
        try:
            async with asyncio.timeout(_HELLO_S):
                first = await socket.receive()
            _, hello = _messages.decode(first.data, ("hello",))
            hello["where"] += f" ({request.remote})"
            await self._serve_job(socket, hello)
        except TimeoutError:
            await _refuse(socket, f"no hello came in {_HELLO_S} s", _HELLO_S)
        except _messages.MessageError as error:
            await _refuse(socket, str(error), 0)
        except NameTakenError as error:
            # One that is dead is lost within one and a half heartbeats.
            await _refuse(socket, str(error), 2 * self._heartbeat_s)
        return socket

    async def _serve_job(
        self, socket: web.WebSocketResponse, hello: dict[str, Any]
    ) -> None:
        """Until it is gone; raises NameTakenError if it is not let in."""
        outbox: asyncio.Queue[str] = asyncio.Queue(_OUTBOX_MAX)
        closing = asyncio.Event()
        reasons: list[str] = []

        def close(reason: str) -> None:
            reasons.append(reason)
            closing.set()

        def send(kind: str, fields: dict[str, Any]) -> None:
            try:
                outbox.put_nowait(_messages.encode(kind, fields))
            except asyncio.QueueFull:
                close("it does not take what it is told")

        async def write() -> None:
            while True:
                await socket.send_str(await outbox.get())

        job = Job(
            name=hello["name"],
            role=hello["role"],
            capacity=hello["capacity"],
            addresses=hello["addresses"],
            where=hello["where"],
            instance=hello["instance"],
            send=send,
            close=close,
        )
        self._router.add_job(job)
        send("welcome", {})
        _log.info("router: %s job %s is here, in %s", job.role, job.name, job.where)
        tasks = [
            asyncio.create_task(each)
            for each in (write(), self._listen(socket, job), closing.wait())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if failure := task.exception():
                    reasons.append(str(failure))
        finally:
            self._router.remove_job(job)
            why = reasons[0] if reasons else "its connection ended"
            _log.info("router: %s job %s is gone: %s", job.role, job.name, why)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await _close(socket, why)

    async def _listen(self, socket: web.WebSocketResponse, job: Job) -> None:
        async for message in socket:
            if message.type is WSMsgType.ERROR:
                return
            kind, fields = _messages.decode(message.data, _messages.OF_JOB)
            self._router.on_message(job, kind, fields)

    async def close_jobs(self, _: web.Application) -> None:
        for job in list(self._router.jobs.by_name.values()):
            job.close("the router ends")


async def _json(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except web.HTTPRequestEntityTooLarge:
        raise RequestError(
            "bad_request", f"the body has more than {BODY_BYTES_MAX} bytes"
        ) from None
    except (ValueError, RecursionError):
        raise RequestError("bad_request", "the body is no JSON") from None


async def _begin_events(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    await response.prepare(request)
    return response


async def _event(response: web.StreamResponse, value: dict[str, Any]) -> None:
    async with asyncio.timeout(_READ_S):  # a client that does not read holds a place
        await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")


def _refusal(error: RequestError, about: dict[str, Any]) -> web.Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    return web.json_response({"error": about}, status=error.status, headers=headers)


async def _refuse(socket: web.WebSocketResponse, why: str, again_s: float) -> None:
    with contextlib.suppress(ConnectionError):
        fields = {"why": why, "again_s": again_s}
        await socket.send_str(_messages.encode("refused", fields))
    await _close(socket, why)


async def _close(socket: web.WebSocketResponse, why: str) -> None:
    # A frame that closes has room for 123 bytes.
    message = why.encode()[:120].decode(errors="ignore").encode()
    with contextlib.suppress(ConnectionError):
        await socket.close(code=WSCloseCode.POLICY_VIOLATION, message=message)
