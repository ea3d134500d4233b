"""What one that hangs, or gives up, holds of what all share: room, and ids."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kv_cases import connected, content, fill, layout, send_all, sides, taken
from transfer_cases import TRANSPORTS, engine, until

import jaxfabric as jf
from jaxfabric.kv import State
from jaxfabric.kv._pages import IDS_BEGIN, IdPairs
from jaxfabric.kv._shares import Shares

TOKENS = 10


def test_shares() -> None:
    shares = Shares(16)
    assert shares.has_room([1], 100)  # it holds nothing
    for _ in range(12):
        assert shares.has_room([1], 1)
        shares.take([1], 1)
    assert not shares.has_room([1], 1)  # three quarters
    for _ in range(3):
        assert shares.has_room([2], 1)
        shares.take([2], 1)
    assert not shares.has_room([2], 1)  # three quarters of what is left
    assert not shares.has_room([1, 3], 1)
    assert shares.has_room([3], 1)
    shares.give([2], 3)
    shares.give([1], 4)
    assert shares.has_room([1], 4)
    assert not shares.has_room([1], 5)
    assert (shares.used, shares.held(1), shares.held(2)) == (8, 8, 0)
    shares.take([1, 2], 1)  # of both
    assert (shares.used, shares.held(1), shares.held(2)) == (9, 9, 1)


def test_a_receiver_that_grants_nothing_holds_up_nobody_else() -> None:
    with sides("shm", [layout()], [layout()] * 2, requests=4, waiting=12) as (
        (tx,),
        (hangs, works),
    ):
        first = connected(tx, hangs)
        stuck = []
        for i in range(12):  # 3 of 4 places, and 9 of 12 that wait
            stuck.append(tx.begin(i, first, pages=[0], num_tokens=4, timeout_s=60))
        with pytest.raises(jf.CapacityError, match="9 requests wait for their turn"):
            tx.begin(12, first, pages=[0], num_tokens=4)
        # Its successor comes only now.
        second = connected(tx, works)
        for i in range(100, 112):
            with works.expect(i, TOKENS) as request:
                sending = tx.begin(i, second, pages=[0, 1, 2], num_tokens=TOKENS)
                send_all(sending, 3)
                request.result(5)
                sending.result(5)
        assert not any(sending.done() for sending in stuck)
        for sending in stuck:
            sending.cancel()
        assert tx.stats() == {"requests": 0, "waiting": 0, "bytes": 0, "receivers": 2}


def test_a_sender_that_hangs_keeps_no_other_one_from_its_grants() -> None:
    with (
        engine() as a,
        engine(name="hangs") as b,
        engine(name="works") as c,
        jf.kv.PageReceiver(a, layout(), tails=4) as rx,
        jf.kv.PageSender(b, layout()) as hangs,
        jf.kv.PageSender(c, layout()) as works,
    ):
        first, second = connected(hangs, rx), connected(works, rx)
        stuck = []
        for i in range(5):
            rx.expect(i, 4)
            stuck.append(hangs.begin(i, first, pages=[0], num_tokens=4))
        until(lambda: len(rx._on_slot) == 2)
        for i in range(10, 13):
            with rx.expect(i, 4) as request:
                send_all(works.begin(i, second, pages=[0], num_tokens=4), 3)
                request.result(5)
        for sending in stuck:  # those that waited have their turn
            send_all(sending, 3)
        for sending in stuck:
            sending.result(5)
        until(lambda: rx._slots.free == 4)


class Hangs:
    """The future of a write that does not end before it is told to."""

    def __init__(self, error: jf.FabricError | None = None) -> None:
        self._error = error or jf.FabricError("it was cut off")
        self._callbacks: list[Callable[[Any], object]] = []

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        self._callbacks.append(callback)

    def exception(self, _: float) -> jf.FabricError:
        return self._error

    def cancel(self) -> None:
        return None

    def end(self) -> None:
        for callback in self._callbacks:
            callback(self)


def test_writes_that_hang_hold_up_no_other_receiver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    piece = TOKENS * 256  # bytes of a layer
    with sides("shm", [layout()], [layout()] * 2, bytes_max=3 * piece) as (
        (tx,),
        (hangs, works),
    ):
        first, second = connected(tx, hangs), connected(tx, works)
        write = tx.engine.submit_paged_writes
        pool = tx._targets[first].pool
        hanging: list[Hangs] = []

        def writes(
            source: Any, pages: Any, target: Any, *rest: Any, **more: Any
        ) -> Any:
            if target is not pool:
                return write(source, pages, target, *rest, **more)
            hanging.append(Hangs())
            return hanging[-1]

        monkeypatch.setattr(tx.engine, "submit_paged_writes", writes)
        for i in range(4):
            hangs.expect(i, TOKENS)
            sending = tx.begin(i, first, pages=[0, 1, 2], num_tokens=TOKENS)
            send_all(sending, 3)
        until(lambda: len(hanging) == 2)  # and no room for a third
        for i in range(100, 106):
            with works.expect(i, TOKENS) as request:
                sending = tx.begin(i, second, pages=[0, 1, 2], num_tokens=TOKENS)
                send_all(sending, 3)
                request.result(5)
                sending.result(5)
        assert tx.stats()["bytes"] == 2 * piece
        for i in range(4):
            tx._requests[i].cancel()
        for each in hanging:
            each.end()
        assert tx.stats()["bytes"] == tx.stats()["requests"] == 0


def test_a_request_that_is_cancelled_before_its_turn_ends_at_the_receiver() -> None:
    """It waits for a place at the sender, or for a tail's slot at the receiver."""
    for places, tails in ((1, 8), (8, 1)):
        with (
            engine() as a,
            engine() as b,
            jf.kv.PageReceiver(a, layout(), tails=tails) as rx,
            jf.kv.PageSender(b, layout(), requests=places) as tx,
        ):
            peer = connected(tx, rx)
            requests = [rx.expect(i, 4) for i in range(2)]
            sent = [tx.begin(i, peer, pages=[i], num_tokens=4) for i in range(2)]
            until(lambda: requests[0].state is State.MOVING)  # noqa: B023
            if tails == 1:
                until(lambda: rx._on_slot)
            assert sent[1].cancel()
            with pytest.raises(jf.FabricError, match="cancelled by the sender"):
                requests[1].result(5)
            until(lambda: rx.stats()["free"] == 23)
            send_all(sent[0], 3)
            requests[0].result(5)
            requests[0].release()
            sent[0].result(5)
            until(lambda: rx.stats()["free"] == 24)
            assert rx._slots.free == tails


