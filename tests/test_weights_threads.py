"""jf.weights with several threads: they share buckets, and end before versions do."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weights_plan import leaf, tree
from transfer_cases import PATIENCE_S, until
from weights_cases import assert_tiles, jobs, mesh, whole_arrays

import jaxfabric as jf
from jaxfabric.weights import _pack
from jaxfabric.weights._buckets import BLOCK
from jaxfabric.weights._crew import NICE, Crew, Dropped, thread_count
from jaxfabric.weights._phases import Phases
from jaxfabric.weights._slot import Checksum
from jaxfabric.weights._worker import Worker

SOURCE = tree(mesh(1), leaf("w", (64, 1 << 12)))
BUCKET_BYTES = 1 << 18  # four of them
SLOW_S = 5e-3


# --- A crew ----------------------------------------------------------------------


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew("test", 3)
    yield made
    made.close()


@pytest.mark.parametrize(("helpers", "most"), [(8, 4), (1, 2), (0, 1)])
def test_each_part_is_done_once_and_by_several(
    helpers: int, most: int, crew: Crew
) -> None:
    done: list[int] = []
    who = set()

    def do(part: int, phases: Phases) -> None:
        time.sleep(1e-3)
        done.append(part)
        who.add(threading.get_ident())
        phases.lap("work")

    begin = time.monotonic()
    crew.each(range(40), do, helpers)
    took = time.monotonic() - begin
    assert sorted(done) == list(range(40))
    assert (most > 1) == (len(who) > 1)
    assert len(who) <= most
    assert 40e-3 / most <= crew.phases.wall["work"] <= took


@pytest.mark.parametrize("parts", ["fails", "cannot be made"])
def test_nothing_goes_on_when_a_part_has_failed(parts: str, crew: Crew) -> None:
    busy: set[int] = set()
    begun = []

    def made() -> Iterator[int]:
        yield from range(5)
        if parts == "cannot be made":
            raise MemoryError("part 5")
        yield from range(5, 100)

    def do(part: int, phases: Phases) -> None:
        busy.add(part)
        begun.append(part)
        time.sleep(SLOW_S)
        busy.discard(part)
        if part == 5:
            raise MemoryError("part 5")

    with pytest.raises(MemoryError, match="part 5"):
        crew.each(made(), do, helpers=3)
    assert not busy
    assert len(begun) < 20
    crew.each(range(3), lambda part, phases: begun.append(-1), helpers=3)
    assert begun[-3:] == [-1] * 3


def test_helpers_that_are_late_are_not_waited_for(crew: Crew) -> None:
    held = threading.Event()
    for worker in crew._workers:
        worker.post(functools.partial(held.wait, PATIENCE_S))
    done: list[int] = []
    crew.each(range(5), lambda part, phases: done.append(part), helpers=3)
    assert done == list(range(5))
    held.set()


def test_tasks_overlap_and_end_once(crew: Crew) -> None:
    """A long part of the first one keeps nobody from the second one."""
    held, ended = threading.Event(), queue.SimpleQueue[tuple[str, Any]]()

    def do(part: str, phases: Phases) -> None:
        if part == "long":
            held.wait(PATIENCE_S)

    def begin(name: str, *parts: str) -> None:
        crew.begin(parts, do, lambda failure: ended.put((name, failure)))

    begin("first", "long", "short")
    begin("second", *["short"] * 10)
    begin("empty")
    assert {ended.get(timeout=PATIENCE_S) for _ in range(2)} == {
        ("second", None),
        ("empty", None),
    }
    held.set()
    assert ended.get(timeout=PATIENCE_S) == ("first", None)
    assert ended.empty()


def test_what_is_dropped_ends_once_when_nobody_is_at_it(crew: Crew) -> None:
    busy: set[object] = set()
    outcomes: list[Exception | None] = []
    begun = []

    def do(part: int, phases: Phases) -> None:
        token = object()
        busy.add(token)
        begun.append(part)
        time.sleep(SLOW_S)
        busy.discard(token)

    for _ in range(2):
        crew.begin(range(1000), do, outcomes.append)
    until(lambda: len(busy) == 3)
    crew.drop()
    assert not busy
    assert len(begun) < 100
    assert [type(outcome) for outcome in outcomes] == [Dropped, Dropped]
    crew.each([1], do, helpers=3)
    assert len(outcomes) == 2


def test_a_part_that_waits_for_a_device_is_not_waited_for_longer(crew: Crew) -> None:
    device, outcomes = threading.Event(), queue.SimpleQueue[Exception | None]()

    def parts() -> Any:
        device.wait(PATIENCE_S)
        yield 1

    crew.begin(parts(), lambda part, phases: None, outcomes.put)
    until(lambda: crew._busy > 0)
    began = time.monotonic()
    crew.drop(0.1)
    assert time.monotonic() - began < PATIENCE_S / 2
    assert isinstance(outcomes.get(timeout=PATIENCE_S), Dropped)
    device.set()
    until(lambda: crew._busy == 0)
    assert outcomes.empty()


def test_clocks_share_out_the_whole_and_cores_add_up() -> None:
    one, other, threads, whole = Phases(), Phases(), Phases(), Phases()
    one.wall.update(pack=3.0, seal=1.0)
    one.core.update(pack=2.0, seal=1.0)
    other.wall.update(pack=4.0)
    other.core.update(pack=4.0)
    time.sleep(0.02)
    threads.add(one)
    threads.add(other)
    whole.join(threads)
    assert whole.wall["pack"] == pytest.approx(7 * whole.wall["seal"])
    assert 0.02 <= whole.wall["pack"] + whole.wall["seal"] < 1
    assert whole.core == {"pack": 6.0, "seal": 1.0}
    assert not any((one.wall, one.core, threads.wall, threads.core))


def test_what_waits_can_be_taken_back() -> None:
    worker, held = Worker("test"), threading.Event()
    first = worker.submit(functools.partial(held.wait, PATIENCE_S))
    until(first.running)
    second = worker.submit(lambda: 2)
    third = worker.submit(lambda: 1 // 0)
    assert not first.cancel()
    assert second.cancel()
    held.set()
    with pytest.raises(ZeroDivisionError):
        third.result(PATIENCE_S)
    assert first.result(PATIENCE_S)
    worker.close()


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_numbers_of_threads_are_checked(threads: Any) -> None:
    with pytest.raises(ValueError, match="threads="):
        thread_count(threads)


def test_threads_follow_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (128, 4)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert thread_count(None) == threads
    assert thread_count(7) == 7


@pytest.mark.parametrize("threads", [1, 2])
def test_who_unpacks_yields_to_the_others(threads: int) -> None:
    def nicer() -> dict[str, int]:
        return {
            thread.name.removeprefix("jf.weights."): os.getpriority(
                os.PRIO_PROCESS, thread.native_id or 0
            )
            - ours
            for thread in threading.enumerate()
            if thread.name.startswith("jf.weights.")
        }

    ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    wanted = {"Sender": 0, "Receiver": 0, "Receiver.1": NICE, "Receiver.2": NICE}
    wanted |= {"Sender.1": 0, "Sender.writes": 0}
    if threads == 1:
        wanted = {"Sender": 0, "Receiver": NICE}
    with jobs("shm", SOURCE, SOURCE, threads=threads):
        until(lambda: nicer() == wanted)
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == ours


# --- Strips ----------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    shape=st.lists(st.integers(1, 300), min_size=1, max_size=3).filter(
        lambda shape: math.prod(shape) < 1 << 18
    ),
    itemsize=st.sampled_from([1, 2, 4]),
    quantised=st.booleans(),
)
def test_strips_cover_a_box_once_in_order(
    shape: list[int], itemsize: int, quantised: bool
) -> None:
    shape = [1] * (quantised and len(shape) < 2) + shape
    box = np.arange(math.prod(shape)).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pack, "STRIP_BYTES", 1 << 12)
        cuts = list(_pack._cuts(tuple(shape), itemsize, quantised))
    parts = [box[at] for at in cuts]
    assert all(part.flags.c_contiguous for part in parts)
    assert np.concatenate([part.reshape(-1) for part in parts]).tolist() == list(
        range(box.size)
    )
    row = math.prod(shape[1:]) * itemsize
    for part in parts:
        unit = BLOCK * shape[-1] * itemsize if quantised else itemsize
        assert part.size * itemsize <= max(2 << 12, unit, min(row, 2 << 12))
    if quantised:
        scales = np.zeros([*shape[:-2], *(-(-n // BLOCK) for n in shape[-2:])], int)
        for at in cuts:
            scales[_pack._block(at, len(shape))] += 1
        assert (scales == 1).all()


def test_a_checksum_is_of_all_strips_in_their_places() -> None:
    data = np.arange(100, dtype=np.uint8)
    strips = [[data[:30]], [data[30:60], data[60:64]], [data[64:]]]

    def header(order: Any, of: Any = strips, bucket: int = 0) -> bytes:
        checksum = Checksum(1, bucket, 100)
        for number in order:
            checksum.add(number, of[number])
        return checksum.header()

    headers = {header(order) for order in itertools.permutations(range(3))}
    assert len(headers) == 1
    others = [
        header(range(3), [strips[1], strips[0], strips[2]]),
        header(range(2)),
        header(range(3), bucket=1),
        header(range(3), [strips[0], strips[1], [data[64:] ^ 1]]),
    ]
    assert len({*headers, *others}) == 5


# --- What is over ------------------------------------------------------------------


class Slow:
    """Copies that take a while, of which it is known who is at one.

    Attributes:
      whose: "Sender" or "Receiver": that has all of this.
      busy: copies that go on.
      threads: by name, that have copied.
      fails: whether helpers run out of memory.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whose = ""
        self.busy: set[object] = set()
        self.threads: set[str] = set()
        self.fails = False
        real = _pack._copy

        def copy(place: Any, values: Any) -> None:
            name = threading.current_thread().name
            _, _, whose, *helper = name.split(".")
            if whose != self.whose:
                return real(place, values)
            token = object()
            self.busy.add(token)
            self.threads.add(name)
            try:
                if self.fails and helper:
                    raise MemoryError("no memory")
                time.sleep(SLOW_S)
                return real(place, values)
            finally:
                self.busy.discard(token)

        monkeypatch.setattr(_pack, "_copy", copy)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    return Slow(monkeypatch)


