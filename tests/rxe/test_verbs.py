"""The transport `verbs` on soft-RoCE: its contract, and the engine over its rails."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from network.link_pair import PROGRAM, LinkPair, LinkPeer, link_pair
from rxe import conformance, devices
from rxe.devices import Cable

REGION_BYTES = 1 << 20
SYSTEM_LIBRARY = ""  # libibverbs as dlopen finds it
# Of a death amid writes, three times what it takes in a guest.
NOTICE_S = 6
# Limit of what is under way when a rail goes. Its interface takes up to 10 s to go down
# under writes, on one emulated processor; then the peer is given up after 10.
UNPLUGGED_S = 30.0


def peer_command(build: Path, rails: Sequence[str]) -> list[str]:
    """An end of an engine over some rails."""
    command = [str(build / PROGRAM), "verbs", ",".join(rails)]
    return [*command, str(REGION_BYTES), SYSTEM_LIBRARY]


@contextlib.contextmanager
def pair(build: Path, rails: Sequence[str]) -> Iterator[LinkPair]:
    """A writer and a receiver, which in the end leave no queue pair."""
    before = [len(devices.queue_pairs(rail)) for rail in rails]
    command = peer_command(build, rails)
    with link_pair((command, command), REGION_BYTES) as engines:
        yield engines
    assert [len(devices.queue_pairs(rail)) for rail in rails] == before


def need(rails: Sequence[str], count: int) -> None:
    """Skips where there are fewer."""
    if count > len(rails):
        pytest.skip(f"{len(rails)} rails, not {count}")


def held_by(process: subprocess.Popen[str], rail: str) -> int:
    """Queue pairs of a process."""
    return sum(pair["pid"] == process.pid for pair in devices.queue_pairs(rail))


def test_conformance_on_each_rail(build: Path, rails: list[str]) -> None:
    # Two at once: of four on one processor each would wait too long for the others.
    for first in range(0, len(rails), 2):
        two = rails[first : first + 2]
        conformance.on_devices(build, *([rail] for rail in two))
    assert [devices.queue_pairs(rail) for rail in rails] == [[]] * len(rails)


def test_greetings_and_removals_over_a_cable_that_loses_and_reorders(
    build: Path, cable: Cable
) -> None:
    devices.disturb(cable.interfaces[0], *devices.LOSS)
    # Without the intruders: they say things once, and wait for the answer.
    conformance.on_devices(build, cable.devices, only="VerbsTest.*")
    assert devices.packets_lost(cable.interfaces[0]) > 0


@pytest.mark.parametrize("count", [2, 4])
def test_many_domains_use_all_rails_of_a_transport(
    build: Path, rails: list[str], count: int
) -> None:
    need(rails, count)
    conformance.between(build, [], "127.0.0.1", rails[:count], "*EightDomains*")
    assert [devices.queue_pairs(rail) for rail in rails] == [[]] * len(rails)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_engine_uses_all_rails(build: Path, rails: list[str], count: int) -> None:
    need(rails, count)
    with pair(build, rails[:count]) as engines:
        for id in range(1, 4):
            engines.transfer(id, count=4)
        carried = engines.writer.ask("stats").check().nic_bytes
    assert len(carried) == count
    assert all(bytes > 0 for bytes in carried)


def test_a_killed_target_is_an_error_and_leaves_no_queue_pair(
    build: Path, rails: list[str]
) -> None:
    used = rails[:2]
    with pair(build, used) as engines, contextlib.ExitStack() as stack:
        writer = engines.writer
        held = [held_by(writer.process, rail) for rail in used]
        engines.begin(1, count=2000, timeout_s=60)
        time.sleep(0.5)
        engines.receiver.process.kill()
        killed = time.monotonic()
        answer = writer.answer(60)
        assert answer.error is not None
        print(f"after {time.monotonic() - killed:.2f} s: {answer.error}")
        assert time.monotonic() - killed < NOTICE_S
        # The survivor goes on, with no more queue pairs than before.
        heir = LinkPeer(peer_command(build, used), {})
        stack.callback(heir.close)
        writer.ask(f"connect {heir.address} {heir.region} 20", 20).check()
        LinkPair(writer, heir, REGION_BYTES).transfer(2)
        assert [held_by(writer.process, rail) for rail in used] == held


def test_the_other_rails_carry_what_an_unplugged_one_cannot(
    build: Path, rails: list[str]
) -> None:
    need(rails, 2)
    kept, lost = rails[:2]
    with (
        devices.pluggable(lost) as unplug,
        pair(build, [kept, lost]) as engines,
    ):
        engines.transfer(1)
        engines.writer.ask("fill 2").check()
        engines.begin(2, count=40, timeout_s=60)
        time.sleep(0.2)
        unplug()
        engines.finish(2, count=40, timeout_s=60)
        before = engines.writer.ask("stats").check().nic_bytes
        engines.transfer(3)
        after = engines.writer.ask("stats").check().nic_bytes
    assert after[0] > before[0]
    assert after[1] == before[1]


def test_an_only_rail_that_is_unplugged_is_an_error_at_both_ends(
    build: Path, rails: list[str]
) -> None:
    need(rails, 2)
    kept, lost = rails[:2]
    with (
        pair(build, [kept]) as others,
        devices.pluggable(lost) as unplug,
        pair(build, [lost]) as engines,
    ):
        engines.begin(1, count=2000, timeout_s=UNPLUGGED_S)
        time.sleep(0.5)
        begin = time.monotonic()
        unplug()
        print(f"unplugged within {time.monotonic() - begin:.2f} s")
        for end in (engines.writer, engines.receiver):
            error = end.answer(UNPLUGGED_S).error
            print(f"after {time.monotonic() - begin:.2f} s: {error}")
            assert error is not None
            assert re.search(rf"under id 1\b.*peer 0 .*{lost}:1", error)
        assert time.monotonic() - begin < UNPLUGGED_S + 2
        assert f"{lost}:1 is not up" in str(error)  # of the receiver's
        # Nor does the next operation hang.
        peer = engines.receiver
        error = engines.writer.ask(f"connect {peer.address} {peer.region} 2", 2).error
        assert error is not None
        assert "connect to link_peer" in error
        others.transfer(1)
    with pair(build, [lost]) as heirs:  # it is plugged in again
        heirs.transfer(1)
