"""jf.weights over real transports: what is taken is what was pushed, or an error."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from concurrent import futures
from typing import Any

import numpy as np
import pytest
from test_weights_plan import leaf, tree
from transfer_cases import (
    PATIENCE_S,
    TRANSPORTS,
    engine,
    skip_unless_usable,
    until,
)
from weights_cases import (
    Arrays,
    Jobs,
    TileReceiver,
    assert_tiles,
    jobs,
    mesh,
    whole_arrays,
)
from weights_pairs import FEW, PAIRS, check_pairs

import jaxfabric as jf
from jaxfabric.weights import TreeLayout, _deliveries, _slot, _staging

MANY_PAIRS = 200
SOURCE = tree(mesh(2), leaf("w", (64, 96), "a"), leaf("b", (6,)))
TARGET = tree(mesh(3), leaf("w", (64, 96), "", "a"), leaf("b", (6,), "a"))


def arrays_of(version: int) -> Arrays:
    """Every element tells the version."""
    return {one.name: np.full(one.shape, version, one.dtype) for one in SOURCE.leaves}


def push_and_take(both: Jobs, version: int) -> None:
    arrays = arrays_of(version)
    pushes = both.push(arrays, version)
    for push in pushes:
        assert len(push.wait(PATIENCE_S)) == len(both.target.ranks)
    for taken in both.take(version).values():
        assert taken.version == version
        assert_tiles(both.target, arrays, taken.params)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_any_sharding_becomes_any_other(transport: str) -> None:
    skip_unless_usable(transport)
    most = PAIRS if transport == "shm" else FEW
    assert check_pairs(transport, most=most) == most


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_many_shardings_become_any_other(transport: str) -> None:
    skip_unless_usable(transport)
    assert check_pairs(transport, MANY_PAIRS, MANY_PAIRS) == MANY_PAIRS


def test_large_leaves_go_through_small_rings() -> None:
    """64 buckets through 4 slots, twice: credits come back."""
    source = tree(mesh(1), leaf("w", (64, 1 << 16)))
    target = tree(mesh(2), leaf("w", (64, 1 << 16), "a"))
    with jobs("shm", source, target, bucket_bytes=1 << 18) as both:
        for version in (1, 2):
            arrays = whole_arrays(source, version)
            (push,) = both.push(arrays, version)
            push.wait(PATIENCE_S)
            stats = push.stats()
            assert stats.writes == 64
            assert stats.nbytes > source.nbytes
            for taken in both.take(version).values():
                assert_tiles(target, arrays, taken.params)
        assert both.receivers[0].stats()["bytes"] <= 2 * target.nbytes / 2 + 4 * (
            (1 << 18) + 64
        )


def test_a_push_can_be_watched(capsys: pytest.CaptureFixture[str]) -> None:
    with jobs("shm", SOURCE, TARGET) as both:
        pushes = both.push(arrays_of(1), 1)
        for push in pushes:
            push.wait(PATIENCE_S, bar=True)
            written, total = push.progress()
            assert written >= total > 0
    assert "version 1" in capsys.readouterr().out


def test_what_is_taken_stays_until_the_next_take() -> None:
    with jobs("shm", SOURCE, TARGET) as both:
        push_and_take(both, 1)
        before = both.take()
        for push in both.push(arrays_of(2), 2):
            push.wait(PATIENCE_S)
        for rank, taken in before.items():
            assert taken.version == 1
            assert_tiles(TARGET, arrays_of(1), taken.params)
            assert both.receivers[rank].version == 2
        assert {taken.version for taken in both.take().values()} == {2}
        again = both.take()
        assert all(
            a.params is b.params
            for a, b in zip(again.values(), both.take().values(), strict=True)
        )


def test_no_version_is_ever_mixed() -> None:
    """A sampler of three ranks takes all the time, while versions are pushed."""
    stop = threading.Event()
    pushed: list[BaseException] = []

    def trainer(both: Jobs) -> None:
        try:
            for version in range(2, 40):
                for push in both.push(arrays_of(version), version):
                    push.wait(PATIENCE_S)
        except BaseException as error:
            pushed.append(error)
        finally:
            stop.set()

    with jobs("shm", SOURCE, TARGET) as both:
        push_and_take(both, 1)
        thread = threading.Thread(target=trainer, args=(both,))
        thread.start()
        seen = set()
        while not stop.is_set():
            taken = both.take()
            versions = {one.version for one in taken.values()}
            assert len(versions) == 1
            version = versions.pop()
            seen.add(version)
            for one in taken.values():
                assert_tiles(TARGET, arrays_of(version), one.params)
        thread.join(PATIENCE_S)
        assert not pushed
        assert len(seen) > 1
        assert {one.version for one in both.take(39).values()} == {39}


# --- Who comes late, goes, and comes back ---------------------------------------


def test_a_late_receiver_gets_the_newest_version() -> None:
    target = tree(mesh(1), leaf("w", (64, 96)), leaf("b", (6,)))
    with jobs("shm", SOURCE, TARGET) as both:
        push_and_take(both, 1)
        push_and_take(both, 2)
        with (
            engine("shm", name="late") as own,
            TileReceiver(own, None, layout=target) as late,
        ):
            late.connect(both.addresses())
            taken = late.take(1)
            assert taken.version == 2
            assert_tiles(target, arrays_of(2), taken.params)
        until(lambda: all(len(s.receivers()) == 3 for s in both.senders))
        push_and_take(both, 3)


def test_one_trainer_has_samplers_of_several_shardings() -> None:
    """Jobs of one, two and four ranks, each with a mesh of its own."""
    targets = [
        tree(on, leaf("w", (64, 96), *(axis for axis, _ in on.axes)), leaf("b", (6,)))
        for on in (mesh(1), mesh(2), mesh(2, 2))
    ]
    with contextlib.ExitStack() as stack:
        both = stack.enter_context(jobs("shm", SOURCE, TARGET))
        samplers = [both]
        for target in targets:
            sampler = Jobs("shm", SOURCE, target, {}, stack)
            ranks = sampler.receivers
            for rank in target.ranks:
                leader = ranks[0].address() if ranks else None
                ranks.append(sampler.open_receiver(rank, leader))
                ranks[-1].connect(both.addresses())
            samplers.append(sampler)
        for version in (1, 2):
            arrays = arrays_of(version)
            for push in both.push(arrays, version):
                assert len(push.wait(PATIENCE_S)) == 3 + 1 + 2 + 4
            for sampler in samplers:
                for taken in sampler.take(version).values():
                    assert taken.version == version
                    assert_tiles(sampler.target, arrays, taken.params)


def test_a_receiver_between_two_ranks_pushes_does_not_stop_them() -> None:
    with jobs("shm", SOURCE, TARGET) as both:
        push_and_take(both, 1)
        first = both.senders[0].push(arrays_of(2), 2)
        target = tree(mesh(1), leaf("w", (64, 96)), leaf("b", (6,)))
        with (
            engine("shm", name="late") as own,
            TileReceiver(own, None, layout=target) as late,
        ):
            late.connect(both.addresses())
            second = both.senders[1].push(arrays_of(2), 2)
            for push in (first, second):
                push.wait(PATIENCE_S / 3)
            assert_tiles(target, arrays_of(2), late.take(2).params)


def test_late_receivers_do_not_hold_up_a_push(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank of the trainer lets another receiver wait for what it has missed."""
    go = _deliveries._HANDLERS["go"]
    held = []

    def hold(sender: Any, target: Any, fields: dict[str, Any]) -> None:
        if fields["version"] == 1 and sender.rank == target.rank:
            held.append(target.name)
        else:
            go(sender, target, fields)

    target = tree(mesh(2), leaf("w", (64, 96), "", "a"), leaf("b", (6,), "a"))
    with jobs("shm", SOURCE, target, join=False) as both:
        for push in both.push(arrays_of(1), 1):
            push.wait(PATIENCE_S)
        monkeypatch.setitem(_deliveries._HANDLERS, "go", hold)
        for receiver in both.receivers:
            receiver.connect(both.addresses())
        until(lambda: len(held) == 2)
        for push in both.push(arrays_of(2), 2):
            push.wait(PATIENCE_S / 3)
        for taken in both.take(1).values():
            assert taken.version == 2
            assert_tiles(target, arrays_of(2), taken.params)


