"""The router, with jobs that the test plays: choice, fail-over, limits, bad input."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_child
from router_cases import (
    TOKEN,
    Job,
    aiohttp,
    counts,
    hello,
    here,
    idle,
    routing,
    run,
    sends,
    until,
)
from test_docs import blocks

from jaxfabric._errors import FabricError
from jaxfabric.kv import serve
from jaxfabric.kv.serve import _messages

ROOT = Path(__file__).resolve().parent.parent


def test_an_answer_is_streamed_from_decode() -> None:
    async def test() -> None:
        async with routing() as router:
            prefill = Job(router, "prefill", "p", sends)
            decode = Job(router, "decode", "d", counts, addresses=[b"where"])
            await here(router, 2)
            status, events, headers = await router.ask(options={"mode": "stream"})
            assert (status, headers["Content-Type"]) == (200, "text/event-stream")
            assert [event["tokens"] for event in events[:-1]] == [[4], [5], [6]]
            assert events[-1] == {"finished": True, "tokens_made": 3}
            ((_, asked),) = prefill.told
            ((_, expected),) = decode.told
            assert asked["addresses"] == [b"where".hex()]
            assert asked["request"] == expected["request"]
            assert expected["tokens"] == [1, 2, 3]
            assert expected["options"] == {"mode": "stream"}
            await until(lambda: idle(router))
            _, text = await router.page("/metrics")
            for line in (
                'jaxfabric_serve_requests_total{outcome="finished"} 1.0',
                "jaxfabric_serve_tokens_total 3.0",
                'jaxfabric_serve_jobs{role="decode"} 1.0',
                "jaxfabric_serve_ttft_seconds_count 1.0",
            ):
                assert line in text

    run(test())


def test_a_prompt_may_be_text() -> None:
    async def test() -> None:
        async with routing() as router:
            Job(router, "prefill", "p", sends)
            Job(router, "decode", "d", counts)
            await here(router, 2)
            body = {"prompt": "ab", "max_tokens": 2}
            url = f"{router.url}/generate"
            async with router.session.post(url, json=body) as response:
                text = await response.text()
            assert '"text": "c"' in text
            assert '"text": "d"' in text

    run(test())


def test_work_is_shared_by_size() -> None:
    async def test() -> None:
        async with routing() as router:
            small = Job(router, "prefill", "small", capacity=10)
            large = Job(router, "prefill", "large", capacity=30)
            Job(router, "decode", "d", capacity=40)
            await here(router, 3)
            asked: list[asyncio.Task[Any]] = []
            for count, shares in ((20, (5, 15)), (40, (10, 30))):
                while len(asked) < count:
                    asked.append(asyncio.create_task(router.ask()))
                await until(lambda: len(small.told) + len(large.told) == len(asked))
                assert (len(small.told), len(large.told)) == shares
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            # Who asked has left: all jobs hear of it.
            await until(lambda: idle(router))
            await until(lambda: large.kinds().count("cancel") == 30)
            assert small.kinds().count("cancel") == 10

    run(test())


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_lost_job_is_replaced_by_another(role: str) -> None:
    async def test() -> None:
        async with routing() as router:
            acts = {"prefill": sends, "decode": counts}
            for each, act in acts.items():
                if each != role:
                    Job(router, each, each, act)
            hangs = Job(router, role, "hangs")
            await here(router, 2)
            asked = asyncio.create_task(router.ask())
            await until(lambda: bool(hangs.told))
            Job(router, role, "works", acts[role])
            await here(router, 3)
            await hangs.die()
            _, events, _ = await asked
            made = [token for event in events[:-1] for token in event["tokens"]]
            assert made[-3:] == [4, 5, 6]
            assert events[-1].get("finished"), events

    run(test())


def test_what_was_made_is_not_made_again() -> None:
    def makes_one(job: Job, fields: dict[str, Any]) -> None:
        token = fields["tokens"][-1] + 1
        job.link.send("tokens", items=[[fields["request"], [token]]])

    async def test() -> None:
        async with routing() as router:
            prefill = Job(router, "prefill", "p", sends)
            first = Job(router, "decode", "first", makes_one)
            await here(router, 2)
            asked = asyncio.create_task(router.ask())
            await until(lambda: router.router.metrics.tokens._value.get() == 1)
            second = Job(router, "decode", "second", counts)
            await here(router, 3)
            await first.die()
            _, events, _ = await asked
            assert [event["tokens"] for event in events[:-1]] == [[4], [5], [6]]
            ((_, again),) = second.told
            assert (again["tokens"], again["max_tokens"]) == ([1, 2, 3, 4], 2)
            # Another try is another request to the jobs.
            assert len({fields["request"] for _, fields in prefill.told}) == 2

    run(test())


def test_another_try_goes_to_another_job() -> None:
    def fails(job: Job, fields: dict[str, Any]) -> None:
        job.link.send("failed", request=fields["request"], why="full", again=True)

    async def test() -> None:
        async with routing() as router:
            good = Job(router, "decode", "good", capacity=2)
            Job(router, "prefill", "p", sends)
            await here(router, 2)
            hangs = asyncio.create_task(router.ask())
            await until(lambda: bool(good.told))
            # The one that fails has less to do, so it is always tried first.
            bad = Job(router, "decode", "bad", fails)
            await here(router, 3)
            good._act = counts
            for number in range(1, 4):
                assert (await router.ask())[1][-1].get("finished")
                assert bad.kinds().count("expect") == number
            hangs.cancel()
            await asyncio.gather(hangs, return_exceptions=True)

    run(test())


def test_a_job_that_makes_too_much_is_cut_short() -> None:
    def makes_ten(job: Job, fields: dict[str, Any]) -> None:
        job.link.send("tokens", items=[[fields["request"], [7] * 10]])
        job.link.send("finished", request=fields["request"], why="length")

    async def test() -> None:
        async with routing() as router:
            Job(router, "prefill", "p", sends)
            Job(router, "decode", "d", makes_ten)
            await here(router, 2)
            assert (await router.ask())[1][0]["tokens"] == [7, 7, 7]

    run(test())


def test_a_job_that_dies_before_it_says_that_it_is_done() -> None:
    def says_no_end(job: Job, fields: dict[str, Any]) -> None:
        job.link.send("tokens", items=[[fields["request"], [7] * fields["max_tokens"]]])

    async def test() -> None:
        async with routing() as router:
            Job(router, "prefill", "p", sends)
            decode = Job(router, "decode", "d", says_no_end)
            await here(router, 2)
            asked = asyncio.create_task(router.ask())
            made = router.router.metrics.tokens
            await until(lambda: made._value.get() == 3)
            await decode.die()
            _, events, _ = await asked
            assert events[0]["tokens"] == [7, 7, 7]
            assert events[-1] == {"finished": True, "tokens_made": 3}

    run(test())


def test_who_has_left_takes_no_room() -> None:
    async def test() -> None:
        async with routing(waiting=2) as router:
            Job(router, "prefill", "p", sends)
            decode = Job(router, "decode", "d", capacity=1)
            await here(router, 2)
            first = asyncio.create_task(router.ask())
            await until(lambda: bool(decode.told))
            gone = [asyncio.create_task(router.ask()) for _ in range(2)]
            await until(lambda: router.router.jobs.waiting == 2)
            for task in gone:
                task.cancel()
            await until(lambda: router.router.jobs.waiting == 0)
            status, (refusal,), _ = await router.ask(timeout_s=0.3)
            assert (status, refusal["error"]["reason"]) == (504, "deadline")
            first.cancel()
            await asyncio.gather(first, *gone, return_exceptions=True)

    run(test())


def test_failures_have_names() -> None:
    def refuses(job: Job, fields: dict[str, Any]) -> None:
        again = fields["options"].get("again", False)
        job.link.send("failed", request=fields["request"], why="no heads", again=again)

    async def test() -> None:
        async with routing(attempts=2) as router:
            status, (refusal,), headers = await router.ask()
            assert status == 503
            assert refusal["error"]["reason"] == "no_jobs"
            assert "no prefill and no decode job" in refusal["error"]["message"]
            assert headers["Retry-After"] == "1"
            Job(router, "prefill", "p", refuses)
            decode = Job(router, "decode", "d")
            await here(router, 2)
            status, (refusal,), _ = await router.ask()
            assert (status, refusal["error"]["reason"]) == (502, "failed")
            assert "prefill job p: no heads" in refusal["error"]["message"]
            await until(lambda: decode.kinds() == ["expect", "cancel"])
            _, (refusal,), _ = await router.ask(options={"again": True})
            assert "2 tries failed" in refusal["error"]["message"]
            await until(lambda: decode.kinds() == ["expect", "cancel"] * 3)

    run(test())


def test_a_request_ends_at_its_deadline() -> None:
    async def test() -> None:
        async with routing() as router:
            jobs = [Job(router, role, role) for role in ("prefill", "decode")]
            await here(router, 2)
            status, (refusal,), _ = await router.ask(timeout_s=0.2)
            assert (status, refusal["error"]["reason"]) == (504, "deadline")
            assert "0 tokens were made in 0." in refusal["error"]["message"]
            await until(lambda: all("cancel" in job.kinds() for job in jobs))
            # A job dies, and none comes in its place.
            asked = asyncio.create_task(router.ask(timeout_s=3.0))
            await until(lambda: len(jobs[0].told) == 3)
            await jobs[0].die()
            _, (refusal,), _ = await asked
            assert refusal["error"]["reason"] == "deadline"
            assert "no prefill job is here" in refusal["error"]["message"]
            assert "job prefill: lost" in refusal["error"]["message"]

    run(test())


def test_more_than_there_is_room_for_is_refused() -> None:
    async def test() -> None:
        async with routing(waiting=2) as router:
            Job(router, "prefill", "p", sends)
            decode = Job(router, "decode", "d", capacity=1)
            await here(router, 2)
            asked = [asyncio.create_task(router.ask()) for _ in range(3)]
            await until(lambda: router.router.jobs.waiting == 2)
            status, (refusal,), headers = await router.ask()
            assert (status, headers["Retry-After"]) == (429, "1")
            assert refusal["error"]["reason"] == "full"
            # The others get their turn, one after the other.
            answered: list[Any] = []
            for _ in range(3):
                await until(lambda: decode.kinds().count("expect") > len(answered))
                answered.append(decode.told[-1][1])
                counts(decode, answered[-1])
            for task in asked:
                assert (await task)[1][-1].get("finished")

    run(test())


def test_jobs_leave_come_back_and_hang() -> None:
    async def test() -> None:
        async with routing(heartbeat_s=0.5) as router:
            first = Job(router, "prefill", "p", sends)
            Job(router, "decode", "d", counts)
            await here(router, 2)
            assert (await router.page("/health"))[0] == 200
            first.link.send("leaving")
            await until(lambda: router.router.jobs.by_name["p"].leaving)
            _, (refusal,), _ = await router.ask(timeout_s=0.2)
            assert refusal["error"]["reason"] == "deadline"
            # One with the same name gets its place, once that is empty.
            second = Job(router, "prefill", "p", sends)
            await first.die()
            await until(
                lambda: any(not job.leaving for job in router.router.jobs.of("prefill"))
            )
            assert (await router.ask())[1][-1].get("finished")
            second.link.close()
            await second.task
            # A job that does not answer is lost, though its connection is there.
            headers = {"Authorization": f"Bearer {TOKEN}"}
            url = f"{router.url}/jobs"
            async with router.session.ws_connect(
                url, headers=headers, autoping=False
            ) as hangs:
                await hangs.send_str(hello(name="p"))
                await here(router, 2)
                await here(router, 1)
            status, text = await router.page("/health")
            assert (status, json.loads(text)["missing"]) == (503, ["prefill"])

    run(test())


def test_a_job_waits_for_its_router_and_comes_back() -> None:
    async def test() -> None:
        async with routing() as router:
            job = Job(router, "prefill", "p", sends)
            await here(router, 1)
            router.router.jobs.by_name["p"].close("the test says so")
            await until(lambda: job.losses == 1)
            await here(router, 1)
            with pytest.raises(FabricError, match="wants another token"):
                await serve.JobLink(
                    router.url,
                    token="other",
                    role="decode",
                    name="d",
                    capacity=1,
                    on_message=print,
                ).run()

    run(test())


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[]",
        "[" * 100,
        hello(kind="tokens"),
        hello(version=0),
        hello(role="router"),
        hello(name=""),
        hello(name="x" * 2000),
        hello(capacity=0),
        hello(capacity=True),
        hello(addresses=["xyz"]),
        hello(addresses=["00"] * 2000),
        hello(more=1),
        b"bytes",
    ],
    ids=range(14),
)
def test_who_says_no_proper_hello_is_no_job(said: str | bytes) -> None:
    async def test() -> None:
        async with routing() as router:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            url = f"{router.url}/jobs"
            async with router.session.ws_connect(url, headers=headers) as socket:
                if isinstance(said, bytes):
                    await socket.send_bytes(said)
                else:
                    await socket.send_str(said)
                assert json.loads((await socket.receive()).data)["kind"] == "refused"
                assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
            assert not router.router.jobs.by_name

    run(test())


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "cancel", "request": 1},
        {"kind": "sent", "request": -1},
        {"kind": "sent", "request": 1 << 64},
        {"kind": "tokens", "items": [[1, ["x"]]]},
        {"kind": "tokens", "items": [1]},
        {"kind": "failed", "request": 1, "why": 3, "again": True},
        {"kind": "state", "addresses": [], "numbers": {"a b": 1}},
        {"kind": "state", "addresses": [], "numbers": {"a": -1}},
    ],
    ids=lambda message: message["kind"],
)
def test_a_job_that_talks_nonsense_is_lost(message: dict[str, Any]) -> None:
    async def test() -> None:
        async with routing() as router:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            url = f"{router.url}/jobs"
            async with router.session.ws_connect(url, headers=headers) as socket:
                await socket.send_str(hello())
                await here(router, 1)
                await socket.send_str(json.dumps({"kind": "sent", "request": 5}))
                await socket.send_str(json.dumps(message))
                await here(router, 0)

    run(test())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"max_tokens": 3}',
        b'{"tokens": [], "max_tokens": 3}',
        b'{"tokens": [-1]}',
        b'{"tokens": [1], "prompt": "a"}',
        b'{"prompt": 3}',
        b'{"tokens": [1], "max_tokens": 0}',
        b'{"tokens": [1, 2], "max_tokens": 262143}',
        b'{"tokens": [1], "timeout_s": NaN}',
        b'{"tokens": [1], "timeout_s": -1}',
        b'{"tokens": [1], "timeout_s": 1' + b"0" * 400 + b"}",
        b'{"tokens": [1], "options": {"a": 1' + b"0" * 400 + b"}}",
        b'{"tokens": [1], "temperature": 1}',
        b'{"tokens": [1], "options": {"a": [1]}}',
        b'"' + b"x" * (3 << 20) + b'"',
    ],
    ids=range(16),
)
def test_bad_requests_are_told_so(body: bytes) -> None:
    async def test() -> None:
        async with routing() as router:
            url = f"{router.url}/generate"
            async with router.session.post(url, data=io.BytesIO(body)) as response:
                assert response.status == 400
                assert (await response.json())["error"]["reason"] == "bad_request"

    run(test())


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="token must not be empty"):
        serve.create_app(serve.Router(), token="")
    with pytest.raises(ValueError, match="attempts=0"):
        serve.Router(attempts=0)
    with pytest.raises(_messages.MessageError, match="role is not"):
        serve.JobLink(
            "http://h", token="t", role="both", name="n", capacity=1, on_message=print
        )


def test_the_program_on_the_page_about_serving(tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    (part,) = blocks(ROOT / "docs/serving.md")
    program.write_text(part)
    assert '"text": "IBM"' in run_child(str(program))
