"""Jobs with one name at a router: who is refused, who comes back, how soon."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from router_cases import (
    TOKEN,
    Job,
    Router,
    aiohttp,
    counts,
    hello,
    here,
    routing,
    run,
    sends,
    until,
)

from jaxfabric._errors import FabricError
from jaxfabric.kv.serve import _messages


async def refused(job: Job) -> str:
    """Why its link has ended."""
    with pytest.raises(FabricError) as failure:
        await job.task
    return str(failure.value)


async def say(router: Router, text: str) -> tuple[Any, list[dict[str, Any]]]:
    """A connection that has said this, and what it is told until that ends."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    socket = await router.session.ws_connect(f"{router.url}/jobs", headers=headers)
    await socket.send_str(text)
    first = await socket.receive()
    told = [json.loads(first.data)] if first.type is aiohttp.WSMsgType.TEXT else []
    return socket, told


def test_the_second_live_job_of_a_name_is_refused() -> None:
    async def test() -> None:
        async with routing(heartbeat_s=0.4) as router:
            first = Job(router, "decode", "d", counts)
            Job(router, "prefill", "p", sends)
            await here(router, 2)
            begin = time.monotonic()
            why = await refused(Job(router, "decode", "d", counts))
            # It has tried until one that was dead would have been lost.
            assert 0.6 < time.monotonic() - begin < 10
            for part in (
                "decode job d in ",  # this one
                "the name is taken by the decode job in ",
                "which has been here for ",
                "since 20",
                "another name",
            ):
                assert part in why, why
            assert why.count("process ") == 2, why
            # The first one has noticed nothing.
            assert first.losses == 0
            assert (await router.ask())[1][-1].get("finished")
            # Names are of all jobs, whatever their roles.
            assert "taken by the decode job" in await refused(
                Job(router, "prefill", "d", sends)
            )

    run(test())


def test_a_job_that_was_killed_comes_back_at_once() -> None:
    async def test() -> None:
        async with routing(heartbeat_s=10.0) as router:
            first = Job(router, "prefill", "p", sends)
            Job(router, "decode", "d", counts)
            await here(router, 2)
            begin = time.monotonic()
            second = Job(router, "prefill", "p", sends)
            await asyncio.sleep(0.3)  # it was refused meanwhile
            assert second.losses
            await first.die()
            await until(lambda: second.welcomed())
            assert (await router.ask())[1][-1].get("finished")
            assert time.monotonic() - begin < 5

    run(test())


def test_a_job_that_hangs_keeps_its_name_until_it_is_lost() -> None:
    async def test() -> None:
        async with routing(heartbeat_s=0.5) as router:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with router.session.ws_connect(
                f"{router.url}/jobs", headers=headers, autoping=False
            ) as hangs:
                await hangs.send_str(hello(name="p"))
                await here(router, 1)
                second = Job(router, "prefill", "p", sends)
                await until(lambda: second.welcomed())

    run(test())


def test_a_link_that_lost_its_connection_takes_its_own_place() -> None:
    async def test() -> None:
        async with routing(heartbeat_s=10.0) as router:
            before, told = await say(router, hello(name="p", instance=5))
            assert told == [{"kind": "welcome"}]
            # The router has not noticed that the first connection is dead.
            after, told = await say(router, hello(name="p", instance=5))
            assert told == [{"kind": "welcome"}]
            assert (await before.receive()).type is aiohttp.WSMsgType.CLOSE
            other, told = await say(router, hello(name="p", instance=6))
            assert told[0]["kind"] == "refused"
            assert told[0]["again_s"] > 10.0
            assert len(router.router.jobs.by_name) == 1
            await after.close()
            await here(router, 0)
            await other.close()

    run(test())


def test_what_is_refused_for_good_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        async with routing() as router:
            for wrong, words in (
                (hello(version=0), "version 0, the router has "),
                (hello(capacity=0), "hello: capacity is not"),
            ):
                socket, told = await say(router, wrong)
                (answer,) = told
                assert (answer["kind"], answer["again_s"]) == ("refused", 0), answer
                assert words in answer["why"]
                await socket.close()

            def add_job(_: Any) -> None:
                raise _messages.MessageError("hello: none of these")

            monkeypatch.setattr(router.router, "add_job", add_job)
            job = Job(router, "prefill", "p", sends)
            assert "hello: none of these" in await refused(job)
            assert job.losses == 1  # one try

    run(test())


def test_a_link_that_is_closed_before_it_runs_does_not_run() -> None:
    async def test() -> None:
        async with routing() as router:
            job = Job(router, "prefill", "p", sends)  # has not begun yet
            job.link.close()
            await job.task
            assert not router.router.jobs.by_name
            assert job.losses == 0

    run(test())