def test_half_a_trainer_gives_no_version() -> None:
    """What one rank pushes is there, but not visible, before the other one's part."""
    target = tree(mesh(1), leaf("w", (64, 96)), leaf("b", (6,)))
    with jobs("shm", SOURCE, target, join=False) as both:
        (receiver,) = both.receivers
        receiver.connect(both.addresses()[:1])
        pushes = both.push(arrays_of(1), 1)
        with pytest.raises(jf.DeadlineError, match="version 1 has not come"):
            receiver.take(1, timeout_s=0.2)
        assert receiver.version == 0
        receiver.connect(both.addresses()[1:])
        assert_tiles(target, arrays_of(1), receiver.take(1).params)
        for push in pushes:
            push.wait(PATIENCE_S)


def test_connecting_again_outlives_what_was_under_way() -> None:
    """A write into the ring of before fails, which is no news to the ring of now."""
    source = tree(mesh(1), leaf("w", (64, 1 << 13)))
    target = tree(mesh(1), leaf("w", (64, 1 << 13)))
    arrays = whole_arrays(source)
    with jobs("shm", source, target, bucket_bytes=1 << 18) as both:
        (sender,), (receiver,) = both.senders, both.receivers
        for version in range(1, 7):
            goes_on = threading.Event()
            (push,) = both.push(arrays, version)
            while not (push.progress()[0] or push.done()):
                time.sleep(1e-4)
            sender._worker.post(functools.partial(goes_on.wait, PATIENCE_S))
            with futures.ThreadPoolExecutor(1) as pool:
                again = pool.submit(receiver.connect, both.addresses())
                until(lambda: receiver.stats()["filling"] == 0)
                goes_on.set()
                again.result(PATIENCE_S)
            with contextlib.suppress(jf.FabricError):
                push.wait(PATIENCE_S)
        (push,) = both.push(arrays, 7)
        push.wait(PATIENCE_S)
        assert_tiles(target, arrays, receiver.take(7).params)


