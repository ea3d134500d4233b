"""jf.TransferEngine: two engines that find each other by address."""

from __future__ import annotations

import asyncio
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_cases import (
    PATIENCE_S,
    POISON,
    TRANSPORTS,
    Pair,
    engine,
    open_pair,
    until,
)

import jaxfabric as jf


@pytest.fixture(params=TRANSPORTS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield from open_pair(request.param)


# --- Writes ------------------------------------------------------------------


def test_a_single_write_arrives_and_is_counted_once(pair: Pair) -> None:
    a, b, _, region = pair
    data = np.arange(1000, dtype=np.int32)
    source = a.register_memory(data)
    a.submit_single_write(source, region.desc, 7, target_offset=13).result()
    b.imm_counter(7).wait(1)
    np.testing.assert_array_equal(region.array[13:4013].view(np.int32), data)
    assert set(region.array[:13]) == set(region.array[4013:]) == {POISON}
    assert b.imm_counter(7).value == 0
    # A part of the array, and nothing at all.
    a.submit_single_write(data[5:7], region.desc, 8, target_offset=5000).result()
    a.submit_single_write(source, region.desc, 9, nbytes=0).result()
    b.imm_counter(8).wait(1)
    b.imm_counter(9).wait(1)
    np.testing.assert_array_equal(region.array[5000:5008].view(np.int32), [5, 6])
    assert region.array[5008] == POISON


@pytest.mark.parametrize("transport", ["shm", "fake"])
def test_random_paged_writes_equal_numpys(transport: str) -> None:
    with engine(transport, nics=2) as a, engine(transport, nics=3) as b:
        a.connect(b.address()).result()
        source = a.register_memory(
            np.random.default_rng(0).integers(0, 256, 1 << 15, np.uint8)
        )
        region = b.alloc(1 << 15)

        @settings(max_examples=60, deadline=None)
        @given(
            page=st.integers(1, 700),
            gap=st.integers(0, 9),
            begin=st.integers(0, 9),
            pages=st.lists(
                st.tuples(st.integers(0, 44), st.integers(0, 44)),
                unique_by=lambda pair: pair[1],
                max_size=45,
            ),
            id=st.integers(0, jf._transfer_writes.IDS_MAX - 1),  # type: ignore[attr-defined]
        )
        def check(
            page: int, gap: int, begin: int, pages: list[tuple[int, int]], id: int
        ) -> None:
            region.array[:] = POISON
            want = region.array.copy()
            for i, j in pages:
                at = begin + j * (page + gap)
                want[at : at + page] = source.array[i * page : (i + 1) * page]
            a.submit_paged_writes(
                source,
                [i for i, _ in pages],
                region.desc,
                [j for _, j in pages],
                page,
                id,
                target_stride=page + gap,
                target_offset=begin,
            ).result()
            b.imm_counter(id).wait(1)
            np.testing.assert_array_equal(region.array, want)
            assert b.imm_counter(id).value == 0

        check()


def test_a_scatter_is_one_count_for_each_target(pair: Pair) -> None:
    a, b, _, region = pair
    data = np.arange(999, dtype=np.uint8)
    a.register_memory(data)
    targets = [jf.ScatterTarget(region.desc, i, 100 * i, 33 + i) for i in range(3)]
    a.submit_scatter(data, targets, 5).result()
    b.imm_counter(5).wait(3)
    for i in range(3):
        got = region.array[100 * i : 100 * i + 34 + i]
        np.testing.assert_array_equal(got[:-1], data[i : 33 + 2 * i])
        assert got[-1] == POISON
    a.submit_scatter(data, [], 5).result()
    assert b.imm_counter(5).value == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(100, dtype=np.float64),
        lambda: jnp.arange(100, dtype=jnp.float32),
        lambda: bytearray(range(100)),
        lambda: memoryview(bytes(range(100))),
        lambda: np.float32(3).reshape(()),
    ],
    ids=["numpy", "jax", "bytearray", "memoryview", "scalar"],
)
def test_what_has_bytes_can_be_written_from(make: Callable[[], Any]) -> None:
    buffer = make()
    want = np.frombuffer(np.asarray(buffer).tobytes(), np.uint8)
    with engine() as a, engine() as b:
        a.connect(b.address()).result()
        region = b.alloc(want.size)
        source = a.register_memory(buffer)
        assert source.nbytes == want.size
        a.submit_single_write(source, region.desc, 1).result()
        b.imm_counter(1).wait(1)
        np.testing.assert_array_equal(region.array, want)


