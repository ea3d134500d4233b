"""Phases: where time goes, by the clock and by what cores did."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence


class Phases:
    """Seconds by name of phase; measured by one thread at a time.

    On cores that are shared, a phase takes longer by the clock than it works; where
    several threads share it, shorter.

    Attributes:
      wall: by the clock.
      core: that cores ran for it, all threads together.
    """

    def __init__(self) -> None:
        self.wall: dict[str, float] = collections.defaultdict(float)
        self.core: dict[str, float] = collections.defaultdict(float)
        self.start()

    def start(self) -> None:
        """What follows belongs to the next phase."""
        self._wall, self._core = time.monotonic(), time.thread_time()

    def lap(self, phase: str) -> None:
        """What was since the last call belonged to this phase."""
        wall, core = self._wall, self._core
        self.start()
        self.wall[phase] += self._wall - wall
        self.core[phase] += self._core - core

    def join(self, threads: Sequence[Phases]) -> None:
        """What was since `start` belonged to the phases of these threads.

        By the clock each phase has the share of it that it has of the threads' own.
        """
        took = time.monotonic() - self._wall
        whole = sum(sum(one.wall.values()) for one in threads)
        for one in threads:
            for phase, seconds in one.wall.items():
                self.wall[phase] += took * seconds / whole if whole else 0.0
            for phase, seconds in one.core.items():
                self.core[phase] += seconds
        self.start()
