"""Our writes beside those of perftest's `ib_write_bw`, on the same device.

Both write plain bytes, without immediates, over one queue pair with the port's MTU,
as many writes in flight, all from the same bytes to the same place (as perftest does:
from 4 KiB up its memory has one message for each direction). Ours are those of
`jaxfabric bench put`, Python and all, which also checks that the bytes arrive. The two
are measured in turns, so that a busy machine hits both.

    python -m tests.rxe --accelerator icount -- pytest tests/rxe/test_rate.py -s
    python -m tests.rxe -- pytest tests/rxe/test_rate.py -s

The first, which CI runs, counts instructions: it gives the same on any machine. The
second measures time, and compares the best rounds, since others only make rounds
longer; still, it means something on a quiet machine alone, and there the share is
missed: docs/design/0007-verbs.md.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator

from jaxfabric._bench import case as cases
from jaxfabric._bench.figures import Measurement
from jaxfabric._bench.ib_write_bw import IbWriteBw
from jaxfabric._bench.subjects import ChildSubject
from rxe.machine import ACCELERATOR_VARIABLE

SIZES = (64 << 10, 256 << 10, 1 << 20)
WINDOW = 16
SECONDS = 1.0
BYTES = 64 << 20  # of ib_write_bw in each round: about as long
SHARE_MIN = 0.9  # of ib_write_bw's rate


def turns(device: str, rounds: int) -> Iterator[tuple[cases.Case, float, float]]:
    """For each round and size: what is measured, our rate and theirs, in bytes/s."""
    ours = ChildSubject(
        "jaxfabric",
        "ours",
        "verbs",
        "fabric",
        options={"transport": "verbs", "nics": 1, "counted": False},
        environment={"JAXFABRIC_NICS": device},
    )
    theirs = IbWriteBw(medium="verbs", device=device)
    plan = cases.plan(("single",), SIZES, peers=1, window=WINDOW, one_place=True)
    plan = plan * rounds
    for case, outcome in ours.measure(plan, SECONDS):
        assert isinstance(outcome, Measurement), outcome
        rate = outcome.operations * case.size / outcome.seconds
        count = max(WINDOW + 1, BYTES // case.size)
        yield case, rate, case.size / theirs.run(case.size, count, case.window)


def test_writes_are_nearly_as_fast_as_perftests(rails: list[str]) -> None:
    counts_instructions = os.environ[ACCELERATOR_VARIABLE] == "icount"
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in SIZES}
    for case, ours, theirs in turns(rails[0], rounds=1 if counts_instructions else 7):
        found[case.size].append((ours, theirs))
        print(
            f"{case.label}, {case.window} in flight: ours {ours / 1e6:.1f}, "
            f"ib_write_bw {theirs / 1e6:.1f} MB/s"
        )
    shares = {}
    for size, rates in found.items():
        ours, theirs = (max(rates) for rates in zip(*rates, strict=True))
        shares[size] = ours / theirs
        print(
            f"{cases.readable(size)}: {shares[size]:.2f} of ib_write_bw, best of "
            f"{len(rates)}; median {statistics.median(a / b for a, b in rates):.2f}"
        )
    assert min(shares.values()) >= SHARE_MIN, shares
