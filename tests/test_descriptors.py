"""File descriptors that processes hand to each other, and those that do not come."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import jaxfabric as jf
from jaxfabric._descriptors import Exchange

WHAT = "jf.Fabric: heaps"
RANKS = {0: [0], 1: [1, 3], 2: [2]}
# As another user: to every socket that looks like ours.
STRANGER = """
import ctypes, os, pathlib, socket, time
os.setuid(65534)
PR_SET_DUMPABLE = 4  # or it may not read its own /proc
ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)
until = time.monotonic() + 30
known, open = set(), []
print("ready", flush=True)
while time.monotonic() < until:
    for line in pathlib.Path("/proc/net/unix").read_text().split():
        if line.startswith("@jaxfabric-") and line not in known:
            known.add(line)
            link = socket.socket(socket.AF_UNIX)
            try:
                link.connect("\\0" + line[1:])
                open.append(link)
                print("connected", flush=True)
            except OSError:
                pass
"""


class Meeting:
    """A rendezvous of threads."""

    def __init__(
        self, parties: int, timeout_s: float, met: Callable[[], Any] | None = None
    ) -> None:
        self.timeout_s = timeout_s
        self._payloads: list[bytes] = []
        self._met = threading.Barrier(parties, met)

    def all_gather(self, payload: bytes) -> list[bytes]:
        self._payloads.append(payload)
        self._met.wait(self.timeout_s)
        return list(self._payloads)


def alone(name: str) -> Any:
    return Alone(name)


class Alone:
    """A rendezvous that another process has passed, and does not go on."""

    def __init__(self, name: str, timeout_s: float = 0.5) -> None:
        self.timeout_s = timeout_s
        self._name = name

    def all_gather(self, payload: bytes) -> list[bytes]:
        return [payload, json.dumps([1, self._name]).encode()]


def handed(me: int, meeting: Any, counts: dict[int, int]) -> dict[int, list[bytes]]:
    """What a process reads from the pipes that the others gave it."""
    pipes = [os.pipe() for _ in range(counts[me])]
    for place, (_, write) in enumerate(pipes):
        os.write(write, f"{me}.{place}".encode() * len(RANKS))
        os.close(write)
    try:
        with Exchange(WHAT, me, RANKS, meeting).run([p[0] for p in pipes]) as theirs:
            return {
                process: [os.read(fd, 3) for fd in fds]
                for process, fds in theirs.items()
            }
    finally:
        for read, _ in pipes:
            os.close(read)


def everyone(meeting: Meeting, counts: dict[int, int]) -> list[Any]:
    """Results or errors of three processes."""
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(handed, me, meeting, counts) for me in RANKS]
        return [future.exception() or future.result() for future in futures]


def test_each_gets_what_all_others_have() -> None:
    before = len(os.listdir("/proc/self/fd"))
    counts = {process: len(ranks) for process, ranks in RANKS.items()}
    found = everyone(Meeting(3, 10), counts)
    for me, theirs in enumerate(found):
        assert theirs == {
            process: [f"{process}.{place}".encode() for place in range(counts[process])]
            for process in RANKS
            if process != me
        }
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_with_too_few_is_named() -> None:
    before = len(os.listdir("/proc/self/fd"))
    found = everyone(Meeting(3, 10), {0: 1, 1: 1, 2: 1})
    for me in (0, 2):
        assert isinstance(found[me], jf.FabricError)
        assert "process 1 gave 1 descriptors for its ranks [1, 3]" in str(found[me])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_has_ended_is_named() -> None:
    exchange = Exchange(WHAT, 0, {0: [0], 1: [1, 3]}, alone("nobody"))
    with pytest.raises(
        jf.PeerLostError, match=r"process 1 \(ranks \[1, 3\]\) ended"
    ) as e:
        exchange.run([]).__enter__()
    assert e.value.peers == (1, 3)


def test_a_process_that_does_not_answer_is_named() -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(b"\0jaxfabric-test-silent")
        silent.listen(1)
        exchange = Exchange(WHAT, 0, {0: [0], 1: [1]}, alone("jaxfabric-test-silent"))
        began = time.monotonic()
        with pytest.raises(
            jf.DeadlineError, match=r"process 1 .* did not answer in 0\.5"
        ):
            exchange.run([]).__enter__()
        assert time.monotonic() - began < 5


@pytest.fixture
def stranger() -> Iterator[Any]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to start a process of another user")
    with subprocess.Popen(
        [sys.executable, "-c", STRANGER], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.stdout
        process.kill()


def test_a_stranger_is_sent_away(stranger: Any) -> None:
    # Before anybody else connects.
    meeting = Meeting(3, 10, stranger.readline)
    counts = {process: len(ranks) for process, ranks in RANKS.items()}
    for theirs in everyone(meeting, counts):
        assert isinstance(theirs, dict), theirs
