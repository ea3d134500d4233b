"""jf.kv when processes die, hang, and come back: over engines of real processes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_cases import (
    Poisoned,
    connected,
    content,
    fill,
    is_poison,
    layout,
    poison_pages,
    send_all,
    sides,
    taken,
)
from transfer_cases import PATIENCE_S, engine, until

import jaxfabric as jf
from jaxfabric import _ffi
from jaxfabric.kv import State

TOKENS = 10  # two and a half pages
CHILD = Path(__file__).parent / "kv_child.py"
# A large one, so that its writes take a while.
LARGE = layout(layers=4, pages=65, page_tokens=64, heads=8, head_size=64)
LARGE_TOKENS = 64 * 64
SOON: dict[str, Any] = {"heartbeat_s": 0.1, "peer_timeout_s": 1.0}  # who hangs is lost


def one(transport: str = "shm", **options: Any) -> Any:
    """A sender and a receiver."""
    return sides(transport, [layout()], [layout()], **options)


@contextlib.contextmanager
def child(
    role: str, transport: str, *arguments: str, of: jf.kv.PageLayout | None = None
) -> Iterator[Any]:
    """A sender or receiver in a process of its own."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-P", str(CHILD), role, transport),
            *(json.dumps((of or layout()).to_json()), *arguments),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: Any, rx: jf.kv.PageReceiver, request: int, tokens: int) -> None:
    """A child is to send a request to where the receiver is now."""
    address = rx.engine.address().to_bytes().hex()
    print(address, request, tokens, file=process.stdin, flush=True)


def all_free(rx: jf.kv.PageReceiver) -> bool:
    return rx.stats()["free"] == rx.layout.pages


