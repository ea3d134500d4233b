"""Router and jobs as processes: right answers under load, cancels, and kill -9."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from serving_cases import all_pages_free, fleet, load, questions

DEADLINE_S = 40.0
Serving = tuple["fleet.Fleet", "load.Questions"]


@pytest.fixture(
    scope="module",
    params=["shm", pytest.param("ofi/tcp", marks=pytest.mark.slow)],
)
def serving(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """Prefill on 2 ranks and on 1, decode on 1 and on 2: all pairs are used."""
    folder = tmp_path_factory.mktemp("serving")
    file, asked = questions(folder)
    options = {"transport": request.param, "capacity": "16"}
    if request.param != "shm":
        options["nics"] = "lo"
    with fleet.Fleet(folder, sizes="tiny", weights=file, **options) as running:
        running.start("prefill", "prefill2", ranks=2)
        running.start("prefill", "prefill1", ranks=1)
        running.start("decode", "decode1", ranks=1)
        running.start("decode", "decode2", ranks=2)
        running.wait_for(prefill=2, decode=2)
        yield running, asked


def ask(serving: Serving, **options: int) -> load.Report:
    running, asked = serving
    return asyncio.run(
        load.run(running, asked, requests=64, timeout_s=DEADLINE_S, **options)
    )


def test_answers_are_equal_token_for_token_under_load(serving: Serving) -> None:
    running, _ = serving
    for _ in range(2):  # while programs are compiled, and when they are there
        report = ask(serving, cancel_every=4)
        assert (report.right, report.cancelled) == (48, 16), str(report)
        all_pages_free(running)
    # All pairs of sizes worked together: decode1 has heard of all ranks that prefill,
    # the leader of decode2 of one rank of each job.
    senders = {
        job["name"]: job["numbers"].get("kv_senders")
        for job in running.health()["jobs"]
    }
    assert (senders["decode1"], senders["decode2"]) == (3, 2), senders


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_job_costs_no_answer(serving: Serving, role: str) -> None:
    running, asked = serving
    name = f"{role}2"
    failed_before = running.metric("jaxfabric_serve_attempts_failed_total")

    async def kill_in_the_middle() -> load.Report:
        under_load = asyncio.create_task(
            load.run(running, asked, requests=64, timeout_s=DEADLINE_S)
        )
        begin = running.metric("jaxfabric_serve_tokens_total")
        while running.metric("jaxfabric_serve_tokens_total") < begin + 64:
            await asyncio.sleep(0.02)
        running.kill(name)
        return await under_load

    report = asyncio.run(kill_in_the_middle())
    assert report.right == 64, str(report)
    assert running.metric("jaxfabric_serve_attempts_failed_total") > failed_before
    all_pages_free(running)
    running.start(role, name, ranks=2)  # and it comes back
    running.wait_for(prefill=2, decode=2)
    assert ask(serving).right == 64
    all_pages_free(running)


def test_without_any_prefill_job_requests_fail_with_a_reason(serving: Serving) -> None:
    running, asked = serving
    for name in ("prefill1", "prefill2"):
        running.kill(name)
    until = time.monotonic() + 10
    while "prefill" not in running.health()["missing"]:
        assert time.monotonic() < until
        time.sleep(0.05)
    report = asyncio.run(load.run(running, asked, requests=4))
    assert [error.reason for error in report.failed] == ["no_jobs"] * 4
    all_pages_free(running)
