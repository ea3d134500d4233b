"""jf.kv over real engines: what arrives, what is refused, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Any

import numpy as np
import pytest
from kv_cases import (
    connected,
    content,
    fill,
    layout,
    send_all,
    sides,
    taken,
)
from transfer_cases import TRANSPORTS, engine, until

import jaxfabric as jf
from jaxfabric.kv import State

TOKENS = 10  # two and a half pages


def one(transport: str = "shm", **options: Any) -> Any:
    """A sender and a receiver."""
    return sides(transport, [layout()], [layout()], **options)


# --- What arrives ------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_another_tensor_parallel_degree(transport: str, ours: int, theirs: int) -> None:
    bridge(transport, ours, theirs)


@pytest.mark.parametrize(("ours", "theirs"), [(8, 1), (1, 8), (8, 4)])
def test_more_processes_than_heads(ours: int, theirs: int) -> None:
    bridge("shm", ours, theirs)


def bridge(transport: str, ours: int, theirs: int) -> None:
    tx_layouts = [layout(tp_size=ours, tp_rank=rank) for rank in range(ours)]
    rx_layouts = [
        layout(tp_size=theirs, tp_rank=rank, page_tokens=6) for rank in range(theirs)
    ]
    with sides(transport, tx_layouts, rx_layouts) as (tx, rx):
        cache = content(layout(), TOKENS, 1)
        requests = [each.expect(1 << 63, TOKENS) for each in rx]
        sent = []
        for sender in tx:
            fill(sender.pool, sender.layout, [7, 2, 9], cache)
            peers = [
                connected(sender, receiver)
                for receiver in rx
                if sender.layout.tp_rank in jf.kv.source_ranks(ours, receiver.layout)
            ]
            if not peers:  # another replica sends
                continue
            sending = sender.begin(1 << 63, peers, pages=[7, 2, 9], num_tokens=TOKENS)
            send_all(sending, 3, b"tail of %d" % sender.layout.tp_rank)
            sent.append(sending)
        for receiver, request in zip(rx, requests, strict=True):
            request.result()
            heads = receiver.layout.local_heads
            np.testing.assert_array_equal(
                taken(receiver.pool, receiver.layout, request.pages, TOKENS),
                cache[:, :, :, heads.start : heads.stop],
            )
            first = jf.kv.source_ranks(ours, receiver.layout)[0]
            assert request.tail == b"tail of %d" % first
            assert request.failed_pages == ()
            assert request.state is State.COMPLETE
            request.release()
            request.release()
            assert receiver.stats()["free"] == receiver.layout.pages
        for sending in sent:
            sending.result()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_requests_in_any_order(transport: str) -> None:
    with one(transport, requests=5, bytes_max=5000) as ((tx,), (rx,)):
        peer = connected(tx, rx)
        cache = content(layout(), 4 * 24, 2)
        fill(tx.pool, tx.layout, range(24), cache)
        ids = [i << 56 | i for i in range(24)]
        early = {i: rx.expect(i, 4) for i in ids[:8]}
        sent = []
        for place, i in reversed(list(enumerate(ids))):
            sent.append(tx.begin(i, peer, pages=[place], num_tokens=4))
            send_all(sent[-1], 3, bytes([place]))
        received = early | {i: rx.expect(i, 4) for i in ids[8:]}
        for place, i in enumerate(ids):
            received[i].result()
            assert received[i].tail == bytes([place])
            np.testing.assert_array_equal(
                taken(rx.pool, rx.layout, received[i].pages, 4),
                cache[:, place * 4 : place * 4 + 4],
            )
        for sending in sent:
            sending.result()
        assert tx.stats() == {"requests": 0, "waiting": 0, "bytes": 0, "receivers": 1}


def test_chunks_and_short_prompts() -> None:
    with one(whole_tokens=6) as ((tx,), (rx,)):
        peer = connected(tx, rx)
        for num_tokens in (5, 10):
            cache = content(layout(), num_tokens, num_tokens)
            pages = [11, 3, 5][: tx.layout.pages_for(num_tokens)]
            fill(tx.pool, tx.layout, pages, cache)
            with rx.expect(1, num_tokens) as request:
                sending = tx.begin(1, peer, pages=pages, num_tokens=num_tokens)
                before = tx.engine.stats()["operations"]
                for first, last in ((3, num_tokens), (0, 3)):
                    for layer in range(3):
                        sending.send(layer, (first, last))
                sending.send_tail()
                request.result()
                sending.result()
                np.testing.assert_array_equal(
                    taken(rx.pool, rx.layout, request.pages, num_tokens), cache
                )
            if num_tokens == 5:  # OPEN and END are messages, or were before
                assert tx.engine.stats()["operations"] - before <= 2 + 2
            with pytest.raises(jf.FabricError, match="not under way"):
                sending.send(0)


def test_under_asyncio() -> None:
    with one() as ((tx,), (rx,)):

        async def serve() -> None:
            peer = await tx.connect(rx.engine.address())
            assert await tx.connect(rx.engine.address()) == peer
            request = rx.expect(1, 4)
            sending = tx.begin(1, peer, pages=[0], num_tokens=4)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(_awaited(request), 0.05)
            send_all(sending, 3)  # whoever gave up waiting gave up nothing else
            await asyncio.gather(_awaited(sending), _awaited(request))

        asyncio.run(serve())


async def _awaited(outcome: jf.kv.Outcome) -> None:
    await outcome


def test_a_pool_of_the_callers() -> None:
    with engine("ofi/tcp") as a, engine("ofi/tcp") as b:
        mine = np.zeros(layout().shape, np.float32)
        rx = jf.kv.PageReceiver(a, layout(), pool=mine)
        assert rx.pool.base is not None
        assert np.shares_memory(rx.pool, mine)
        with pytest.raises(ValueError, match="has 4 bytes, the layout"):
            jf.kv.PageSender(b, layout(), pool=np.zeros(1, np.float32))
        with pytest.raises(jf.FabricError, match="a TransferEngine of its own"):
            jf.kv.PageReceiver(a, layout())
        rx.close()
        jf.kv.PageReceiver(a, layout()).close()


# --- What is refused ---------------------------------------------------------


def test_a_handshake_names_both_values() -> None:
    with sides("shm", [layout(dtype="bfloat16")], [layout()]) as ((tx,), (rx,)):
        with pytest.raises(jf.PlanMismatchError) as caught:
            connected(tx, rx)
        assert "dtype is 'bfloat16' at the sender and 'float32'" in str(caught.value)
    with one() as ((tx,), (rx,)), engine() as other:
        with pytest.raises(jf.DeadlineError, match="no PageReceiver answered"):
            tx.connect(other.address(), 1.0).result()
        with jf.kv.PageSender(other, layout()):
            with pytest.raises(jf.PlanMismatchError, match="peer is a PageSender"):
                tx.connect(other.address()).result()


def test_strangers_harm_nobody() -> None:
    with one() as ((tx,), (rx,)), engine() as stranger:
        to = stranger.connect(rx.engine.address()).result()
        back = stranger.connect(tx.engine.address()).result()
        request = rx.expect(1, 4)
        for text in (
            b"nonsense",
            b'{"kind":"open","leg":0,"request":1,"tokens":4}',
            b'{"kind":"end","leg":0,"well":true,"failed":[],"why":""}',
            b'{"kind":"cancel","leg":0,"why":""}',
            b'{"kind":"grant","leg":0,"pages":[0],"id":0,"slot":0}',
            b'{"kind":"hello","version":9,"sender":1,"layout":{},"process":{}}',
            b'{"kind":"hello","version":2,"sender":1,"layout":{},"process":{}}',
            b'{"kind":"bye"}',
        ):
            stranger.submit_send(to, text).result()
            stranger.submit_send(back, text).result()
        peer = connected(tx, rx)
        send_all(tx.begin(1, peer, pages=[0], num_tokens=4), 3)
        request.result()


def test_a_peer_that_counts_under_timers_stops_none() -> None:
    with one() as ((tx,), (rx,)):
        peer = connected(tx, rx)
        request = rx.expect(1, 4, timeout_s=0.5)
        desc = tx._targets[peer].tails
        begin = 3 << 25
        for id in range(begin, begin + 20):
            tx.engine.submit_single_write(tx._tails, desc, id, nbytes=0).result()
        with pytest.raises(jf.DeadlineError, match="no sender has begun"):
            request.result(10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": (1 << 27) - 1},
        {"id": 1 << 63},
        {"slot": 1 << 63},
        {"slot": 256},
        {"pages": [0, 1]},
        {"pages": [24]},
    ],
    ids=str,
)
def test_a_malformed_grant_fails_the_request(wrong: dict[str, Any]) -> None:
    with one() as ((tx,), (rx,)):
        peer = connected(tx, rx)
        sending = tx.begin(1, peer, pages=[0], num_tokens=4)
        send_all(sending, 3)
        grant = {
            "leg": sending._legs[0].number,
            "pages": [0],
            "id": 1 << 26,
            "slot": 0,
            **wrong,
        }
        rx._waits.tell(next(iter(rx._senders)), "grant", **grant)
        with pytest.raises(jf.FabricError, match="malformed grant"):
            sending.result(10)
        assert tx.stats()["bytes"] == tx.stats()["requests"] == 0


def test_what_the_sides_do_not_agree_upon_fails_both() -> None:
    with one() as ((tx,), (rx,)):
        peer = connected(tx, rx)
        request = rx.expect(1, 9)
        sending = tx.begin(1, peer, pages=[0, 1], num_tokens=8)
        for outcome in (request, sending):
            with pytest.raises(jf.FabricError, match=r"8 tokens.*and 9 are expected"):
                outcome.result()
        assert rx.stats()["free"] == 24


def test_bad_calls_are_refused() -> None:
    with one(waiting=1, requests=1) as ((tx,), (rx,)):
        peer = connected(tx, rx)
        for bad in (-1, 1 << 64, "1"):
            with pytest.raises(ValueError, match="request_id="):
                rx.expect(bad, 1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="num_tokens=0"):
            rx.expect(1, 0)
        with pytest.raises(jf.CapacityError, match="25 pages are wanted, and 24"):
            rx.expect(1, 97)
        rx.expect(1, 1)
        with pytest.raises(jf.FabricError, match="expected already"):
            rx.expect(1, 1)
        with pytest.raises(ValueError, match="4 tokens need 1 pages"):
            tx.begin(1, peer, pages=[0, 1], num_tokens=4)
        with pytest.raises(jf.PeerLostError, match="no receiver 77"):
            tx.begin(1, 77, pages=[0], num_tokens=4)
        with pytest.raises(ValueError, match="one receiver or several different"):
            tx.begin(1, [peer, peer], pages=[0], num_tokens=4)
        first = tx.begin(2, peer, pages=[0], num_tokens=4)
        tx.begin(3, peer, pages=[0], num_tokens=4)
        with pytest.raises(jf.CapacityError, match="1 requests wait"):
            tx.begin(4, peer, pages=[0], num_tokens=4)
        with pytest.raises(jf.FabricError, match="under way already"):
            tx.begin(2, peer, pages=[0], num_tokens=4)
        first.send(1, (0, 2))
        with pytest.raises(jf.FabricError, match="tokens 0 to 2 of it were sent"):
            first.send(1, (1, 3))
        with pytest.raises(jf.FabricError, match=r"layers \[0, 1, 2\] were not sent"):
            first.send_tail()
        for layer, tokens in ((3, None), (0, (0, 5)), (0, (2, 2))):
            with pytest.raises(ValueError, match="out of range"):
                first.send(layer, tokens)
        first.send(1, (2, 4))
        first.send(0)
        first.send(2)
        with pytest.raises(jf.CapacityError, match="there is room for 32768"):
            first.send_tail(bytes(32769))
        first.send_tail(bytes(32768))
        with pytest.raises(jf.FabricError, match="tail was sent"):
            first.send(0)


# --- How it ends -------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_cancel_from_either_side(transport: str) -> None:
    with one(transport) as ((tx,), (rx,)):
        peer = connected(tx, rx)
        for layers in range(3):
            for side in ("sender", "receiver"):
                request = rx.expect(1, TOKENS)
                sending = tx.begin(1, peer, pages=[0, 1, 2], num_tokens=TOKENS)
                for layer in range(layers):
                    sending.send(layer)
                until(lambda: request.state is State.MOVING)  # noqa: B023
                assert (sending if side == "sender" else request).cancel()
                for outcome in (request, sending):
                    with pytest.raises(
                        jf.FabricError, match=f"cancelled by the {side}"
                    ):
                        outcome.result()
                    assert not outcome.cancel()
                assert request.failed_pages == request.pages
                until(lambda: rx.stats()["free"] == 24)
                assert request.state is State.RELEASED


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_deadlines(transport: str) -> None:
    with one(transport) as ((tx,), (rx,)):
        peer = connected(tx, rx)
        request = rx.expect(1, TOKENS, timeout_s=0.1)
        with pytest.raises(
            jf.DeadlineError, match=r"no sender has begun, .* into 0\.1 s"
        ):
            request.result()
        sending = tx.begin(2, peer, pages=[0, 1, 2], num_tokens=TOKENS, timeout_s=0.1)
        with pytest.raises(jf.DeadlineError, match="does the receiver expect it"):
            sending.result()
        request = rx.expect(3, TOKENS, timeout_s=1.0)
        sending = tx.begin(3, peer, pages=[0, 1, 2], num_tokens=TOKENS)
        sending.send(0)
        with pytest.raises(jf.DeadlineError, match=r"tp_rank \[0\], \[\] are done"):
            request.result()
        with pytest.raises(jf.FabricError, match="the receiver says: expect"):
            sending.result()
        until(lambda: rx.stats()["free"] == 24)


def test_a_sender_that_comes_too_late_is_told() -> None:
    with one() as ((tx,), (rx,)):
        peer = connected(tx, rx)
        rx.expect(1, 4).cancel()
        late = tx.begin(1, peer, pages=[0], num_tokens=4)
        with pytest.raises(jf.FabricError, match="cancelled by the receiver"):
            late.result()


def test_failed_pages_are_reported_by_number() -> None:
    with one() as ((tx,), (rx,)):
        peer = connected(tx, rx)
        request = rx.expect(1, TOKENS)
        sending = tx.begin(1, peer, pages=[0, 1, 2], num_tokens=TOKENS)
        for layer in range(3):
            sending.send(layer, (0, 4 if layer else 8))
        until(lambda: tx.stats()["bytes"] == 0 and request.state is State.MOVING)
        until(lambda: len(sending._legs[0].done) == 3)
        sending.cancel()
        request.exception()
        assert request.failed_pages == request.pages[1:]


def test_a_request_may_be_tried_again_while_its_pages_drain() -> None:
    with one() as ((tx,), (rx,)):
        peer = connected(tx, rx)
        sending = tx.begin(1, peer, pages=[0], num_tokens=4)
        request = rx.expect(1, 4)
        until(lambda: request.state is State.MOVING)
        request.cancel()
        request = rx.expect(1, 4)
        sending.exception()
        cache = content(layout(), 4, 3)
        fill(tx.pool, tx.layout, [5], cache)
        sending = tx.begin(1, peer, pages=[5], num_tokens=4)
        send_all(sending, 3)
        request.result()
        np.testing.assert_array_equal(
            taken(rx.pool, rx.layout, request.pages, 4), cache
        )


def test_a_pages_of_a_sender_that_does_not_answer_are_not_used_again() -> None:
    """It answers only when its own writes have ended; here they never do."""
    with one() as ((tx,), (rx,)):
        peer = connected(tx, rx)
        request = rx.expect(1, TOKENS)
        sending = tx.begin(1, peer, pages=[0, 1, 2], num_tokens=TOKENS)
        until(lambda: request.state is State.MOVING)
        (leg,) = sending._legs
        leg.under_way += 1
        request.cancel()
        sending.cancel()
        time.sleep(0.05)
        assert request.state is State.DRAINING
        assert rx.stats() == {
            "free": 21,
            "draining": 3,
            "stray": 0,
            "requests": 0,
            "senders": 1,
        }
        leg.under_way -= 1
        tx._settle(sending)
        until(lambda: rx.stats()["free"] == 24)


def test_closing_a_sender_frees_its_pages() -> None:
    with one() as ((tx,), (rx,)):
        peer = connected(tx, rx)
        request = rx.expect(1, 4)
        tx.begin(1, peer, pages=[0], num_tokens=4).send(0)
        until(lambda: request.state is State.MOVING)
        with engine() as nobody:
            never = tx.connect(nobody.address())
            until(lambda: tx._connecting)
            tx.close()
            tx.close()
            with pytest.raises(jf.FabricError, match="the PageSender was closed"):
                never.result(5)
        with pytest.raises(jf.FabricError, match="cancelled by the sender"):
            request.result()
        until(lambda: rx.stats()["free"] == 24)
        with pytest.raises(jf.FabricError, match="closed"):
            tx.begin(2, peer, pages=[0], num_tokens=4)


def test_another_sender_on_the_engine_of_one_that_was_closed() -> None:
    """Its requests are told from those of before that are not counted yet."""
    with one() as ((tx,), (rx,)):
        held: list[Any] = []
        count, rx._all_came = rx._all_came, lambda *late: held.append(late)
        requests = []
        for i in range(3):
            peer = connected(tx, rx)
            requests.append(rx.expect(i, 4))
            sending = tx.begin(i, peer, pages=[0], num_tokens=4)
            send_all(sending, 3)
            sending.result()
            until(lambda: len(held) == i + 1)  # noqa: B023
            tx.close()
            tx = jf.kv.PageSender(tx.engine, tx.layout, pool=tx._memory.region)
        assert len(rx._legs) == 3
        for late in held:
            count(*late)
        for request in requests:
            request.result(10)
            request.release()
        assert rx.stats()["free"] == 24
        tx.close()


def test_requests_wait_for_room_for_their_tails() -> None:
    with engine() as a, engine() as b, jf.kv.PageReceiver(a, layout(), tails=3) as rx:
        tx = jf.kv.PageSender(b, layout())
        peer = connected(tx, rx)
        requests = [rx.expect(i, 4) for i in range(6)]
        sent = [tx.begin(i, peer, pages=[i], num_tokens=4) for i in range(6)]
        until(lambda: len(rx._on_slot) == 4)
        sent[2].cancel()  # it waits no more
        requests[3].cancel()
        for i in (0, 1, 4, 5):
            send_all(sent[i], 3, b"tail")
        for i in (0, 1, 4, 5):
            requests[i].result(10)
            requests[i].release()
        with pytest.raises(jf.FabricError, match="cancelled by the receiver"):
            sent[3].result(10)
        requests[2].release()
        assert rx.stats()["free"] == 24
        assert rx._slots.free == 3
        tx.close()


def test_what_cannot_be_counted_fails_outside_the_lock() -> None:
    """Callbacks of an outcome may wait for another thread that needs the receiver."""
    with one() as ((tx,), (rx,)):
        peer = connected(tx, rx)
        for counted in (0, 1):  # the tail, then the writes
            expect, left = rx._waits._expect, [counted]

            def fails(
                wait: Any, ended: Any, id: int, *rest: Any, **options: Any
            ) -> None:
                if id < 3 << 25:  # no timer
                    if left[0] == 0:  # noqa: B023
                        raise jf.CapacityError("no more counters")
                    left[0] -= 1  # noqa: B023
                expect(wait, ended, id, *rest, **options)  # noqa: B023

            rx._waits._expect = fails  # type: ignore[method-assign]
            request = rx.expect(1, 4, timeout_s=None if counted else 0.5)
            stuck: list[bool] = []

            def look(_: Any, stuck: list[bool] = stuck) -> None:
                other = threading.Thread(target=rx.stats)
                other.start()
                other.join(5)
                stuck.append(other.is_alive())

            request.add_done_callback(look)
            sending = tx.begin(1, peer, pages=[0], num_tokens=4)
            with contextlib.suppress(jf.FabricError):  # it may have failed already
                send_all(sending, 3)
            assert isinstance(request.exception(10), jf.FabricError)
            until(lambda: stuck)  # noqa: B023
            assert stuck == [False]
            sending.exception(10)
            rx._waits._expect = expect  # type: ignore[method-assign]
            until(lambda: rx.stats()["free"] == 24)
            assert rx._slots.free == 256


def test_a_sender_that_could_not_be_closed_is_closed_again() -> None:
    with one() as ((tx,), (rx,)):
        peer = connected(tx, rx)
        rx.expect(1, 4)
        sending = tx.begin(1, peer, pages=[0], num_tokens=4)
        (leg,) = sending._legs
        until(lambda: leg.state is State.MOVING)
        leg.under_way += 1
        with pytest.raises(TimeoutError):
            tx.close(0.05)
        leg.under_way -= 1
        tx._settle(sending)
        tx.close()
        jf.kv.PageSender(tx.engine, tx.layout, pool=tx._memory.region).close()


@pytest.mark.parametrize("dtype", ["f4,(f4", "f4,", "(", "V8", "object", "\0"])
def test_a_hostile_dtype_is_refused(dtype: str) -> None:
    said = layout().to_json() | {"dtype": dtype}
    with pytest.raises(jf.FabricError, match="is no name of a dtype"):
        jf.kv.PageLayout.from_json(said)


def test_a_leg_is_opened_once() -> None:
    with one() as ((tx,), (rx,)):
        peer = connected(tx, rx)
        requests = [rx.expect(i, 4) for i in range(2)]
        sending = tx.begin(0, peer, pages=[0], num_tokens=4)
        (leg,) = sending._legs
        until(lambda: leg.state is State.MOVING)
        tx._waits.tell(peer, "open", leg=leg.number, request=1, tokens=4)
        with pytest.raises(jf.FabricError, match="opened twice"):
            sending.result(10)
        requests[1].cancel()
        until(lambda: rx.stats()["free"] == 24)


def test_closing_an_engine_ends_what_waits() -> None:
    with engine() as a, engine() as b:
        rx, tx = jf.kv.PageReceiver(a, layout()), jf.kv.PageSender(b, layout())
        peer = connected(tx, rx)
        request = rx.expect(1, 4)
        waiting = tx.begin(2, peer, pages=[0], num_tokens=4)
        b.close()
        a.close()
        for outcome in (request, waiting):
            with pytest.raises(jf.FabricError, match="closed"):
                outcome.result(10)


def test_an_owner_may_be_closed_by_a_callback() -> None:
    with one() as ((tx,), (rx,)):
        request = rx.expect(1, 4, timeout_s=0.01)
        closed: list[float] = []

        def close(_: jf.kv.Receiving) -> None:
            begin = time.monotonic()
            rx.close()
            closed.append(time.monotonic() - begin)

        request.add_done_callback(close)
        until(lambda: closed)
        assert closed[0] < 5
        assert tx.stats()["requests"] == 0
