"""Our writes beside those of perftest's `ib_write_bw`, on the same device.

Both write plain bytes, without immediates, over one queue pair with the port's MTU,
as many writes in flight; ours are those of `jaxfabric bench put`, Python and all,
which also checks that the bytes arrive. The two are measured in turns, a second
apart, so that a busy machine hits both.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator

from jaxfabric._bench import case as cases
from jaxfabric._bench.figures import Measurement
from jaxfabric._bench.ib_write_bw import IbWriteBw
from jaxfabric._bench.subjects import ChildSubject

SIZES = (64 << 10, 256 << 10, 1 << 20)
WINDOW = 16
ROUNDS = 5
SECONDS = 0.25
BYTES = 16 << 20  # of ib_write_bw in each round: about as long
SHARE_MIN = 0.9  # of ib_write_bw's rate


def turns(device: str) -> Iterator[tuple[cases.Case, float, float]]:
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
    plan = cases.plan(("single",), SIZES, peers=1, window=WINDOW) * ROUNDS
    for case, outcome in ours.measure(plan, SECONDS):
        assert isinstance(outcome, Measurement), outcome
        rate = outcome.operations * case.size / outcome.seconds
        count = max(WINDOW + 1, BYTES // case.size)
        yield case, rate, case.size / theirs.run(case.size, count, case.window)


def test_writes_are_nearly_as_fast_as_perftests(rails: list[str]) -> None:
    shares: dict[int, list[float]] = {size: [] for size in SIZES}
    for case, ours, theirs in turns(rails[0]):
        shares[case.size].append(ours / theirs)
        load = os.getloadavg()[0]
        print(
            f"{case.label}, {case.window} in flight: ours {ours / 1e6:.1f}, "
            f"ib_write_bw {theirs / 1e6:.1f} MB/s (load {load:.1f} in the guest)"
        )
    for size, found in shares.items():
        print(
            f"{cases.readable(size)}: {statistics.median(found):.2f} of ib_write_bw "
            f"({min(found):.2f} to {max(found):.2f})"
        )
    medians = {size: statistics.median(found) for size, found in shares.items()}
    assert min(medians.values()) >= SHARE_MIN, medians
