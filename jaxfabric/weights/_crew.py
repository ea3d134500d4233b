"""Crew: threads that do one thing together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import TypeVar

from jaxfabric.weights._phases import Phases
from jaxfabric.weights._worker import Worker

_THREADS_MAX = 4  # by default; each of them copies several GB/s
_CORES_PER_THREAD = 4  # other processes of the job, and JAX, want some, too

T = TypeVar("T")


def thread_count(threads: int | None) -> int:
    """What the option ``threads`` means here.

    Raises:
      ValueError: it is below 1.
    """
    if threads is None:
        cores = len(os.sched_getaffinity(0))
        return max(1, min(_THREADS_MAX, cores // _CORES_PER_THREAD))
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads={threads!r} must be a number above 0")
    return threads


class Crew:
    """The thread that calls it, and helpers.

    Nothing goes on when a call is over: what it read and wrote is nobody's then.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._helpers = [Worker(f"{name}.{i}") for i in range(1, threads)]

    def each(
        self,
        parts: Iterable[T],
        do: Callable[[T, Phases], object],
        phases: Phases,
        helpers: int,
    ) -> None:
        """Does each part once, in any order.

        Args:
          parts: made one at a time, as they are needed.
          do: is called with a part, and its thread's phases.
          phases: to which the time is added: the whole by the clock, shared out as the
            threads' own, and the sum over their cores.
          helpers: how many are of use, at most.

        Raises:
          Exception: what failed first; no thread is at work any more.
        """
        left, lock = iter(parts), threading.Lock()

        def work() -> Phases:
            nonlocal left
            mine = Phases()
            while True:
                try:
                    with lock:
                        part = next(left)
                except StopIteration:
                    return mine
                try:
                    do(part, mine)
                except BaseException:
                    with lock:
                        left = iter(())
                    raise

        phases.start()
        asked = [one.submit(work) for one in self._helpers[: max(0, helpers)]]
        try:
            ours = work()
        finally:
            # Some may not even have woken up.
            begun = [future for future in asked if not future.cancel()]
            futures.wait(begun)
        phases.join([ours, *(future.result() for future in begun)])

    def close(self) -> None:
        """Ends the helpers."""
        for helper in self._helpers:
            helper.close()
