"""The example's prefill job: what one that hangs does to those that go elsewhere."""

from __future__ import annotations

import argparse
import queue
import time
from typing import Any

import pytest
import serving_cases  # noqa: F401  (where the example is)
from kv_cases import connected, layout, sides
from transfer_cases import engine

import jaxfabric as jf

prefill_job = pytest.importorskip("prefill_job")


class Ranks:
    """The only rank."""

    rank, count, leads = 0, 1, True

    def __init__(self) -> None:
        self.reports: list[tuple[str, dict[str, Any]]] = []

    def report(self, kind: str, **fields: Any) -> None:
        self.reports.append((kind, fields))


def test_a_decode_job_that_hangs_holds_up_a_prefill_job_for_a_moment_only() -> None:
    """The leader has one thread; a request has a minute."""
    with (
        sides("shm", [layout()], [layout()]) as ((sender,), (receiver,)),
        engine("shm", name="hangs") as hangs,
    ):
        ranks = Ranks()
        worker = prefill_job.Worker.__new__(prefill_job.Worker)
        worker.sender, worker._ranks, worker._sendings = sender, ranks, {}
        worker._options = argparse.Namespace(peer_timeout_s=0.5)
        worker.pages_each = 3
        begin = time.monotonic()
        # It takes a connection, and never says what a PageReceiver would.
        worker.begin(1, 10, 0, [hangs.address().to_bytes().hex()], 60.0)
        assert 0.4 < time.monotonic() - begin < 4.0
        ((kind, told),) = ranks.reports
        assert (kind, told["request"], told["again"]) == ("begun", 1, True)
        assert "no PageReceiver answered" in told["why"]
        # The next one goes elsewhere, and has its whole time for that.
        connected(sender, receiver)
        address = receiver.engine.address().to_bytes().hex()
        with receiver.expect(2, 10):
            worker.begin(2, 10, 1, [address], 60.0)
            assert ranks.reports[-1][1]["why"] == ""
            sending: jf.kv.Sending = worker._sendings[2]
            assert 59.0 < sending.timeout_s <= 60.0
            sending.cancel()


class Stub:
    """Whatever else a leader calls, which does nothing."""

    regions, pages_each, timeout_s = 4, 3, 0.3

    def __getattr__(self, _: str) -> Any:
        return lambda *_, **__: None


def test_a_job_with_a_rank_that_hangs_ends_before_a_client_with_patience_does() -> None:
    ranks = Ranks()
    ranks.count = 2
    ranks.inbox = queue.SimpleQueue()  # type: ignore[attr-defined]
    ranks.tell = lambda *_, **__: None  # type: ignore[attr-defined]
    leader = prefill_job.Leader(ranks, Stub(), Stub())
    begin = time.monotonic()
    with pytest.raises(SystemExit, match="a rank does not answer"):
        leader._begin((1, 10, 0, [], 20.0))
    assert time.monotonic() - begin < 5
