"""How pushes of jf.weights end: by their limits, with all counted, and nothing kept."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from test_weights_plan import leaf, tree
from transfer_cases import PATIENCE_S, engine, until
from weights_cases import Jobs, TileReceiver, TileSender, assert_tiles, jobs, mesh

import jaxfabric as jf
from jaxfabric.weights import TreeLayout
from jaxfabric.weights._push import covered

SOURCE = tree(mesh(2), leaf("w", (64, 96), "a"))
ONE = tree(mesh(1), leaf("w", (64, 96)))


def arrays_of(version: int) -> dict[str, Any]:
    return {"w": np.full((64, 96), version, np.float32)}


class Later:
    """Stands for an array that is computed some time.

    Attributes:
      ready: whether it is.
      deleted: whether it was donated.
    """

    def __init__(self, values: Any) -> None:
        self.values = values
        self.ready = self.deleted = False
        self.reads = 0

    def is_ready(self) -> bool:
        return self.ready

    def is_deleted(self) -> bool:
        return self.deleted

    def __array__(self, *rest: Any, **more: Any) -> Any:
        self.reads += 1
        assert self.ready, "this would wait"
        if self.deleted:
            raise RuntimeError("Array has been deleted")
        return self.values


def push_later(both: Jobs, later: Later, version: int, **options: Any) -> Any:
    """Pushes what is computed later."""
    sender = both.senders[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.Array", Later)
        patch.setattr(sender, "_tiles", lambda params: {(0, 0): params})
        return sender.push(later, version, **options)


# --- Limits -----------------------------------------------------------------------


def test_numbers_of_versions_are_whole_numbers() -> None:
    with jobs("shm", ONE, ONE) as both:
        (sender,), (receiver,) = both.senders, both.receivers
        sender.push(arrays_of(1), np.int64(1)).wait(PATIENCE_S)  # type: ignore[arg-type]
        assert receiver.take(1).version == 1
        for wrong in (2.0, "2", None):
            with pytest.raises(TypeError):
                sender.push(arrays_of(2), wrong)  # type: ignore[arg-type]
        sender.push(arrays_of(2), 2).wait(PATIENCE_S)


def test_what_is_not_computed_yet_holds_up_nothing_else() -> None:
    """Limits, cancels and greetings go on; it is offered once it is there."""
    with jobs("shm", ONE, ONE) as both:
        (sender,), (receiver,) = both.senders, both.receivers
        sender.push(arrays_of(1), 1).wait(PATIENCE_S)
        never = Later(arrays_of(2)["w"])
        push = push_later(both, never, 2, timeout_s=0.2)
        with pytest.raises(jf.DeadlineError, match="not computed yet"):
            push.wait(PATIENCE_S)
        push = push_later(both, never, 3)
        other = both.open_receiver(0)
        other.connect(both.addresses(), timeout_s=PATIENCE_S / 3)
        push.cancel()
        with pytest.raises(jf.FabricError, match="cancelled by the sender"):
            push.wait(PATIENCE_S)
        assert never.reads == 0
        later = Later(arrays_of(4)["w"])
        push = push_later(both, later, 4)
        time.sleep(0.05)
        assert receiver.stats()["filling"] == 0
        assert not push.done()
        later.ready = True
        push.wait(PATIENCE_S)
        for one in (receiver, other):
            assert_tiles(ONE, arrays_of(4), one.take(4).params)


@pytest.mark.parametrize("deleted", [True, False])
def test_only_what_was_donated_is_told_as_donated(deleted: bool) -> None:
    class Fails(Later):
        def __array__(self, *rest: Any, **more: Any) -> Any:
            raise RuntimeError("step diverged")

    with jobs("shm", ONE, ONE) as both:
        later = Fails(arrays_of(1)["w"])
        later.ready, later.deleted = True, deleted
        match = "are gone .*do not donate" if deleted else "not there: step diverged"
        with pytest.raises(jf.FabricError, match=match):
            push_later(both, later, 1).wait(PATIENCE_S)


# --- What is kept -----------------------------------------------------------------


def test_a_push_that_is_over_keeps_no_parameters() -> None:
    """However long it might have taken."""
    jax_numpy = pytest.importorskip("jax.numpy")
    like = {"w": np.zeros((64, 96), np.float32)}
    seen = []
    with (
        engine("shm") as own,
        engine("shm") as theirs,
        jf.weights.Sender(own, TreeLayout.of(like), threads=2) as sender,
        jf.weights.Receiver(theirs, like, threads=2) as receiver,
    ):
        receiver.connect([sender.address()])
        gc.collect()
        gc.disable()  # nor in circles, which may stay for long
        for version in range(1, 11):
            values = jax_numpy.full((64, 96), version, "f4")
            seen.append(weakref.ref(values))
            sender.push({"w": values}, version, timeout_s=600).wait(PATIENCE_S)
            del values
        alive = sum(one() is not None for one in seen)
        gc.enable()
        assert alive <= 1
        assert not sender._worker._due


def test_all_is_counted_when_a_push_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its receipt may be faster than the news that the last write has ended."""
    with jobs("shm", ONE, ONE, threads=4) as both:
        (sender,), (receiver,) = both.senders, both.receivers
        later = sender._outgoing._later

        def after_a_while(work: Any) -> None:
            until(lambda: receiver.version == 1)
            time.sleep(0.05)
            later(work)

        monkeypatch.setattr(sender._outgoing, "_later", after_a_while)
        push = sender.push(arrays_of(1), 1)
        push.wait(PATIENCE_S)
        stats = push.stats()
        assert (stats.writes, stats.nbytes) == (1, push.progress()[1] + 64)
        assert 0 < stats.transfer_s <= stats.span_s


