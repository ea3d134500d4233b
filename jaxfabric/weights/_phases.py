"""Phases: where time goes, by the clock and by what cores did."""

from __future__ import annotations

import collections
import time


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

    def add(self, other: Phases) -> None:
        """Takes over what another has; that begins at nothing again."""
        for ours, theirs in ((self.wall, other.wall), (self.core, other.core)):
            for phase, seconds in theirs.items():
                ours[phase] += seconds
            theirs.clear()

    def join(self, threads: Phases) -> None:
        """What was since `start` belonged to phases that several threads shared.

        By the clock each gets its share of that; their cores' seconds count in full.

        Args:
          threads: the sums over the threads, which begin at nothing again.
        """
        took = time.monotonic() - self._wall
        whole = sum(threads.wall.values())
        for phase, seconds in threads.wall.items():
            self.wall[phase] += took * seconds / whole if whole else 0.0
        threads.wall.clear()
        self.add(threads)
        self.start()
