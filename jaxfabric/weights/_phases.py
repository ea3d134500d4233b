"""Phases: where a thread's time goes, by the clock and by what its core did."""

from __future__ import annotations

import collections
import time


class Phases:
    """Seconds by name of phase; for one thread.

    On cores that are shared, a phase takes longer by the clock than it works.

    Attributes:
      wall: by the clock.
      core: that the thread ran.
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
