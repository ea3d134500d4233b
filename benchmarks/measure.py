"""How the benchmarks measure: per-iteration maximum over ranks, median and p99."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxfabric._bench.machine import processor


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each iteration, of the slowest rank in each."""

    seconds: np.ndarray

    @property
    def p50(self) -> float:
        """The median, in seconds."""
        return float(np.percentile(self.seconds, 50))

    @property
    def p99(self) -> float:
        """The 99th percentile, in seconds."""
        return float(np.percentile(self.seconds, 99))


def slowest_rank(seconds: list[float]) -> Times:
    """The same iterations of all processes, joined. Collective."""
    mine = np.asarray(seconds)
    if jax.process_count() == 1:
        return Times(mine)
    return Times(np.asarray(multihost_utils.process_allgather(mine)).max(axis=0))


def time_call(call: Callable[[], Any], iterations: int, warm_up: int = 3) -> Times:
    """Times ``call`` until its results are there. Collective."""
    for _ in range(warm_up):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(iterations):
        seconds.append(seconds_of(call))
    return slowest_rank(seconds)


def seconds_of(call: Callable[[], Any]) -> float:
    """How long ``call`` takes in this process until its results are there."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def time_memcpy(bytes_: int, iterations: int) -> Times:
    """Copies ``bytes_`` in every process at once: the floor. Collective."""
    source = np.ones(max(bytes_, 1), np.uint8)
    target = np.zeros_like(source)
    multihost_sync()
    return time_call(lambda: np.copyto(target, source), iterations)


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
