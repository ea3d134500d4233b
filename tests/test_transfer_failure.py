"""jf.TransferEngine: engines that close, die, fall silent, or err."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transfer_cases import (
    PATIENCE_S,
    TRANSPORTS,
    Pair,
    engine,
    open_pair,
    skip_unless_usable,
    until,
)

import jaxfabric as jf
from jaxfabric import _ffi

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "two_jobs.py"


@pytest.fixture(params=TRANSPORTS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield from open_pair(request.param)


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


def test_a_fence_is_refused_where_there_is_none() -> None:
    with (
        engine() as a,
        pytest.raises(jf.FabricError, match="over shm nothing can stop"),
    ):
        a.submit_fence()


def test_a_fence_after_a_loss_ends_and_others_write_on() -> None:
    with engine("ofi/tcp") as a, engine("ofi/tcp") as b, engine("ofi/tcp") as c:
        region = b.alloc(8)
        first, second = (each.connect(b.address()).result() for each in (a, c))
        a.submit_single_write(a.alloc(8), region.desc, 1).result()
        b.imm_counter(1).wait(1)
        a.disconnect(first)
        until(lambda: len(b.peers()) == 1)
        b.submit_fence().result()
        c.submit_single_write(c.alloc(8), region.desc, 2).result()
        b.imm_counter(2).wait(1)
        assert second in c.peers()
        address = b.address()
        b.submit_fence().result()  # nobody was lost since
        assert b.address() == address


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
        until(lambda: gc.collect() >= 0 and gone() is None)


def test_the_native_engine_keeps_registered_memory_until_it_has_closed() -> None:
    a = engine()
    array = np.zeros(1000)
    gone = weakref.ref(array)
    a.register_memory(array)
    del array
    a._regions.clear()
    gc.collect()
    assert gone() is not None
    a.close()
    gc.collect()
    assert gone() is None


def test_close_sends_home_who_is_inside_a_call_and_waits_for_him() -> None:
    a = engine()
    a.expect_imm_count(1, 1)
    back: list[float] = []

    def wait_inside() -> None:
        with pytest.raises(Exception, match="closed"):
            a._native.receive(PATIENCE_S)
        back.append(time.monotonic())

    thread = threading.Thread(target=wait_inside)
    thread.start()
    time.sleep(0.05)
    begin = time.monotonic()
    a.close()
    assert time.monotonic() - begin < PATIENCE_S / 3
    thread.join(PATIENCE_S)
    assert back


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


def start(script: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", script, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_a_killed_peer_is_named_and_its_successor_welcome(transport: str) -> None:
    with engine(transport) as a, engine(transport) as bystander:
        friend = a.connect(bystander.address()).result()
        source = a.register_memory(np.frombuffer(b"data" * 10, np.uint8))
        peers = []
        for _ in range(2):
            child = start(CHILD, transport)
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
def test_unregistering_names_the_peer_that_is_stopped(transport: str) -> None:
    with engine(transport) as a:
        child = start(CHILD, transport)
        try:
            assert child.stdout is not None
            address, _ = map(bytes.fromhex, child.stdout.readline().split())
            a.connect(address).result()
            region = a.alloc(100)
            assert region.desc.nbytes == 100
            child.send_signal(signal.SIGSTOP)
            os.waitpid(child.pid, os.WUNTRACED)  # until all its threads have stopped
            with pytest.raises(jf.DeadlineError, match="child") as caught:
                a.unregister_memory(region, 0.5)
            assert "stays registered" in str(caught.value)
            child.send_signal(signal.SIGCONT)
            a.unregister_memory(region)
        finally:
            child.kill()
            child.communicate()


def test_a_region_ends_although_software_may_still_write_into_it() -> None:
    with engine("ofi/tcp", name="writer") as a, engine("ofi/tcp") as b:
        region = b.alloc(100)
        assert region.desc.nbytes == 100
        a.connect(b.address()).result()
        until(lambda: b.peers())
        b.disconnect(next(iter(b.peers())))
        if _ffi.open_for_caps("ofi/tcp")["removal_fences"]:  # cuts it off first
            b.unregister_memory(region)
            return
        with pytest.raises(jf.FabricError, match=r"writer.*may still have writes"):
            b.unregister_memory(region)
        assert region.desc.nbytes == 100


def test_a_stopped_peer_holds_up_no_write_to_others() -> None:
    # The first write into a region asks its peer for the memory.
    with engine("shm") as a:
        children = [start(CHILD, "shm") for _ in range(2)]
        try:
            descs = []
            for child in children:
                assert child.stdout is not None
                line = child.stdout.readline().split()
                address, desc = map(bytes.fromhex, line)
                a.connect(address).result()
                descs.append(jf.MrDesc.from_bytes(desc))
            stopped, other = descs
            source = a.alloc(stopped.nbytes)
            children[0].send_signal(signal.SIGSTOP)
            os.waitpid(children[0].pid, os.WUNTRACED)
            begin = time.monotonic()
            slow = a.submit_single_write(source, stopped, id=1)
            late = a.submit_single_write(source, stopped, timeout_s=0.3)
            a.submit_single_write(source, other, nbytes=1).result()
            both = [jf.ScatterTarget(d, 0, 0, 1) for d in descs]
            scatter = a.submit_scatter(source, both)
            assert time.monotonic() - begin < 1.0
            assert not slow.done()
            with pytest.raises(jf.DeadlineError, match="child"):
                late.result()
            assert time.monotonic() - begin < 2.0
            children[0].send_signal(signal.SIGCONT)
            slow.result()
            scatter.result()
        finally:
            for child in children:
                child.kill()
                child.communicate()


SENDER = """
import sys, numpy as np, jaxfabric as jf
transport, address, desc = sys.argv[1:]
with jf.TransferEngine(transport, job="test", token="secret", name="child") as e:
    e.connect(bytes.fromhex(address)).result()
    pages = 1 << 14
    source = e.register_memory(np.full(pages << 12, 1, np.uint8))
    order = np.arange(pages)[::-1]  # so that none joins the next
    e.submit_paged_writes(
        source, order, jf.MrDesc.from_bytes(bytes.fromhex(desc)), order, 4096, id=7
    )
    sys.stdin.read()
"""


def test_a_killed_senders_part_is_never_counted_for_its_successor() -> None:
    with engine("ofi/tcp") as b, engine("ofi/tcp") as successor:
        region = b.alloc(1 << 26)
        child = start(
            SENDER,
            *("ofi/tcp", b.address().to_bytes().hex(), region.desc.to_bytes().hex()),
        )
        try:
            until(lambda: region.array[::4096].any())
        finally:
            child.kill()
            child.communicate()
        until(lambda: not b.peers())
        successor.connect(b.address()).result()
        source = successor.register_memory(np.full(1 << 26, 2, np.uint8))
        write = successor.submit_single_write(source, region.desc, 7)
        outcome = b.expect_imm_count(7, 1).exception()
        if outcome is None:
            assert (region.array == 2).all()
        else:  # where the NIC does not say whose an immediate is
            assert "peer 0 child" in str(outcome)
            assert "use a new id" in str(outcome)
        write.result()


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
