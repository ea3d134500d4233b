"""A router with jobs that a test plays, for the tests of jaxfabric.kv.serve."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

aiohttp = pytest.importorskip("aiohttp", reason="serving needs jaxfabric[serve]")

from aiohttp import web  # noqa: E402

from jaxfabric.kv import serve  # noqa: E402
from jaxfabric.kv.serve import _messages  # noqa: E402

TOKEN = "secret"
LIMIT_S = 20.0


class Router:
    """A router that listens, and a client of it."""

    def __init__(self, router: serve.Router, url: str, session: Any) -> None:
        self.router, self.url, self.session = router, url, session

    async def ask(self, **fields: Any) -> tuple[int, list[dict[str, Any]], Any]:
        """Status, events (or the one refusal), headers."""
        body = {"tokens": [1, 2, 3], "max_tokens": 3, **fields}
        async with self.session.post(f"{self.url}/generate", json=body) as response:
            if response.status != 200:
                return response.status, [await response.json()], response.headers
            text = await response.text()
        lines = [line for line in text.split("\n\n") if line]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        return 200, events, response.headers

    async def page(self, path: str) -> tuple[int, str]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.text()


@contextlib.asynccontextmanager
async def routing(heartbeat_s: float = 5.0, **options: Any) -> AsyncIterator[Router]:
    router = serve.Router(**options)
    app = serve.create_app(router, token=TOKEN, heartbeat_s=heartbeat_s)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession() as session:
        yield Router(router, f"http://{host}:{port}", session)
    await runner.cleanup()


class Job:
    """A job that answers each prompt as its `act` says, and notes what it was told."""

    def __init__(
        self, router: Router, role: str, name: str, act: Any = None, **options: Any
    ) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.losses = 0
        self._act = act
        self.router, self.name = router.router, name
        self.link = serve.JobLink(
            router.url,
            token=TOKEN,
            role=role,
            name=name,
            on_message=self._hear,
            on_lost=self._lost,
            **{"capacity": 4, **options},
        )
        self.task = asyncio.create_task(self.link.run())

    def _hear(self, kind: str, fields: dict[str, Any]) -> None:
        self.told.append((kind, fields))
        if self._act is not None and kind != "cancel":
            self._act(self, fields)

    def _lost(self) -> None:
        self.losses += 1

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.told]

    def welcomed(self) -> bool:
        """Whether the router has it, and not another one of its name."""
        job = self.router.jobs.by_name.get(self.name)
        return job is not None and job.instance == self.link._hello["instance"]

    async def die(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def sends(job: Job, fields: dict[str, Any]) -> None:
    """A prefill job that works."""
    job.link.send("sent", request=fields["request"])


def counts(job: Job, fields: dict[str, Any]) -> None:
    """A decode job that works: each token is one more than the last one."""
    last, request = fields["tokens"][-1], fields["request"]
    for step in range(fields["max_tokens"]):
        job.link.send("tokens", items=[[request, [last + 1 + step]]])
    job.link.send("finished", request=request, why="length")


async def here(router: Router, count: int) -> None:
    await until(lambda: len(router.router.jobs.by_name) == count)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():
            await asyncio.sleep(0.01)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(LIMIT_S):
            await test

    asyncio.run(limited())


def idle(router: Router) -> bool:
    return all(not job.attempts for job in router.router.jobs.by_name.values())


def hello(**changes: Any) -> str:
    fields = {
        "kind": "hello",
        "version": _messages.VERSION,
        "role": "prefill",
        "name": "p",
        "capacity": 1,
        "addresses": [],
        "instance": 1,
        "where": "host h, process 1",
        **changes,
    }
    return json.dumps(fields)