def test_connecting_again_gives_up_half_a_version() -> None:
    with jobs("shm", SOURCE, TARGET) as both:
        push_and_take(both, 1)
        hesitant = silent(both.receivers[0])
        pushes = both.push(arrays_of(2), 2)
        until(lambda: hesitant.stats()["filling"] == 2)
        del hesitant._on_bucket
        hesitant.connect(both.addresses())
        assert hesitant.version in (1, 2)
        for push in pushes:
            with contextlib.suppress(jf.FabricError):
                push.wait(PATIENCE_S)
        push_and_take(both, 3)


def test_a_version_of_another_trainer_is_another_version() -> None:
    """Both trainers push version 2; the first one's reached one rank only."""
    with jobs("shm", SOURCE, TARGET) as both:
        push_and_take(both, 1)
        for receiver in both.receivers[1:]:
            silent(receiver)
        old = {name: values + 5 for name, values in arrays_of(2).items()}
        both.push(old, 2)
        until(lambda: both.receivers[0].version == 2)
        for sender in both.senders:
            sender.close()
            sender.engine.close()
        for receiver in both.receivers[1:]:
            del receiver._on_bucket  # type: ignore[method-assign]
        both.senders = [both.open_sender(rank) for rank in SOURCE.ranks]
        for receiver in both.receivers:
            receiver.connect(both.addresses())
        push_and_take(both, 2)
        assert all(len(one._rings) <= 4 for one in both.receivers)


