"""libfabric's own `efa` provider, on software EFA devices; and its `tcp`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

import pytest

from network.link_pair import (
    PROGRAM,
    LinkPair,
    link_pair,
    median_ratio,
    rates_in_turns,
)
from network.softefa import SoftEfa

CONFORMANCE = (Path("tests/cpp/ofi_test"), Path("tests/cpp/ofi_fence_test"))
REGION_BYTES = 32 << 20  # long enough for the engine's largest chunks

BOTH = ("efa", "efa-direct")
# What a device may be like: settings of tests/softefa/settings.h.
DEVICES: dict[str, dict[str, int]] = {
    "plain": {},
    "two-nics": {"nics": 2},
    "four-nics-chaos": {"nics": 4, "chaos": 1},
    "small-queues-chaos": {"sq": 16, "rq": 64, "chaos": 2},
    "immediates-consume-receives": {"unsolicited": 0, "chaos": 3},
    "paced": {"gbps": 8},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("provider", BOTH)
def test_conformance(
    softefa_build: Path, libfabric: str, provider: str, device: str
) -> None:
    _conform(softefa_build, libfabric, provider, DEVICES[device])


def test_conformance_without_rdma(softefa_build: Path, libfabric: str) -> None:
    # `efa` then moves bytes by messages of its own; efa-direct does not exist.
    _conform(softefa_build, libfabric, "efa", {"rdma": 0, "chaos": 4})


def test_conformance_with_short_writes(softefa_build: Path, libfabric: str) -> None:
    _conform(softefa_build, libfabric, "efa-direct", {"max_rdma": 1 << 20})


def test_conformance_of_tcp(build: Path, libfabric: str) -> None:
    # Needs no device, but only libfabric 2's tcp can cut off a peer.
    output = _run_conformance(build, libfabric, "tcp", {})
    assert "cannot fence" not in output, output
    assert "crashes when it is cut" not in output, output


def test_shm_between_processes(build: Path, libfabric: str) -> None:
    # Within one process libfabric's shm crashes, so there is no conformance suite.
    command = [str(build / PROGRAM), "shm", "shm", str(REGION_BYTES), libfabric]
    with link_pair((command, command), REGION_BYTES) as pair:
        for id in range(1, 4):
            pair.transfer(id, count=2)
        pair.receiver.tell("receive 100 10")
        pair.writer.ask("send 100 10", 10).check()
        pair.receiver.answer(10).check()
    for peer in (pair.writer, pair.receiver):
        assert peer.process.returncode == 0


def _conform(
    build: Path, libfabric: str, provider: str, device: dict[str, int]
) -> None:
    with SoftEfa(build, **device) as network:
        _run_conformance(build, libfabric, provider, network.environment())


def _run_conformance(
    build: Path, libfabric: str, provider: str, environment: dict[str, str]
) -> str:
    variables = environment | {
        "JAXFABRIC_LIBFABRIC": libfabric,
        "JAXFABRIC_TEST_OFI_PROVIDER": provider,
    }
    output = ""
    for program in CONFORMANCE:
        run = subprocess.run(
            [str(build / program), "--gtest_brief=1"],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stdout
        output += run.stdout
    # Without a device the program would have passed, too.
    assert "without a device" not in output, output
    return output


def _pair(
    build: Path,
    libfabric: str,
    provider: str,
    network: SoftEfa,
    bytes: int = REGION_BYTES,
) -> contextlib.AbstractContextManager[LinkPair]:
    program = [str(build / PROGRAM), provider, ",".join(network.nic_names)]
    command = [*program, str(bytes), libfabric]
    environments = (network.environment(host=1), network.environment(host=2))
    return link_pair((command, command), bytes, environments)


@pytest.mark.slow
@pytest.mark.parametrize("provider", BOTH)
def test_four_paced_nics_carry_four_times_as_much_as_one(
    softefa_build: Path, libfabric: str, provider: str
) -> None:
    gbps = 0.5
    with (
        SoftEfa(softefa_build, nics=1, gbps=gbps) as one,
        SoftEfa(softefa_build, nics=4, gbps=gbps) as four,
        _pair(softefa_build, libfabric, provider, one) as single,
        _pair(softefa_build, libfabric, provider, four) as group,
    ):
        # 128 MiB for each NIC. The best of each in up to 8 turns, as no NIC can be
        # faster than its pace, and a busy machine makes a software NIC slower.
        of_one = of_four = 0.0
        for id in range(1, 9):
            of_one = max(of_one, single.transfer(id, count=4))
            of_four = max(of_four, group.transfer(id, count=16))
            print(f"MB/s: {of_one / 1e6:.1f} {of_four / 1e6:.1f}")
            if of_four >= 3.95 * of_one:
                break
    assert 0.985 <= of_one / (gbps * 1e9 / 8) <= 1.01
    assert of_four >= 3.95 * of_one


@pytest.mark.slow
@pytest.mark.parametrize("provider", BOTH)
def test_a_slow_nic_slows_only_itself(
    softefa_build: Path, libfabric: str, provider: str
) -> None:
    rates = (0.5, 0.5, 0.5, 0.125)
    with contextlib.ExitStack() as stack:
        singles = []
        for rate in (rates[0], rates[-1]):
            network = stack.enter_context(SoftEfa(softefa_build, nics=1, gbps=rate))
            bytes = int(REGION_BYTES * rate)
            pair = _pair(softefa_build, libfabric, provider, network, bytes)
            singles.append(stack.enter_context(pair))
        settings = ",".join(map(str, rates))
        network = stack.enter_context(SoftEfa(softefa_build, nics=4, gbps=settings))
        group = stack.enter_context(_pair(softefa_build, libfabric, provider, network))

        def sum_of_singles(id: int) -> float:
            fast, slow = (pair.transfer(id) for pair in singles)
            return 3 * fast + slow

        # 1.5 s: the end, where only the slow one is busy, is short by comparison.
        measures = [sum_of_singles, lambda id: group.transfer(id, count=9)]
        alone, at_once = rates_in_turns(measures)
        assert median_ratio(at_once, alone) >= 0.95


@pytest.mark.parametrize("state", ["down", "unacked", "late", "dying"])
def test_a_nic_that_fails_in_mid_transfer_is_never_counted_twice(
    softefa_build: Path, libfabric: str, state: str
) -> None:
    count = 3  # 0.2 s
    with (
        SoftEfa(softefa_build, nics=4, gbps=1) as network,
        _pair(softefa_build, libfabric, "efa-direct", network) as pair,
    ):
        pair.writer.ask("fill 1").check()
        pair.begin(1, count, timeout_s=3)
        time.sleep(0.05)
        network.set_faults(f"1 2 {state}")
        written = pair.writer.answer(3)
        received = pair.receiver.answer(3)
        left = pair.receiver.ask("count 1").check().count
        if written.error is None:
            received.check()
            pair.receiver.ask("check 1").check()
            assert left == 0
        else:
            # The sender does not know of each transfer whether it came.
            came = left + (count if received.error is None else 0)
            assert written.written <= came <= count


def test_a_stalled_nic_resumes(softefa_build: Path, libfabric: str) -> None:
    with (
        SoftEfa(softefa_build, nics=2, gbps=1) as network,
        _pair(softefa_build, libfabric, "efa-direct", network) as pair,
    ):
        pair.writer.ask("fill 1").check()
        pair.begin(1, count=2)
        time.sleep(0.05)
        network.set_faults("* 1 stalled")
        time.sleep(1)
        network.set_faults()
        pair.finish(1, count=2)


def test_a_killed_target_is_an_error_soon(softefa_build: Path, libfabric: str) -> None:
    with (
        SoftEfa(softefa_build, nics=2, gbps=1) as network,
        _pair(softefa_build, libfabric, "efa-direct", network) as pair,
    ):
        pair.begin(1, count=50, timeout_s=60)
        time.sleep(0.3)
        pair.receiver.process.kill()
        killed = time.monotonic()
        answer = pair.writer.answer(60)
        assert answer.error is not None
        assert time.monotonic() - killed < 5
