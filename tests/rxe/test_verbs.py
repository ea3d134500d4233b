"""The transport `verbs` on soft-RoCE: its contract, and the engine over its rails."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from network.link_pair import PROGRAM, LinkPair, LinkPeer, link_pair
from rxe import devices
from rxe.devices import Cable

CONFORMANCE = Path("tests/cpp/verbs_test")
CONFORMANCE_TIMEOUT_S = 120
DEVICES_VARIABLE = "JAXFABRIC_TEST_VERBS_DEVICES"
REGION_BYTES = 1 << 20
SYSTEM_LIBRARY = ""  # libibverbs as dlopen finds it
# The engine's limit for a silent peer, 15 s, and as much again for a busy machine.
NOTICE_S = 30


def conform(build: Path, *runs: Sequence[str]) -> None:
    """Runs the conformance suite, once for each group of devices, all at once."""
    command = [str(build / CONFORMANCE), "--gtest_brief=1"]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | {DEVICES_VARIABLE: ",".join(used)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for used in runs
    ]
    try:
        for used, process in zip(runs, processes, strict=True):
            output, _ = process.communicate(timeout=CONFORMANCE_TIMEOUT_S)
            assert process.returncode == 0, f"{used}:\n{output}"
            # Without a device the program would have passed, too.
            assert "without a device" not in output, output
    finally:
        for process in processes:
            process.kill()
            process.communicate()


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


def held_by(process: subprocess.Popen[str], rail: str) -> int:
    """Queue pairs of a process."""
    return sum(pair["pid"] == process.pid for pair in devices.queue_pairs(rail))


def test_conformance_on_each_rail(build: Path, rails: list[str]) -> None:
    conform(build, *([rail] for rail in rails))
    assert [devices.queue_pairs(rail) for rail in rails] == [[]] * len(rails)


def test_conformance_over_a_cable_that_loses_and_reorders(
    build: Path, cable: Cable
) -> None:
    devices.disturb(cable.interfaces[0], *devices.LOSS)
    conform(build, cable.devices)
    assert devices.packets_lost(cable.interfaces[0]) > 0


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_engine_uses_all_rails(build: Path, rails: list[str], count: int) -> None:
    if count > len(rails):
        pytest.skip(f"{len(rails)} rails, not {count}")
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
    if len(rails) < 2:
        pytest.skip("one rail only")
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