def test_a_trainer_that_comes_back_goes_on() -> None:
    with jobs("shm", SOURCE, TARGET) as both:
        push_and_take(both, 1)
        for sender in both.senders:
            sender.close()
            sender.engine.close()
        with pytest.raises(jf.FabricError, match="sender, rank"):
            both.receivers[0].take(2)
        assert both.receivers[0].version == 1
        both.senders = [both.open_sender(rank) for rank in SOURCE.ranks]
        for receiver in both.receivers:
            receiver.connect(both.addresses())
        push_and_take(both, 2)


def test_a_receiver_that_leaves_fails_its_part_only() -> None:
    with jobs("shm", SOURCE, TARGET) as both:
        push_and_take(both, 1)
        gone = both.receivers.pop()
        gone.close()
        gone.engine.close()
        until(lambda: all(len(s.receivers()) == 2 for s in both.senders))
        for push in both.push(arrays_of(2), 2):
            assert set(push.wait(PATIENCE_S)) == {"sampler0/0", "sampler1/1"}


def test_a_rank_that_is_lost_is_named_at_once() -> None:
    """To each of the others, once; then they wait for its successor."""
    with jobs("shm", SOURCE, TARGET) as both:
        push_and_take(both, 1)
        gone = both.receivers.pop()
        with futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(both.receivers[0].take)  # it waits for the others
            until(lambda: both.receivers[0]._agreement._reports)
            gone.close()
            gone.engine.close()
            for take in (first, pool.submit(both.receivers[1].take)):
                with pytest.raises(jf.PeerLostError, match="rank 2 of this sampler"):
                    take.result(PATIENCE_S / 3)
            with pytest.raises(jf.DeadlineError, match=r"ranks \[1, 2\]"):
                both.receivers[0].take(timeout_s=0.1)
        leader = both.receivers[0].address()
        both.receivers.append(both.open_receiver(2, leader))
        both.receivers[-1].connect(both.addresses())
        push_and_take(both, 2)


def test_receivers_of_one_name_are_told_apart() -> None:
    target = tree(mesh(1), leaf("w", (64, 96)), leaf("b", (6,)))
    with jobs("shm", SOURCE, target) as both:
        other = both.open_receiver(0)
        other.connect(both.addresses())
        (push, _) = both.push(arrays_of(1), 1)
        assert len(push.wait(PATIENCE_S)) == 2


def test_arrays_of_numpy_may_change_after_a_push() -> None:
    params = {"w": np.ones((64, 96), np.float32)}
    with (
        engine("shm") as own,
        engine("shm") as theirs,
        jf.weights.Sender(own, TreeLayout.of(params)) as sender,
        jf.weights.Receiver(theirs, params) as receiver,
    ):
        receiver.connect([sender.address()])
        push = sender.push(params, 1)
        params["w"][:] = 2
        push.wait(PATIENCE_S)
        assert (receiver.take(1).params["w"] == 1).all()


def test_buckets_of_an_older_version_are_left_out() -> None:
    """They came when a newer one was already let to send."""
    source = tree(mesh(1), leaf("w", (64, 1 << 13)))
    with jobs("shm", source, source, bucket_bytes=1 << 18, join=False) as both:
        (sender,), (receiver,) = both.senders, both.receivers
        sender.push({"w": np.full((64, 1 << 13), 1, np.float32)}, 1).wait(PATIENCE_S)
        late: list[Any] = []
        on_bucket = receiver._on_bucket

        def hold_the_last(of: Any, slot: int) -> None:
            version, number = _slot.claimed(of.ring.array[slot])
            if version == 1 and number >= len(of.buckets) - of.ring.array.shape[0]:
                late.append((of, slot))
            else:
                on_bucket(of, slot)

        receiver._on_bucket = hold_the_last  # type: ignore[method-assign, assignment]
        receiver.connect(both.addresses())
        until(lambda: len(late) == 2)  # its ring is full of version 1
        push = sender.push({"w": np.full((64, 1 << 13), 2, np.float32)}, 2)
        until(lambda: receiver.stats()["filling"] == 2)
        for of in late:
            receiver._worker.post(functools.partial(on_bucket, *of))
        push.wait(PATIENCE_S)
        assert (receiver.take(2).params[0, 0] == 2).all()
        assert receiver.stats()["spoilt"] == 0