def test_bad_buffers_are_refused() -> None:
    with engine() as a:
        with pytest.raises(ValueError, match="not contiguous"):
            a.register_memory(np.zeros((4, 4))[:, 1])
        with pytest.raises(ValueError, match="Python objects"):
            a.register_memory(np.array([object()]))
        with pytest.raises(TypeError, match="a list is no contiguous buffer"):
            a.register_memory([1, 2])
        with pytest.raises(jf.FabricError, match="at least 1 byte"):
            a.register_memory(np.zeros(0))
        with pytest.raises(jf.FabricError, match="at least 1 byte"):
            a.alloc(0)
        deleted = jnp.arange(10)
        deleted.delete()
        with pytest.raises(ValueError, match="deleted"):
            a.register_memory(deleted)
        with pytest.raises(ValueError, match="only host memory"):
            a.register_memory(_OnADevice())


class _OnADevice:
    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("not reached")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # kDLCUDA


def test_foreign_memory_is_a_target_where_the_transport_can(pair: Pair) -> None:
    a, b, _, _ = pair
    mine = b.register_memory(np.full(100, POISON, np.uint8))
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    with pytest.raises(jf.FabricError, match="read-only"):
        _ = b.register_memory(frozen).desc
    if b.transport == "shm":
        with pytest.raises(jf.TransportUnavailableError, match=r"alloc\(\)"):
            _ = mine.desc
        return
    source = a.register_memory(np.arange(100, dtype=np.uint8))
    a.submit_single_write(source, mine.desc, 3).result()
    b.imm_counter(3).wait(1)
    np.testing.assert_array_equal(mine.array, source.array)


def test_bad_writes_are_refused_and_harm_nobody(pair: Pair) -> None:
    a, b, _, region = pair
    source = a.register_memory(np.zeros(100, np.uint8))
    desc = region.desc
    write = a.submit_single_write
    with pytest.raises(ValueError, match="lies in no registered memory"):
        write(np.zeros(10), desc, 1)
    with pytest.raises(jf.FabricError, match="outside the target region"):
        write(source, desc, 1, target_offset=region.nbytes - 99)
    with pytest.raises(jf.FabricError, match="outside the source"):
        write(source, desc, 1, nbytes=101)
    with pytest.raises(jf.FabricError, match="offset 101 lie outside the source"):
        write(source, desc, 1, source_offset=101)
    with pytest.raises(ValueError, match="nbytes=-1"):
        write(source, desc, 1, nbytes=-1)
    for id in (-1, 1 << 27, 1.5):
        with pytest.raises(ValueError, match="ids are integers"):
            write(source, desc, id)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a page index is -1"):
        a.submit_paged_writes(source, [-1], desc, [0], 10, 1)
    with pytest.raises(ValueError, match="page indices are integers"):
        a.submit_paged_writes(source, [0.5], desc, [0], 10, 1)
    with pytest.raises(jf.FabricError, match="2 source pages for 1 target"):
        a.submit_paged_writes(source, [0, 1], desc, [0], 10, 1)
    with pytest.raises(jf.FabricError, match="this engine's own"):
        write(source, a.alloc(10).desc)
    a.unregister_memory(source)
    with pytest.raises(jf.FabricError, match="not registered"):
        write(source, desc, 1)
    assert b.imm_counter(1).value == 0
    assert set(region.array) == {POISON}


# --- Addresses ---------------------------------------------------------------


def test_addresses_and_descriptions_survive_their_journey(pair: Pair) -> None:
    _, b, _, region = pair
    for value in (b.address(), region.desc):
        kind: Any = type(value)
        assert kind.from_bytes(value.to_bytes()) == value
        assert pickle.loads(pickle.dumps(value)) == value
        assert len({value, kind.from_bytes(value.to_bytes())}) == 1
        for bad in (b"", value.to_bytes()[:-1], value.to_bytes() + b"x", b"x" * 99):
            with pytest.raises(jf.FabricError, match="not "):
                kind.from_bytes(bad)
    assert b.address().job == "test"
    assert region.desc.owner == b.address().id