def test_a_receipt_counts_though_its_writes_end_has_not_come() -> None:
    with jobs("shm", ONE, ONE, threads=4) as both:
        sender, receiver = both.senders[0], both.receivers[0]
        sender._outgoing._later = lambda work: None  # type: ignore[method-assign]
        push = sender.push(arrays_of(1), 1, timeout_s=1.0)
        assert len(push.wait(PATIENCE_S)) == 1
        assert receiver.version == 1


def test_the_transfer_phase_is_when_writes_are_under_way() -> None:
    assert covered([]) == 0
    assert covered([(1.0, 2.0), (1.5, 3.0), (2.0, 2.5), (7.0, 8.0)]) == 3.0
    with jobs("shm", ONE, ONE, threads=4) as both:
        (sender,) = both.senders
        real, fill = sender.engine.submit_single_write, sender._outgoing.staging.fill

        def submit(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.1)
            return real(*args, **kwargs)

        def packs(*args: Any) -> Any:
            time.sleep(0.2)
            return fill(*args)

        sender.engine.submit_single_write = submit  # type: ignore[method-assign]
        sender._outgoing.staging.fill = packs  # type: ignore[method-assign, assignment]
        push = sender.push(arrays_of(1), 1)
        push.wait(PATIENCE_S)
        stats = push.stats()
        assert 0.1 <= stats.transfer_s <= stats.span_s - 0.2
        assert stats.span_s <= stats.total_s


# --- Who comes later --------------------------------------------------------------


def late(both: Jobs, stack: contextlib.ExitStack) -> TileReceiver:
    own = stack.enter_context(engine("shm", name="late"))
    made = TileReceiver(own, None, layout=both.target)
    stack.callback(made.close)
    made.connect(both.addresses())
    return made


@pytest.mark.parametrize("end", ["cancelled", "time limit"])
def test_what_was_given_up_is_given_to_nobody_later(end: str) -> None:
    """Nor by the ranks of the trainer that did not give it up themselves."""
    with jobs("shm", SOURCE, ONE) as both, contextlib.ExitStack() as stack:
        receiver = both.receivers[0]
        for push in both.push(arrays_of(1), 1):
            push.wait(PATIENCE_S)
        receiver._on_bucket = lambda source, slot: None  # type: ignore[method-assign]
        first = both.senders[0].push(arrays_of(2), 2)
        limit_s = 0.3 if end == "time limit" else PATIENCE_S
        second = both.senders[1].push(arrays_of(2), 2, timeout_s=limit_s)
        until(lambda: receiver._versions.filling == 2)
        # Spoilt, so that it is known that nobody has it.
        for sender in both.senders:
            (target,) = sender._targets.values()
            until(lambda target=target: target.next == 1)  # type: ignore[misc]
            sender._worker.post(functools.partial(target.again.append, 0))
        if end == "cancelled":
            second.cancel()
        for push in (first, second):
            with pytest.raises(jf.FabricError, match=end):
                push.wait(PATIENCE_S)
        assert [sender._latest for sender in both.senders] == [None, None]
        came = late(both, stack)
        with pytest.raises(jf.DeadlineError):
            came.take(1, timeout_s=0.3)
        del receiver._on_bucket  # type: ignore[method-assign]
        receiver.connect(both.addresses())
        for push in both.push(arrays_of(3), 3):
            push.wait(PATIENCE_S)
        assert_tiles(ONE, arrays_of(3), came.take(3).params)


