"""Two guests, rail to rail: `verbs` between machines, over a rail that loses."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from network.link_pair import PROGRAM, link_pair
from rxe import conformance, devices, remote

HERE, OTHER = "10.78.0.1", "10.78.0.2"
PROGRAM_IN_JIT = Path(__file__).with_name("joint_program.py")
COORDINATOR_PORT = 9911  # nobody else is here
# Emulated processors import JAX in 20 s and compile for as long; three times that.
JIT_TIMEOUT_S = 150
REGION_BYTES = 1 << 20
# A rail that loses is slow, and gets little: now and then nothing of the first writes.
TURN_TIMEOUT_S = 60


@pytest.fixture
def bad_rail(two_hosts: list[str]) -> Iterator[str]:
    """The interface of the last rail, which loses and reorders what this host sends."""
    interface = two_hosts[-1].replace("rxe", "nic")
    devices.disturb(interface, *devices.LOSS)
    yield interface
    assert devices.packets_lost(interface) > 0


def test_conformance_of_ranks_on_two_hosts(
    build: Path, two_hosts: list[str], bad_rail: str
) -> None:
    there = remote.command([])
    conformance.between(build, there, OTHER, two_hosts[-1:])  # the bad one
    conformance.between(build, there, OTHER, two_hosts, "*EightDomains*")
    for rail in two_hosts:
        assert devices.queue_pairs(rail) == []
        assert devices.queue_pairs(rail, there) == []


def test_the_engine_gets_every_byte_across(
    build: Path, two_hosts: list[str], bad_rail: str
) -> None:
    program = [str(build / PROGRAM), "verbs", ",".join(two_hosts)]
    command = [*program, str(REGION_BYTES), ""]
    with link_pair((command, remote.command(command)), REGION_BYTES) as engines:
        until = time.monotonic() + TURN_TIMEOUT_S
        for id in itertools.count(1):
            engines.transfer(id, count=4, timeout_s=60)
            carried = engines.writer.ask("stats").check().nic_bytes
            if id >= 3 and all(bytes > 0 for bytes in carried):
                break
            assert time.monotonic() < until, f"a rail has carried nothing: {carried}"


def test_programs_in_jit_give_the_bits_of_shm(bad_rail: str) -> None:
    command = [sys.executable, "-P", str(PROGRAM_IN_JIT), "verbs"]
    command += [f"{HERE}:{COORDINATOR_PORT}"]
    processes = [
        subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in ([*command, "0"], remote.command([*command, "1"]))
    ]
    try:
        for host, process in enumerate(processes):
            output, _ = process.communicate(timeout=JIT_TIMEOUT_S)
            assert process.returncode == 0, f"host {host}:\n{output}"
            assert "8 equal" in output
    finally:
        for process in processes:
            process.kill()
            process.communicate()