def test_who_is_of_another_job_or_token_is_refused() -> None:
    with engine() as b:
        with jf.TransferEngine(job="test", token="guess") as a:
            with pytest.raises(jf.FabricError, match="another token"):
                a.connect(b.address())
        with jf.TransferEngine(job="other", token="secret") as a:
            with pytest.raises(jf.FabricError, match="is of job 'test'"):
                a.connect(b.address())
        assert b.peers() == {}


def test_settings_are_checked() -> None:
    with pytest.raises(jf.TransportUnavailableError, match="no transport='smoke'"):
        jf.TransferEngine("smoke")
    with pytest.raises(ValueError, match="nics=9"):
        jf.TransferEngine("shm", nics=9)
    with pytest.raises(ValueError, match="timeout_s=0"):
        jf.TransferEngine("shm", timeout_s=0)
    nan = float("nan")
    for heartbeat_s in (0, -1, nan, float("inf")):
        with pytest.raises(ValueError, match="heartbeat_s="):
            jf.TransferEngine("shm", heartbeat_s=heartbeat_s)
    for peer_timeout_s in (0.5, 1.0, nan, float("inf")):
        with pytest.raises(ValueError, match=r"peer_timeout_s=.* above heartbeat_s"):
            jf.TransferEngine("shm", peer_timeout_s=peer_timeout_s)


# --- Futures and messages ----------------------------------------------------


def test_futures_can_be_waited_for_called_back_and_cancelled(pair: Pair) -> None:
    a, b, peer, region = pair
    called: list[jf.TransferFuture] = []
    expected = b.expect_imm_count(4, 1, called.append)
    assert not expected.done()
    with pytest.raises(TimeoutError, match="it goes on"):
        expected.result(0.01)
    source = a.register_memory(np.zeros(10))
    a.submit_single_write(source, region.desc, 4).result()
    assert expected.result() is None
    assert expected.exception() is None
    until(lambda: called)
    assert called == [expected]
    assert not expected.cancel()
    waiting = b.expect_imm_count(4, 1)
    assert waiting.cancel()
    with pytest.raises(jf.FabricError, match="cancelled by the caller"):
        waiting.result()
    late = b.expect_imm_count(4, 2, timeout_s=0.1)
    with pytest.raises(jf.DeadlineError, match="0 of 2 transfers have come"):
        late.result()
    assert a.connect(b.address()).result() == peer


