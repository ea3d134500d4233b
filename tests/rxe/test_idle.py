"""Engines with nothing to do let others work, and are still in time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxfabric as jf

# Four times a second each tells its peer that it lives, wakes for that, and again
# since the device has sent it.
WAKES_PER_S = 14
TIMEOUT_S = 0.06
# The worker looks 20 times a second, on a processor that is emulated.
LATE_S = 0.09


@pytest.fixture
def engines(rails: list[str]) -> Iterator[tuple[jf.TransferEngine, jf.TransferEngine]]:
    """Two that are connected, in this process."""
    with contextlib.ExitStack() as stack, jf.config(nics=rails[0]):
        first, second = (
            stack.enter_context(jf.TransferEngine("verbs", nics=1)) for _ in range(2)
        )
        first.connect(second.address()).result()
        time.sleep(0.5)
        yield first, second


def wakes() -> int:
    """How often workers of this process have slept so far."""
    found = 0
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "jaxfabric-xfer":
            status = (task / "status").read_text()
            lines = dict(line.split(":", 1) for line in status.splitlines())
            found += int(lines["voluntary_ctxt_switches"])
    return found


@pytest.mark.usefixtures("engines")
def test_idle_engines_hardly_wake() -> None:
    before, begin = wakes(), time.monotonic()
    time.sleep(3)
    rate = (wakes() - before) / 2 / (time.monotonic() - begin)
    print(f"{rate:.1f} times a second")
    assert rate < WAKES_PER_S


def test_what_begins_meanwhile_ends_by_its_deadline(
    engines: tuple[jf.TransferEngine, jf.TransferEngine],
) -> None:
    late = []
    for id in range(1, 9):
        time.sleep(0.3 + id * 0.013)  # the worker sleeps by now
        begin = time.monotonic()
        future = engines[0].expect_imm_count(id, 1, timeout_s=TIMEOUT_S)
        # Who waits for the result would poll, and wake the worker afterwards.
        while not future.done() and time.monotonic() < begin + 5:
            time.sleep(0.005)
        late.append(time.monotonic() - begin - TIMEOUT_S)
        assert isinstance(future.exception(), jf.DeadlineError)
    print(f"late by {max(late):.3f} s at most")
    assert max(late) < LATE_S