@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_a_receiver_that_hangs_holds_up_no_other_one(transport: str) -> None:
    of, pages = LARGE, range(64)
    with (
        child("receiver", transport, str(LARGE_TOKENS), of=of) as hangs,
        engine(transport, name="works") as theirs,
        engine(transport, name="prefill", peer_timeout_s=60.0) as ours,
        jf.kv.PageReceiver(theirs, of) as works,
        jf.kv.PageSender(ours, of, requests=4, bytes_max=of.nbytes // 2) as tx,
    ):
        first = tx.connect(bytes.fromhex(hangs.stdout.readline())).result()
        second = connected(tx, works)
        stuck = tx.begin(1, first, pages=pages, num_tokens=LARGE_TOKENS)
        until(lambda: stuck._legs[0].state is State.MOVING)
        hangs.send_signal(signal.SIGSTOP)
        send_all(stuck, of.layers)
        waiting = [
            tx.begin(i, first, pages=pages, num_tokens=LARGE_TOKENS) for i in (2, 3, 4)
        ]
        for i in range(10, 14):
            with works.expect(i, LARGE_TOKENS) as request:
                sending = tx.begin(i, second, pages=pages, num_tokens=LARGE_TOKENS)
                send_all(sending, of.layers)
                request.result(15)
                sending.result(15)
        assert not waiting[0].done()
        assert transport == "shm" or not stuck.done()
        hangs.send_signal(signal.SIGCONT)
        stuck.result(15)
        for each in waiting:
            each.cancel()


@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_a_killed_senders_requests_fail_and_others_do_not(transport: str) -> None:
    with one(transport) as ((tx,), (rx,)):
        peer = connected(tx, rx)
        poison_pages(rx.pool, rx.layout, range(24))
        lost = rx.expect(1, TOKENS)
        address = rx.engine.address().to_bytes().hex()
        with child("sender", transport, address, "1") as other:
            until(lambda: not is_poison(rx.pool, rx.layout, lost.pages[:1]))
            other.send_signal(signal.SIGKILL)
            begin = time.monotonic()
            with pytest.raises(
                jf.PeerLostError,
                match=r"expect: request 1: .* child .* into 30\.0 s; expect it again",
            ):
                lost.result()
            assert time.monotonic() - begin < 10
        assert lost.failed_pages == lost.pages
        kept = rx.expect(2, TOKENS)
        cache = content(layout(), TOKENS, 4)
        fill(tx.pool, tx.layout, [0, 1, 2], cache)
        send_all(tx.begin(2, peer, pages=[0, 1, 2], num_tokens=TOKENS), 3)
        kept.result()
        assert not set(kept.pages) & set(lost.pages)
        np.testing.assert_array_equal(
            taken(rx.pool, rx.layout, kept.pages, TOKENS), cache
        )
        kept.release()
        until(lambda: rx.stats()["free"] == 24)  # its process has ended, or is cut off
        assert lost.state is State.RELEASED
        assert rx.stats()["stray"] == 0


@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_a_killed_receivers_requests_fail_and_others_do_not(transport: str) -> None:
    with one(transport) as ((tx,), (rx,)), child("receiver", transport) as other:
        assert other.stdout is not None
        address = bytes.fromhex(other.stdout.readline())
        peers = [connected(tx, rx), tx.connect(address).result()]
        lost = tx.begin(1, peers[1], pages=[0, 1, 2], num_tokens=TOKENS)
        lost.send(0)
        until(lambda: len(lost._legs[0].done) == 1)
        other.send_signal(signal.SIGKILL)
        with pytest.raises(
            jf.PeerLostError,
            match=r"send: request 1: .* child .*1 writes done.*; connect to its succ",
        ):
            lost.result()
        with pytest.raises(jf.PeerLostError, match="child"):
            lost.send(1)
        assert tx.stats()["bytes"] == tx.stats()["requests"] == 0
        with pytest.raises(jf.PeerLostError, match="connect to it, or to its"):
            tx.begin(2, peers[1], pages=[0], num_tokens=4)
        kept = rx.expect(2, 4)
        send_all(tx.begin(2, peers[0], pages=[0], num_tokens=4), 3)
        kept.result()


def test_a_peer_that_is_gone_before_it_is_watched_is_noticed() -> None:
    with one() as ((tx,), (rx,)), engine() as other:
        peer = other.connect(rx.engine.address()).result()
        assert peer == 0
        until(lambda: rx.engine.peers())
        (number,) = rx.engine.peers()
        other.disconnect(peer)
        until(lambda: not rx.engine.peers())
        lost: list[jf.FabricError] = []
        rx._waits.watch(number, lost.append)
        until(lambda: lost)
        assert isinstance(lost[0], jf.PeerLostError)
        assert tx.stats()["receivers"] == 0


# --- Who hangs, and comes back -----------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_a_sender_that_hung_in_mid_stream_writes_no_more(transport: str) -> None:
    with (
        engine(transport, name="decode", **SOON) as mine,
        jf.kv.PageReceiver(mine, LARGE) as rx,
        child("again", transport, of=LARGE) as other,
    ):
        watch = Poisoned(rx)
        lost = rx.expect(1, LARGE_TOKENS)
        ask(other, rx, 1, LARGE_TOKENS)
        until(lambda: not is_poison(rx.pool, rx.layout, lost.pages[:1]))
        os.kill(other.pid, signal.SIGSTOP)
        with pytest.raises(jf.PeerLostError, match="silent"):
            lost.result(PATIENCE_S)
        if transport == "shm":  # it lives, so it may be in the middle of a store
            until(lambda: rx.stats()["stray"] == 64)
        else:
            until(lambda: all_free(rx))
        os.kill(other.pid, signal.SIGCONT)
        # To its own eyes all of it may be written, over shm.
        assert other.stdout.readline().startswith(
            ("PeerLostError", "ok") if transport == "shm" else "PeerLostError"
        )
        # Once it has noticed, it connects again, and thereby says that nothing of
        # before is under way.
        for request_id in range(2, 9):
            with rx.expect(request_id, 1) as request:
                ask(other, rx, request_id, 1)
                if other.stdout.readline() == "ok\n":
                    request.result()
                    break
        until(lambda: all_free(rx))
        assert watch.freed == 64 + request_id - 1
        assert is_poison(rx.pool, rx.layout, range(LARGE.pages))
        assert watch.faults == []


def test_a_second_sender_of_an_engine_that_hangs_may_still_write() -> None:
    """The first one has said goodbye, which says nothing of the second one's writes."""
    with (
        engine(name="decode", **SOON) as mine,
        jf.kv.PageReceiver(mine, layout()) as rx,
    ):
        lost = rx.expect(1, TOKENS)
        address = rx.engine.address().to_bytes().hex()
        with child("second", "shm", address, "1") as other:
            until(lambda: lost.state is State.MOVING)
            os.kill(other.pid, signal.SIGSTOP)
            with pytest.raises(jf.PeerLostError, match="silent"):
                lost.result(PATIENCE_S)
            time.sleep(0.1)  # all that follows has happened
            assert rx.stats()["stray"] == len(lost.pages)
        until(lambda: all_free(rx))


def test_a_fence_that_failed_is_asked_for_again() -> None:
    with one("ofi/tcp") as ((tx,), (rx,)):
        if not _ffi.open_for_caps("ofi/tcp")["removal_fences"]:
            pytest.skip("there are no fences")
        failures: list[jf.FabricError] = [
            jf.CapacityError("for now"),
            jf.FabricError("for now"),
        ]
        fence = rx._waits.fence

        def fails_at_first(timeout_s: float, then: Any) -> Any:
            if failures:
                raise failures.pop()
            return fence(timeout_s, then)

        rx._waits.fence = fails_at_first  # type: ignore[method-assign]
        request = rx.expect(1, TOKENS)
        tx.begin(1, connected(tx, rx), pages=[0, 1, 2], num_tokens=TOKENS)
        until(lambda: request.state is State.MOVING)
        tx.engine.close()
        assert isinstance(request.exception(PATIENCE_S), jf.PeerLostError)
        until(lambda: all_free(rx))
        assert failures == []


@pytest.mark.parametrize("busy", ["for a while", "for too long"])
def test_who_greets_has_nothing_of_before_under_way(busy: str) -> None:
    """Over shm a receiver frees the pages of a sender that greets again."""
    with one() as ((tx,), _), engine() as gone, engine() as late:
        old = jf.kv.PageReceiver(gone, layout())
        new = jf.kv.PageReceiver(late, layout())
        old.expect(1, TOKENS)
        sending = tx.begin(1, connected(tx, old), pages=[0, 1, 2], num_tokens=TOKENS)
        (leg,) = sending._legs
        until(lambda: leg.state is State.MOVING)
        leg.under_way += 1
        tx._lost = lambda *_: None  # the engine knows it before the sender does
        gone.close()
        until(lambda: leg.target.peer not in tx.engine.peers())
        greeting = tx.connect(new.engine.address(), 1.0 if "long" in busy else None)
        time.sleep(0.1)
        assert new.stats()["senders"] == 0
        if "long" in busy:
            with pytest.raises(jf.DeadlineError, match="still under way"):
                greeting.result(PATIENCE_S)
            assert new.stats()["senders"] == 0
        leg.under_way -= 1
        if "long" not in busy:
            greeting.result(PATIENCE_S)
            assert new.stats()["senders"] == 1
        sending.cancel()


@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_jobs_that_died_are_started_again(transport: str) -> None:
    """Two prefill jobs, two decode jobs; one of each is killed, and another comes."""
    with engine(transport) as a, engine(transport) as b:
        rx, tx = jf.kv.PageReceiver(a, layout()), jf.kv.PageSender(b, layout())
        watch = Poisoned(rx)
        to_mine = connected(tx, rx)
        for round in range(2 if transport == "shm" else 1):
            with (
                child("receiver", transport) as decode,
                child("again", transport) as prefill,
            ):
                address = bytes.fromhex(decode.stdout.readline())
                to_theirs = tx.connect(address).result()
                kept = rx.expect(10 * round + 1, TOKENS)
                ask(prefill, rx, 10 * round + 1, TOKENS)
                kept.result()
                assert prefill.stdout.readline() == "ok\n"
                kept.release()
                # Both are killed while they have something to do.
                lost = tx.begin(1, to_theirs, pages=[0, 1, 2], num_tokens=TOKENS)
                lost.send(0)
                cut = rx.expect(10 * round + 2, TOKENS)
                prefill.send_signal(signal.SIGKILL)
                decode.send_signal(signal.SIGKILL)
                with pytest.raises(jf.PeerLostError, match="child"):
                    lost.result()
            # Nobody had begun it: its next sender is as good.
            sending = tx.begin(
                10 * round + 2, to_mine, pages=[3, 4, 5], num_tokens=TOKENS
            )
            send_all(sending, 3)
            cut.result()
            sending.result()
            cut.release()
            assert to_mine == connected(tx, rx)
        until(lambda: all_free(rx))
        assert watch.faults == []
        tx.close()
        rx.close()


@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_engines_that_come_and_go_in_any_number(transport: str) -> None:
    """Three senders, two receivers; engines close in mid-stream, and others come."""
    rng = np.random.default_rng(8)
    with contextlib.ExitStack() as stack:

        def job(kind: Any) -> Any:
            each = stack.enter_context(engine(transport))
            return kind(each, layout())

        receivers = [job(jf.kv.PageReceiver) for _ in range(2)]
        senders = [job(jf.kv.PageSender) for _ in range(3)]
        went_well = 0
        for turn in range(12):
            live = []
            for i, tx in enumerate(senders):
                rx = receivers[int(rng.integers(2))]
                peer = connected(tx, rx)
                request = rx.expect(8 * turn + i, TOKENS)
                sending = tx.begin(
                    8 * turn + i, peer, pages=[0, 1, 2], num_tokens=TOKENS
                )
                sending.send(0)
                live.append((tx, rx, sending, request))
            gone = _one_leaves(rng, senders, receivers)
            for tx, rx, sending, request in live:
                with contextlib.suppress(jf.FabricError):
                    sending.send(1)
                    sending.send(2)
                    sending.send_tail(b"")
                for outcome in (sending, request):
                    error = outcome.exception(20)
                    if gone in (tx, rx):
                        assert error is None or isinstance(error, jf.FabricError)
                    else:
                        assert error is None, error
                        went_well += 1
                request.release()
            for group, kind in (
                (senders, jf.kv.PageSender),
                (receivers, jf.kv.PageReceiver),
            ):
                if gone in group:
                    group[group.index(gone)] = job(kind)
        assert went_well >= 2 * 12
        for rx in receivers:
            until(functools.partial(all_free, rx))


def _one_leaves(rng: Any, senders: Sequence[Any], receivers: Sequence[Any]) -> Any:
    """Closes an engine without a word from jf.kv; sometimes nobody's."""
    group = [senders, receivers, []][int(rng.integers(3))]
    if not group:
        return None
    gone = group[int(rng.integers(len(group)))]
    gone.engine.close()
    return gone
