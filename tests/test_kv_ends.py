"""jf.kv beside engines that were closed, and receivers that die or do not answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from kv_cases import connected, layout, sides
from transfer_cases import engine, until

import jaxfabric as jf


def test_a_receiver_that_is_lost_while_it_is_greeted_is_named_at_once() -> None:
    """Not after the time limit of the connect."""
    with (
        engine() as a,
        engine(name="silent") as silent,
        jf.kv.PageSender(a, layout()) as tx,
    ):
        begin = time.monotonic()
        outcome = tx.connect(silent.address(), 30.0)
        until(lambda: tx._connecting)
        silent.close()
        with pytest.raises(jf.PeerLostError, match=r"connect: .*silent"):
            outcome.result(10)
        assert time.monotonic() - begin < 10
        assert not tx._connecting


def test_who_does_not_answer_leaves_nothing_behind() -> None:
    with sides("shm", [layout()], [layout()]) as ((tx,), (rx,)):
        with engine(name="silent") as silent:
            for _ in range(3):
                with pytest.raises(jf.DeadlineError, match="no PageReceiver answered"):
                    tx.connect(silent.address(), 0.1).result()
            assert not tx._connecting
        connected(tx, rx)
        assert not tx._connecting


@pytest.mark.parametrize("act", ["begin", "expect"])
def test_what_begins_on_a_closed_engine_leaves_nothing_behind(act: str) -> None:
    with sides("shm", [layout()], [layout()]) as ((tx,), (rx,)):
        peer = connected(tx, rx)
        calls: dict[str, tuple[Any, Callable[[], Any]]] = {
            "begin": (tx, lambda: tx.begin(1, peer, pages=[0], num_tokens=4)),
            "expect": (rx, lambda: rx.expect(1, 4)),
        }
        side, call = calls[act]
        side.engine.close()
        for _ in range(2):
            with pytest.raises(jf.FabricError, match="closed"):
                call()
        assert rx.stats()["free"] == 24
        assert tx.stats()["requests"] == tx.stats()["waiting"] == 0
        side.close()