def arrays_of(version: int) -> dict[str, Any]:
    return {"w": np.full((64, 1 << 12), version, np.float32)}


def test_a_version_given_up_half_way_leaves_nobody_at_work(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled, sender lost, connected anew: no thread still fills or reads."""
    looked: set[str] = set()
    slow.whose = "Receiver"

    def guard(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            looked.add(name)
            assert not slow.busy, name
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    failed: list[Any] = []
    monkeypatch.setattr("sys.excepthook", lambda *error: failed.append(error))
    with jobs("shm", SOURCE, SOURCE, bucket_bytes=BUCKET_BYTES, threads=4) as both:
        (sender,), (receiver,) = both.senders, both.receivers
        for name in ("begin", "swap"):
            guard(receiver._versions, name)
        for name in ("alloc", "unregister_memory"):
            guard(receiver.engine, name)
        for version in range(1, 9):
            push = sender.push(arrays_of(version), version)
            until(lambda over=push.done: slow.busy or over())  # type: ignore[misc]
            if version % 2:
                push.cancel()
            elif version % 4:
                receiver.connect(both.addresses())
            with contextlib.suppress(jf.FabricError):
                push.wait(PATIENCE_S)
            assert len(np.unique(receiver._versions.front[0, 0])) == 1
        sender.push(arrays_of(9), 9).wait(PATIENCE_S)
        assert_tiles(SOURCE, arrays_of(9), receiver.take(9).params)
    assert not failed
    assert looked == {"begin", "swap", "alloc", "unregister_memory"}
    assert len(slow.threads) == 4


def test_a_push_that_is_over_reads_its_parameters_no_more(slow: Slow) -> None:
    slow.whose = "Sender"
    with jobs("shm", SOURCE, SOURCE, bucket_bytes=BUCKET_BYTES, threads=4) as both:
        (sender,) = both.senders
        sender.push(arrays_of(1), 1).wait(PATIENCE_S)
        assert len(slow.threads) == 4
        push = sender.push(arrays_of(2), 2)
        until(lambda: bool(slow.busy))
        push.cancel()
        with pytest.raises(jf.FabricError, match="cancelled by the sender"):
            push.wait(PATIENCE_S)
        assert not slow.busy
        push = sender.push(arrays_of(3), 3)
        until(lambda: bool(slow.busy))
        sender.close()
        assert push.done()
        assert not slow.busy


@pytest.mark.parametrize("whose", ["Sender", "Receiver"])
def test_a_thread_that_fails_ends_the_version_by_name(whose: str, slow: Slow) -> None:
    with jobs("shm", SOURCE, SOURCE, bucket_bytes=BUCKET_BYTES, threads=4) as both:
        (sender,), (receiver,) = both.senders, both.receivers
        slow.whose, slow.fails = whose, True
        verb = "packed" if whose == "Sender" else "unpacked"
        match = rf"version 1 cannot be {verb}: MemoryError"
        push = sender.push(arrays_of(1), 1)
        with pytest.raises(jf.FabricError, match=match):
            push.wait(PATIENCE_S)
        with pytest.raises(jf.FabricError, match=match):
            receiver.take(1, PATIENCE_S)
        slow.fails = False
        sender.push(arrays_of(2), 2).wait(PATIENCE_S)
        assert_tiles(SOURCE, arrays_of(2), receiver.take(2).params)


def test_what_is_packed_and_not_written_was_not_sent() -> None:
    """The last bucket waits for the one before it: a cancel's outcome is known."""
    source = tree(mesh(1), leaf("w", (2, 1 << 16)))
    with jobs("shm", source, source, bucket_bytes=BUCKET_BYTES, threads=4) as both:
        (sender,), (receiver,) = both.senders, both.receivers
        until(lambda: len(sender._targets) == 1)
        (target,) = sender._targets.values()
        assert len(target.buckets) == 2
        real, goes_on = sender.engine.submit_single_write, threading.Event()

        def submit(*args: Any, **kwargs: Any) -> Any:
            goes_on.wait(PATIENCE_S)
            return real(*args, **kwargs)

        sender.engine.submit_single_write = submit  # type: ignore[method-assign]
        arrays = whole_arrays(source)
        push = sender.push(arrays, 1)
        until(lambda: target.next == 2 and len(target.handed) == 2)
        push.cancel()
        with pytest.raises(jf.FabricError, match="cancelled by the sender") as caught:
            push.wait(PATIENCE_S)
        assert type(caught.value) is jf.FabricError
        goes_on.set()
        until(lambda: sender._outgoing.staging.left == 3)
        assert push.stats().writes == 1
        sender.push(arrays, 2).wait(PATIENCE_S)
        assert_tiles(source, arrays, receiver.take(2).params)
        until(lambda: sorted(target.slots) == [0, 1])
        assert not target.handed
