"""How long something takes on the slowest rank, an iteration at a time."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Of fewer, the 99th percentile is only the slowest.
P99_LEAST = 100
# Calls that are queued behind the one that runs.
_AHEAD = 2


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


def seconds_of(call: Callable[[], Any]) -> float:
    """How long ``call`` takes in this process until its results are there."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def time_for(
    call: Callable[[], Any], *, seconds: float, most: int, least: int = 5
) -> Times:
    """Repeats ``call``, as often on every rank, for about so long. Collective.

    Three calls before are not counted: the first compiles, and on GPUs the second
    captures what the third replays.
    """
    count = _count_for(call, seconds, most, least)
    return slowest_rank([seconds_of(call) for _ in range(count)])


def time_queued(
    call: Callable[[], Any], *, seconds: float, most: int, least: int = 5
) -> Times:
    """The same without the host in between: there is always one call more under way.

    What ``call`` returns must not be donated to the next call. An iteration ends when
    its result is there, and begins when that of the one before was. Collective.
    """
    count = _count_for(call, seconds, most, least)
    under_way = deque(call() for _ in range(_AHEAD))
    ends = []
    for number in range(count + 1):
        if number <= count - _AHEAD:
            under_way.append(call())
        jax.block_until_ready(under_way.popleft())
        ends.append(time.perf_counter())
    return slowest_rank(np.diff(ends).tolist())


def _count_for(call: Callable[[], Any], seconds: float, most: int, least: int) -> int:
    """Warms up; how many calls it takes to fill the time. Collective."""
    for _ in range(2):
        jax.block_until_ready(call())
    once = slowest_rank([seconds_of(call)]).p50
    return int(min(most, max(least, seconds / once)))