def test_futures_can_be_awaited(pair: Pair) -> None:
    a, b, peer, region = pair
    source = a.register_memory(np.zeros(10))

    async def talk() -> None:
        counted = b.expect_imm_count(2, 1)
        await a.submit_single_write(source, region.desc, 2)
        await counted
        assert await a.connect(b.address()) == peer
        await a.submit_send(peer, b"one")
        await a.submit_send(peer, b"two")
        seen = []
        async for message in b.messages():
            seen.append(message.data)
            if len(seen) == 2:
                break
        assert seen == [b"one", b"two"]
        never = b.expect_imm_count(3, 1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(_forever(never), 0.05)
        assert never.done()  # who gives up waiting cancels
        with pytest.raises(jf.DeadlineError):
            await b.expect_imm_count(3, 1, timeout_s=0.05)

    asyncio.run(talk())


async def _forever(future: jf.TransferFuture) -> None:
    await future


def test_messages_come_whole_and_in_order(pair: Pair) -> None:
    a, b, peer, _ = pair
    sent = [b"", b"x" * 100_000, *(bytes([i]) for i in range(20))]
    for data in sent:
        a.submit_send(peer, data)
    received = [b.receive() for _ in sent]
    assert [message.data for message in received] == sent
    b.submit_send(received[0].peer, b"back").result()
    assert a.receive() == (peer, b"back")
    with pytest.raises(TimeoutError, match="no message"):
        a.receive(0.01)
    with pytest.raises(jf.FabricError, match="up to 1048576 bytes"):
        a.submit_send(peer, bytes((1 << 20) + 1))
    with pytest.raises(jf.FabricError, match="no peer 99"):
        a.submit_send(99, b"")
    for no_bytes in (5, "text", None, [1, 2]):
        with pytest.raises(TypeError, match="a message is bytes, not"):
            a.submit_send(peer, no_bytes)  # type: ignore[arg-type]
    a.submit_send(peer, memoryview(b"last")).result()
    assert b.receive().data == b"last"


def test_who_leaves_a_loop_over_messages_loses_none() -> None:
    with engine() as a, engine() as b:
        peer = a.connect(b.address()).result()
        for i in range(6):
            a.submit_send(peer, bytes([i])).result()

        async def two() -> list[bytes]:
            seen = []
            async for message in b.messages():
                seen.append(message.data)
                if len(seen) == 2:
                    break
            return seen

        async def idle() -> None:
            async for _ in a.messages():
                raise AssertionError("nobody sent this")

        assert asyncio.run(two()) == [b"\0", b"\1"]
        assert b.receive().data == b"\2"
        assert asyncio.run(two()) == [b"\3", b"\4"]

        async def cancelled() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(idle(), 0.05)

        asyncio.run(cancelled())
        b.submit_send(b.receive().peer, b"back").result()
        assert a.receive().data == b"back"


def test_a_loop_over_messages_ends_with_the_engine() -> None:
    async def listen(listener: jf.TransferEngine) -> None:
        task = asyncio.ensure_future(anext(listener.messages()))
        await asyncio.sleep(0.02)
        listener.close()
        with pytest.raises(jf.FabricError, match="closed"):
            await asyncio.wait_for(task, PATIENCE_S)

    asyncio.run(listen(engine()))


def test_messages_that_nobody_takes_are_lost_with_an_error() -> None:
    room = 1 << 16
    with engine() as a, engine() as b:
        peer = a.connect(b.address()).result()
        sent = [a.submit_send(peer, b"x") for _ in range(room + 3)]
        sent[-1].result()
        until(lambda: b.stats()["messages_dropped"] == 3)
        for _ in range(room):
            b.receive()
        a.submit_send(peer, b"later").result()
        with pytest.raises(jf.CapacityError, match="3 messages of peer 0 were lost"):
            b.receive()
        assert b.receive().data == b"later"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_callback_that_raises_stops_nothing() -> None:
    seen: list[bytes] = []

    def receive(peer: int, data: bytes) -> None:
        seen.append(data)
        if data != b"3":  # by then, the others have been told
            raise RuntimeError("from a callback")

    with engine() as a, engine() as b:
        peer = a.connect(b.address()).result()
        b.submit_recvs(receive)
        for data in (b"1", b"2", b"3"):
            a.submit_send(peer, data).result()
        until(lambda: len(seen) == 3)


def test_a_watcher_sees_each_bump(pair: Pair) -> None:
    seen: list[tuple[int, int]] = []
    watcher = pair.a.alloc_watcher(lambda *values: seen.append(values))
    for _ in range(50):
        watcher.bump(2)
    until(lambda: seen and seen[-1][1] == 100)
    assert seen[0][0] == 0
    assert all(last[1] == first[0] for last, first in itertools.pairwise(seen))
    watcher.close()
    watcher.bump()
    assert watcher.value == 101


def test_a_barrier_waits_for_all(pair: Pair) -> None:
    a, b, peer, _ = pair
    back = b.connect(a.address()).result()
    groups = a.add_peer_group([peer]), b.add_peer_group([back])
    for _ in range(5):
        first = a.submit_barrier(groups[0], 3)
        with pytest.raises(TimeoutError):
            first.result(0.002)
        b.submit_barrier(groups[1], 3).result()
        first.result()
    late = a.submit_barrier(groups[0], 4, timeout_s=0.1)
    with pytest.raises(jf.DeadlineError, match=f"waiting for peer {peer} "):
        late.result()
    a.remove_peer_group(groups[0])
    with pytest.raises(jf.FabricError, match="no peer group"):
        a.submit_barrier(groups[0])