def test_closing_ends_what_is_under_way() -> None:
    with jobs("shm", SOURCE, TARGET) as both:
        sender = both.senders[0]
        pushes = [sender.push(arrays_of(version), version) for version in (1, 2)]
        sender.close()
        for push in pushes:
            with pytest.raises(jf.FabricError, match="the Sender was closed"):
                push.wait(PATIENCE_S)
        with pytest.raises(jf.FabricError, match="the Sender is closed"):
            sender.push(arrays_of(3), 3)
        both.receivers[0].engine.close()
        with pytest.raises(jf.FabricError, match="closed"):
            both.receivers[0].take(1)


# --- What goes wrong -------------------------------------------------------------


def test_a_push_that_nobody_takes_runs_out_of_time() -> None:
    with jobs("shm", SOURCE, TARGET) as both:
        push = both.senders[0].push(arrays_of(1), 1, timeout_s=0.3)
        with pytest.raises(jf.DeadlineError, match="the time limit of the push"):
            push.wait(PATIENCE_S)  # rank 1 does not push


def silent(receiver: TileReceiver) -> Any:
    """A receiver that grants a version, and then takes no bucket."""
    receiver._on_bucket = lambda source, slot: None  # type: ignore[method-assign]
    return receiver


def test_a_push_that_takes_too_long_names_the_receiver() -> None:
    with jobs("shm", SOURCE, TARGET) as both:
        push_and_take(both, 1)
        silent(both.receivers[2])
        pushes = [s.push(arrays_of(2), 2, timeout_s=3.0) for s in both.senders]
        # All was written, and it did not say what became of it.
        with pytest.raises(jf.OutcomeUnknownError, match="sampler2/2: all was written"):
            pushes[0].wait(PATIENCE_S)
        assert isinstance(pushes[0].outcomes()["sampler0/0"], jf.weights.Receipt)
        assert {rank.version for rank in both.receivers} == {1, 2}
        with pytest.raises(jf.FabricError, match="time limit"):
            both.receivers[2].take(2, timeout_s=PATIENCE_S)
        assert both.receivers[2].version == 1


def test_a_version_that_is_cancelled_never_shows() -> None:
    with jobs("shm", SOURCE, TARGET) as both:
        push_and_take(both, 1)
        # Rank 1 of the trainer does not push, so nobody is let to send.
        push = both.senders[0].push(arrays_of(2), 2)
        with pytest.raises(TimeoutError, match="it goes on"):
            push.wait(0.1)
        push.cancel()
        with pytest.raises(jf.FabricError, match="cancelled by the sender"):
            push.wait(PATIENCE_S)
        assert {taken.version for taken in both.take().values()} == {1}
        push_and_take_3 = both.push(arrays_of(3), 3)
        for one in push_and_take_3:
            one.wait(PATIENCE_S)


def test_a_push_that_is_cancelled_half_way_never_shows() -> None:
    source = tree(mesh(1), leaf("w", (64, 1 << 14)))
    arrays = {i: {"w": np.full((64, 1 << 14), i, np.float32)} for i in (1, 2, 3)}
    with jobs("shm", source, source, bucket_bytes=1 << 18) as both:
        (sender,), (receiver,) = both.senders, both.receivers
        sender.push(arrays[1], 1).wait(PATIENCE_S)
        silent(receiver)
        push = sender.push(arrays[2], 2)
        until(lambda: push.progress()[0] > 0)  # its ring is full, and stays so
        push.cancel()
        with pytest.raises(jf.FabricError, match="cancelled by the sender") as caught:
            push.wait(PATIENCE_S)
        assert type(caught.value) is jf.FabricError  # not all was written
        with pytest.raises(jf.FabricError, match="cancelled by the sender"):
            receiver.take(2, timeout_s=PATIENCE_S)
        assert_tiles(source, arrays[1], receiver.take().params)
        del receiver._on_bucket  # type: ignore[method-assign]
        receiver.connect(both.addresses())  # its ring is a new one
        sender.push(arrays[3], 3).wait(PATIENCE_S)
        assert_tiles(source, arrays[3], receiver.take(3).params)


