"""What becomes of transfers and messages when a NIC, or a peer, stops working."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from network.link_pair import PROGRAM, LinkPair, LinkPeer, link_pair
from network.softefa import SoftEfa

MIB = 1 << 20
# A fence takes the time of a few messages, and 0.6 s where a NIC says nothing.
SOON_S = 6.0


@contextlib.contextmanager
def _efa_pair(
    build: Path, libfabric: str, network: SoftEfa, bytes: int = 8 * MIB
) -> Iterator[LinkPair]:
    program = [str(build / PROGRAM), "efa-direct", ",".join(network.nic_names)]
    command = [*program, str(bytes), libfabric]
    environments = (network.environment(host=1), network.environment(host=2))
    with link_pair((command, command), bytes, environments) as pair:
        yield pair


def _nic_bytes(pair: LinkPair) -> list[int]:
    return list(pair.writer.ask("stats").check().nic_bytes)


def _wait_until_used(pair: LinkPair, nic: int, first_id: int) -> None:
    """Transfers under new ids until the NIC carries some of them."""
    before = _nic_bytes(pair)[nic]
    deadline = time.monotonic() + 20
    id = first_id
    while _nic_bytes(pair)[nic] == before:
        assert time.monotonic() < deadline, f"NIC {nic} did not come back"
        pair.transfer(id, count=2)
        id += 1


@pytest.mark.parametrize("state", ["down", "unacked", "late", "dying", "stalled"])
def test_a_nic_that_fails_in_mid_transfer_costs_no_transfer(
    softefa_build: Path, libfabric: str, state: str
) -> None:
    # Both ends fence the NIC; what is missing goes over the others. `unacked` is a
    # link that is killed between delivery and local completion.
    count = 8
    with (
        SoftEfa(softefa_build, nics=2, gbps=0.5) as network,
        _efa_pair(softefa_build, libfabric, network) as pair,
    ):
        pair.transfer(1)
        pair.writer.ask("fill 2").check()
        pair.begin(2, count, timeout_s=20)
        time.sleep(0.1)
        network.set_faults(f"1 1 {state}")
        pair.finish(2, count, timeout_s=20)
        # Exactly `count`: nothing that came late was counted on top.
        time.sleep(0.2)
        assert pair.receiver.ask("count 2").check().count == 0
        pair.transfer(3, count=2)
        network.set_faults()
        _wait_until_used(pair, nic=1, first_id=4)


@pytest.mark.parametrize("state", ["down", "stalled"])
def test_messages_survive_the_nic_that_carries_them(
    softefa_build: Path, libfabric: str, state: str
) -> None:
    count = 400
    with (
        SoftEfa(softefa_build, nics=2) as network,
        _efa_pair(softefa_build, libfabric, network, MIB) as pair,
    ):
        for nic in range(2):
            pair.receiver.tell(f"receive {2 * count} 20")
            pair.writer.tell(f"send {count} 20")
            network.set_faults(f"* {nic} {state}")
            pair.writer.answer(20).check()
            pair.writer.ask(f"send {count} 20", 20).check()
            pair.receiver.answer(20).check()
            network.set_faults()
            _wait_until_used(pair, nic, first_id=1 + 1000 * nic)


@contextlib.contextmanager
def _tcp_peers(build: Path, libfabric: str, bytes: int) -> Iterator[list[LinkPeer]]:
    command = [str(build / PROGRAM), "tcp", "lo", str(bytes), libfabric]
    with contextlib.ExitStack() as stack:
        peers = []
        for _ in range(3):
            peers.append(LinkPeer(command, {}))
            stack.callback(peers[-1].close)
        yield peers


@pytest.mark.parametrize("ending", [signal.SIGCONT, signal.SIGKILL])
def test_writes_to_a_frozen_process_end_and_free_their_memory(
    build: Path, libfabric: str, ending: signal.Signals
) -> None:
    timeout_s = 1.0
    with _tcp_peers(build, libfabric, 64 * MIB) as (writer, frozen, third):
        writer.ask(f"connect {frozen.address} {frozen.region} 10", 10).check()
        third.ask(f"connect {writer.address} {writer.region} 10", 10).check()
        writer.ask("write 1 1 10", 10).check()
        frozen.ask("expect 1 1 10", 10).check()
        frozen.process.send_signal(signal.SIGSTOP)
        try:
            begin = time.monotonic()
            writer.tell(f"write 2 3 {timeout_s}")
            # Somebody else goes on all the time, also while the NIC is cleared.
            rounds = 0
            while time.monotonic() - begin < timeout_s + 3:
                third.ask("write 3 1 5", 5).check()
                rounds += 1
            answer = writer.answer(timeout_s)
            assert answer.seconds < timeout_s + SOON_S
            assert answer.error is not None
            assert "outlived" not in answer.error
            for word in ("write", "peer", "time limit"):
                assert word in answer.error, answer.error
            # No NIC reads it any more.
            writer.ask("unregister 5", 5).check()
            writer.ask(f"expect 3 {rounds} 5", 5).check()
        finally:
            frozen.process.send_signal(ending)
        if ending == signal.SIGCONT:
            # It has lost its peer, and nothing else.
            frozen.ask("count 2").check()


def test_a_region_ends_although_a_frozen_writer_was_lost(
    build: Path, libfabric: str
) -> None:
    # What it had under way lies in the kernel, and would land when it goes on.
    with _tcp_peers(build, libfabric, 64 * MIB) as (owner, frozen, third):
        owner.ask(f"connect {frozen.address} {frozen.region} 10", 10).check()
        frozen.ask(f"connect {owner.address} {owner.region} 10", 10).check()
        third.ask(f"connect {frozen.address} {frozen.region} 10", 10).check()
        third.ask(f"connect {owner.address} {owner.region} 10", 10).check()
        frozen.ask("fill 1").check()
        frozen.tell("write 2 200 20")
        owner.ask("expect 2 2 10", 10).check()
        frozen.process.send_signal(signal.SIGSTOP)
        try:
            late = owner.ask("withdraw 0.5", 0.5)
            assert late.error is not None
            assert "stays registered" in late.error
            # They would rather not pause for somebody who dies.
            owner.ask("disconnect").check()
            third.tell("write 3 1 10")
            owner.ask("withdraw 5", 5).check()
            third.answer(10)  # perhaps refused: the region goes
            owner.ask("store 5").check()
        finally:
            frozen.process.send_signal(signal.SIGCONT)
        assert frozen.answer(20).error is not None
        owner.ask("check 5").check()
        # Others are still there.
        third.ask("send 10 5", 5).check()
