"""How the benchmarks measure: per-iteration maximum over ranks, median and p99."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxfabric._bench.machine import processor
from jaxfabric._bench.rank_times import Times, seconds_of, slowest_rank


def time_call(call: Callable[[], Any], iterations: int, warm_up: int = 3) -> Times:
    """Times ``call`` until its results are there. Collective."""
    for _ in range(warm_up):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(iterations):
        seconds.append(seconds_of(call))
    return slowest_rank(seconds)


def multihost_sync() -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jaxfabric benchmark")


def machine() -> str:
    """The machine's line, to stand beside every number."""
    return (
        f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; jax "
        f"{jax.__version__}; {jax.process_count()} processes, "
        f"{jax.device_count()} ranks"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """Right-aligned columns, the first left-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)