def test_a_push_that_was_cancelled_before_it_began_changes_nothing() -> None:
    with jobs("shm", ONE, ONE) as both, contextlib.ExitStack() as stack:
        both.senders[0].push(arrays_of(1), 1).wait(PATIENCE_S)
        push = push_later(both, Later(arrays_of(2)["w"]), 2)
        push.cancel()
        with pytest.raises(jf.FabricError, match="cancelled"):
            push.wait(PATIENCE_S)
        assert_tiles(ONE, arrays_of(1), late(both, stack).take(1).params)


def test_who_comes_while_a_push_waits_gets_the_newest_when_that_ends() -> None:
    with jobs("shm", ONE, ONE) as both, contextlib.ExitStack() as stack:
        both.senders[0].push(arrays_of(1), 1).wait(PATIENCE_S)
        push = push_later(both, Later(arrays_of(2)["w"]), 2)
        other = late(both, stack)
        push.cancel()
        with pytest.raises(jf.FabricError, match="cancelled"):
            push.wait(PATIENCE_S)
        assert_tiles(ONE, arrays_of(1), other.take(1, PATIENCE_S).params)
        both.senders[0].push(arrays_of(3), 3).wait(PATIENCE_S)
        assert other.take(3).version == 3


def test_a_version_goes_on_though_making_arrays_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with jobs("shm", ONE, ONE) as both:
        (sender,), (receiver,) = both.senders, both.receivers
        sender.push(arrays_of(1), 1).wait(PATIENCE_S)
        pushes = []

        def no_memory(tiles: Any) -> Any:
            pushes.append(sender.push(arrays_of(2), 2))
            until(lambda: receiver.stats()["filling"] == 2)
            until(lambda: all(s.complete for s in receiver._sources.values()))
            raise MemoryError

        monkeypatch.setattr(receiver, "_tree", no_memory)
        with pytest.raises(MemoryError):
            receiver.take(1)
        monkeypatch.undo()
        pushes[0].wait(PATIENCE_S)
        assert_tiles(ONE, arrays_of(2), receiver.take(2).params)


def test_what_is_closed_keeps_no_parameters() -> None:
    with jobs("shm", ONE, ONE) as both:
        (sender,) = both.senders
        push = sender.push(arrays_of(1), 1)
        push.wait(PATIENCE_S)
        assert sender._latest is not None
        kept = weakref.ref(sender._latest.tile_of)
        sender.close()
        gc.collect()
        assert kept() is None
        assert push.done()


@pytest.mark.parametrize("whose", ["sender", "receiver"])
def test_a_close_that_fails_gives_the_engine_back(
    whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(own: Any) -> Any:
        if whose == "sender":
            return TileSender(own, ONE)
        return TileReceiver(own, None, layout=ONE)

    def busy(*_: Any) -> None:
        raise jf.DeadlineError("drain: a write has not ended")

    with engine("shm") as own:
        first = make(own)
        monkeypatch.setattr(own, "drain", busy)
        with pytest.raises(jf.DeadlineError):
            first.close()
        monkeypatch.undo()
        make(own).close()


def test_a_receiver_that_cannot_be_made_leaves_no_threads() -> None:
    with engine("shm") as own:
        before = threading.active_count()
        for _ in range(3):
            with pytest.raises((ValueError, jf.FabricError)):
                TileReceiver(own, None, layout=ONE, leader=b"stale", threads=4)
        until(lambda: threading.active_count() <= before)


def test_what_somebody_has_is_given_to_who_comes_later() -> None:
    """Though it ran out of time for another one."""
    with jobs("shm", ONE, ONE) as both, contextlib.ExitStack() as stack:
        (sender,), (receiver,) = both.senders, both.receivers
        hangs = late(both, stack)
        hangs._on_bucket = lambda source, slot: None  # type: ignore[method-assign]
        push = sender.push(arrays_of(1), 1, timeout_s=0.5)
        with pytest.raises(jf.FabricError, match="time limit"):
            push.wait(PATIENCE_S)
        assert receiver.version == 1
        other = both.open_receiver(0)
        other.connect(both.addresses())
        assert_tiles(ONE, arrays_of(1), other.take(1, PATIENCE_S).params)


def test_threads_end_with_their_owners() -> None:
    before = threading.active_count()
    with jobs("shm", ONE, ONE, threads=4) as both:
        both.senders[0].push(arrays_of(1), 1).wait(PATIENCE_S)
        assert threading.active_count() > before + 8
    until(lambda: threading.active_count() <= before)