@pytest.mark.parametrize("times", [1, 9])
def test_bytes_that_change_on_their_way_are_sent_again(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [times]

    def seal(slot: Any, checksum: _slot.Checksum) -> None:
        _slot.seal(slot, checksum)
        if left[0] > 0:
            left[0] -= 1
            slot[_slot.HEADER_BYTES] ^= 1

    source = tree(mesh(1), leaf("w", (64, 1 << 10)))
    target = tree(mesh(1), leaf("w", (64, 1 << 10)))
    with jobs("shm", source, target) as both:
        monkeypatch.setattr(_staging, "seal", seal)
        arrays = whole_arrays(source)
        (push,) = both.push(arrays, 1)
        if times == 1:
            push.wait(PATIENCE_S)
            assert_tiles(target, arrays, both.take(1)[0].params)
            assert both.receivers[0].stats()["spoilt"] == 1
            return
        with pytest.raises(jf.FabricError, match="wrong checksum") as caught:
            push.wait(PATIENCE_S)
        assert type(caught.value) is jf.FabricError  # its outcome is known
        assert both.receivers[0].version == 0


def test_bad_calls_are_refused() -> None:
    with jobs("shm", SOURCE, TARGET) as both:
        sender = both.senders[0]
        push_and_take(both, 5)
        with pytest.raises(jf.FabricError, match="5 was pushed"):
            sender.push(arrays_of(5), 5)
        with pytest.raises(jf.DeadlineError, match="the newest is 5"):
            both.receivers[0].take(6, timeout_s=0.1)
        with pytest.raises(ValueError, match="timeout_s=inf"):
            sender.push(arrays_of(6), 6, timeout_s=float("inf"))
        for version in (6, 7):  # rank 1 does not push them
            sender.push(arrays_of(version), version)
        with pytest.raises(jf.CapacityError, match="2 pushes are under way"):
            sender.push(arrays_of(8), 8)
    with engine("shm") as own:
        with pytest.raises(ValueError, match="rank=9 is none of"):
            jf.weights.Sender(own, SOURCE, rank=9)
        with pytest.raises(ValueError, match="leader= is the address of rank 0"):
            TileReceiver(own, None, layout=TARGET, rank=1)
        with pytest.raises(jf.FabricError, match="address"):
            TileReceiver(own, None, layout=TARGET).connect([b"no address"])


def test_trees_that_do_not_fit_are_refused() -> None:
    params = {"w": np.zeros((4, 4), np.float32)}
    with engine("shm") as own:
        sender = jf.weights.Sender(own, TreeLayout.of(params))
        for wrong, match in (
            ({"w": np.zeros((4, 5), np.float32)}, r"w is float32\(4, 5\)"),
            ({"w": np.zeros((4, 4), np.int8)}, "w is int8"),
            ({"w": params["w"], "v": params["w"]}, "has 2 leaves"),
        ):
            with pytest.raises(jf.FabricError, match=match):
                sender.push(wrong, 1)
        sender.close()


def test_a_layout_that_no_plan_leads_to_is_refused() -> None:
    target = tree(mesh(1), leaf("other", (64, 96)))
    with (
        jobs("shm", SOURCE, TARGET) as both,
        engine("shm") as own,
        TileReceiver(own, None, layout=target) as stranger,
    ):
        with pytest.raises(jf.FabricError, match="w becomes w, which the target"):
            stranger.connect(both.addresses(), timeout_s=PATIENCE_S)
        push_and_take(both, 1)