# --- Ids ---------------------------------------------------------------------


def test_ids_that_are_not_used_again_hold_little() -> None:
    pairs = 1 << 16
    tracemalloc.start()
    try:
        ids = IdPairs(0, 2 * pairs)
        for _ in range(pairs):
            ids.give(ids.take(), clean=False)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2 * pairs  # bytes
    with pytest.raises(jf.CapacityError, match="all ids are used up"):
        ids.take()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_ids_of_cancelled_requests_are_used_again(transport: str, side: str) -> None:
    """All that was written of them is known, and was counted."""
    with sides(transport, [layout()], [layout()]) as ((tx,), (rx,)):
        rx._ids = IdPairs(IDS_BEGIN, IDS_BEGIN + 6)
        peer = connected(tx, rx)
        for turn in range(12):
            request = rx.expect(turn, TOKENS)
            sending = tx.begin(turn, peer, pages=[0, 1, 2], num_tokens=TOKENS)
            until(lambda: sending._legs[0].state is State.MOVING)  # noqa: B023
            for layer in range(turn % 4):
                sending.send(layer)
            until(lambda: tx.stats()["bytes"] == 0)
            assert (sending if side == "sender" else request).cancel()
            until(lambda: rx.stats()["free"] == 24)
            until(lambda: rx._ids.free == 3)
        # Nothing is left of them that could be taken for a part of this.
        cache = content(layout(), TOKENS, 1)
        fill(tx.pool, tx.layout, [0, 1, 2], cache)
        for turn in range(3):
            with rx.expect(turn, TOKENS) as request:
                sending = tx.begin(turn, peer, pages=[0, 1, 2], num_tokens=TOKENS)
                until(lambda: sending._legs[0].state is State.MOVING)  # noqa: B023
                sending.send(0)
                until(lambda: tx.stats()["bytes"] == 0)
                sending.send(1)
                sending.send(2)
                assert not request.done()
                sending.send_tail(b"tail")
                request.result(10)
                np.testing.assert_array_equal(
                    taken(rx.pool, rx.layout, request.pages, TOKENS), cache
                )


def test_ids_of_writes_with_unknown_ends_are_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with sides("shm", [layout()], [layout()]) as ((tx,), (rx,)):
        rx._ids = IdPairs(IDS_BEGIN, IDS_BEGIN + 6)
        peer = connected(tx, rx)
        hangs = Hangs()
        monkeypatch.setattr(tx.engine, "submit_paged_writes", lambda *_, **__: hangs)
        rx.expect(1, TOKENS)
        sending = tx.begin(1, peer, pages=[0, 1, 2], num_tokens=TOKENS)
        sending.send(0)
        until(lambda: tx.stats()["bytes"])
        sending.cancel()
        assert rx.stats()["free"] == 21
        hangs.end()
        until(lambda: rx.stats()["free"] == 24)
        assert rx._ids.free == 2


def test_another_receiver_on_the_engine_takes_no_counts_of_the_first_one() -> None:
    with sides("shm", [layout()], [layout()]) as ((tx,), (rx,)):
        for number in range(2):
            peer = connected(tx, rx)
            request = rx.expect(number, TOKENS)
            sending = tx.begin(number, peer, pages=[0, 1, 2], num_tokens=TOKENS)
            until(lambda: sending._legs[0].state is State.MOVING)  # noqa: B023
            assert rx.engine.imm_count(sending._legs[0].id) == 0
            for layer in range(3):
                sending.send(layer)
            until(lambda: rx.engine.imm_count(sending._legs[0].id) == 3)  # noqa: B023
            if number == 0:
                rx.close()
                assert request.done()
                sending.exception(5)
                tx.close()
                tx = jf.kv.PageSender(tx.engine, tx.layout, pool=tx._memory.region)
                rx = jf.kv.PageReceiver(rx.engine, rx.layout, pool=rx._memory.region)
        tx.close()
        rx.close()


def test_the_loss_of_a_peer_is_named_though_a_later_write_was_refused_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with sides("shm", [layout()], [layout()]) as ((tx,), (rx,)):
        peer = connected(tx, rx)
        first = Hangs(jf.PeerLostError("the peer is silent", (peer,)))

        posted: list[Hangs] = []

        def writes(*_: Any, **__: Any) -> Any:
            if posted:
                raise jf.FabricError("an earlier transfer ended badly")
            posted.append(first)
            return first

        monkeypatch.setattr(tx.engine, "submit_paged_writes", writes)
        with rx.expect(1, TOKENS):
            sending = tx.begin(1, peer, pages=[0, 1, 2], num_tokens=TOKENS)
            for number in range(2):
                sending.send(number)
            until(lambda: sending._failure is not None)
            first.end()
            with pytest.raises(jf.PeerLostError, match="silent"):
                sending.result(5)
