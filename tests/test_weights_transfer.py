"""jf.weights over real transports: what is taken is what was pushed, or an error."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
import pytest
from test_weights_plan import leaf, tree
from transfer_cases import PATIENCE_S, engine, until
from weights_cases import (
    Arrays,
    Jobs,
    TileReceiver,
    assert_tiles,
    jobs,
    mesh,
    whole_arrays,
)
from weights_pairs import check_pairs

import jaxfabric as jf
from jaxfabric.weights import TreeLayout, _deliveries, _slot

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


@pytest.mark.parametrize(
    ("transport", "examples"), [("shm", 12), ("fake", 6), ("ofi/tcp", 3)]
)
def test_any_sharding_becomes_any_other(transport: str, examples: int) -> None:
    check_pairs(transport, examples)


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


@pytest.mark.parametrize("times", [1, 9])
def test_bytes_that_change_on_their_way_are_sent_again(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [times]

    def seal(slot: Any, *header: int) -> None:
        _slot.seal(slot, *header)
        if left[0] > 0:
            left[0] -= 1
            slot[_slot.HEADER_BYTES] ^= 1

    source = tree(mesh(1), leaf("w", (64, 1 << 10)))
    target = tree(mesh(1), leaf("w", (64, 1 << 10)))
    with jobs("shm", source, target) as both:
        monkeypatch.setattr(_deliveries, "seal", seal)
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


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{}",
        b'{"kind":"ready"}',
        b'{"kind":"hello","version":9,"rank":0,"name":"","nbytes":1}',
        b'{"kind":"hello","version":1,"rank":0,"name":"","nbytes":999999999999}',
        b'{"kind":"hello","version":1,"rank":0,"name":"","nbytes":3}',
        b"\x00abc",
        b'{"kind":"use","version":7,"number":1}',
        b'{"kind":"have","version":1,"verify_us":0,"unpack_us":0}',
    ],
)
def test_strangers_harm_nobody(message: bytes) -> None:
    with jobs("shm", SOURCE, TARGET) as both, engine("shm", name="stranger") as own:
        addresses = both.addresses() + [one.address() for one in both.receivers]
        for address in addresses:
            peer = own.connect(address).result()
            own.submit_send(peer, message).result()
            own.submit_send(peer, b"\x00" + message).result()
        push_and_take(both, 1)
