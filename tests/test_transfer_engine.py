"""jf.TransferEngine: two engines that find each other by address."""

from __future__ import annotations

import asyncio
import gc
import itertools
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxfabric as jf
from jaxfabric import _ffi

POISON = 0xA5
CHAOS = {"seed": 3, "pieces_max": 4, "delay_max_s": 2e-4, "again_share": 0.2}
SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "two_jobs.py"
PATIENCE_S = 30.0


class Pair(NamedTuple):
    """An engine that writes, one that is written into, and its poisoned region."""

    a: jf.TransferEngine
    b: jf.TransferEngine
    peer: int  # b, as a calls it
    region: jf.Region  # of b, u8[1 << 16]


def skip_unless_usable(transport: str) -> None:
    for name, state, reason, _ in _ffi.transport_states():
        if name == transport and state != "usable":
            pytest.skip(f"{transport}: {reason}")


def engine(transport: str = "shm", **kwargs: Any) -> jf.TransferEngine:
    skip_unless_usable(transport)
    if transport == "fake":
        kwargs.setdefault("chaos", CHAOS)
    kwargs.setdefault("timeout_s", PATIENCE_S)
    return jf.TransferEngine(transport, job="test", token="secret", **kwargs)


@pytest.fixture(params=["shm", "fake", "ofi/tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with engine(request.param) as a, engine(request.param) as b:
        region = b.alloc(1 << 16)
        region.array[:] = POISON
        yield Pair(a, b, a.connect(b.address()).result(), region)


def until(met: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < deadline, "nothing more happens"
        time.sleep(1e-3)


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
    with pytest.raises(jf.FabricError, match="outside the source region"):
        write(source, desc, 1, nbytes=101)
    with pytest.raises(ValueError, match="nbytes=-1"):
        write(source, desc, 1, source_offset=101)
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_callback_that_raises_stops_nothing() -> None:
    seen: list[bytes] = []

    def receive(peer: int, data: bytes) -> None:
        seen.append(data)
        raise RuntimeError("from a callback")

    with engine() as a, engine() as b:
        peer = a.connect(b.address()).result()
        b.submit_recvs(receive)
        for data in (b"1", b"2"):
            a.submit_send(peer, data).result()
        until(lambda: len(seen) == 2)


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


# --- Life and death ----------------------------------------------------------


def test_close_ends_what_waits() -> None:
    a = engine()
    waiting = a.expect_imm_count(1, 1)
    region = a.alloc(10, np.int16)
    errors: list[BaseException] = []

    def receive() -> None:
        try:
            a.receive()
        except jf.FabricError as error:
            errors.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    time.sleep(0.05)
    a.close()
    a.close()
    thread.join(PATIENCE_S)
    assert "closed" in str(errors[0])
    with pytest.raises(jf.FabricError, match="closed"):
        waiting.result()
    with pytest.raises(jf.FabricError, match="closed"):
        a.address()
    assert not waiting.cancel()
    assert region.array.sum() == 0  # the memory is the array's, too


def test_who_leaves_may_come_back(pair: Pair) -> None:
    a, b, peer, region = pair
    source = a.register_memory(np.zeros(10, np.uint8))
    for _ in range(3):
        waiting = b.expect_imm_count(6, 1, peers=list(b.peers()))
        a.disconnect(peer)
        with pytest.raises(jf.PeerLostError, match="disconnected"):
            waiting.result()
        with pytest.raises(jf.PeerLostError, match="connect to its address"):
            a.submit_send(peer, b"")
        peer = a.connect(b.address()).result()
        a.submit_single_write(source, region.desc, 5).result()
        b.imm_counter(5).wait(1)
    assert b.stats()["peers_lost"] == 3
    assert len(b.peers()) == 1


def test_registered_memory_is_kept_and_let_go() -> None:
    with engine() as a:
        array = np.zeros(1000)
        gone = weakref.ref(array)
        region = a.register_memory(array)
        del array
        gc.collect()
        assert gone() is not None
        a.unregister_memory(region)
        del region
        gc.collect()
        assert gone() is None


def test_leaving_with_an_error_does_not_wait() -> None:
    begin = time.monotonic()

    def leave() -> None:
        with engine() as a:
            a.expect_imm_count(1, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave()
    assert time.monotonic() - begin < 10


CHILD = """
import sys, jaxfabric as jf
with jf.TransferEngine(sys.argv[1], job="test", token="secret", name="child") as e:
    region = e.alloc(1 << 16)
    print(e.address().to_bytes().hex(), region.desc.to_bytes().hex(), flush=True)
    peer, _ = e.receive()
    e.imm_counter(1).wait(1)
    e.submit_send(peer, region.array[:4].tobytes()).result()
    sys.stdin.read()
"""


@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_a_killed_peer_is_named_and_its_successor_welcome(transport: str) -> None:
    with engine(transport) as a, engine(transport) as bystander:
        friend = a.connect(bystander.address()).result()
        source = a.register_memory(np.frombuffer(b"data" * 10, np.uint8))
        peers = []
        for _ in range(2):
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", CHILD, transport],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            try:
                assert child.stdout is not None
                address, desc = map(bytes.fromhex, child.stdout.readline().split())
                peer = a.connect(address).result()
                a.submit_send(peer, b"hello").result()
                target = jf.MrDesc.from_bytes(desc)
                a.submit_single_write(source, target, 1).result()
                assert a.receive() == (peer, b"data")
                barrier = a.submit_barrier(a.add_peer_group([peer, friend]))
                waiting = a.expect_imm_count(2, 1, peers=[peer])
                other = a.expect_imm_count(3, 1)
                child.send_signal(signal.SIGKILL)
                for future in (barrier, waiting):
                    with pytest.raises(jf.PeerLostError, match="child") as caught:
                        future.result()
                    assert caught.value.peers == (peer,)
                assert not other.done()
                with pytest.raises(jf.PeerLostError):
                    a.submit_single_write(source, target, 1)
                a.submit_send(friend, b"still here").result()
                assert bystander.receive().data == b"still here"
                peers.append(peer)
            finally:
                child.kill()
                child.communicate()
        assert peers[0] != peers[1]


@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_the_example_runs(transport: str) -> None:
    skip_unless_usable(transport)
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), "--transport", transport, "--rounds", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1024 pages of 16384 bytes are right" in done.stdout
    assert "MB/s" in done.stdout
