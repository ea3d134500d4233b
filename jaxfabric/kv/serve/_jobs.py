"""Jobs: who is here, how much each has to do, and who gets the next request."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
import time
from collections.abc import Callable, Collection
from typing import Any

from jaxfabric.kv.serve._messages import ROLES


class NameTakenError(Exception):
    """A job of this name is here already; says where each of them is."""


@dataclasses.dataclass(eq=False)
class Job:
    """A prefill or decode job that is connected.

    Attributes:
      where: it runs, for people.
      instance: the same whenever it connects; another job has another one.
      send: hands it a message, and returns at once.
      close: ends its connection, with a reason.
      attempts: what is under way there, by request id.
      numbers: what it says about itself, such as how many of its pages are free.
    """

    name: str
    role: str
    capacity: int
    addresses: list[str]
    where: str
    instance: int
    send: Callable[[str, dict[str, Any]], None]
    close: Callable[[str], None]
    attempts: dict[int, Attempt] = dataclasses.field(default_factory=dict)
    numbers: dict[str, int] = dataclasses.field(default_factory=dict)
    leaving: bool = False
    since: float = dataclasses.field(default_factory=time.time)

    @property
    def free(self) -> int:
        """How many more requests it takes."""
        return 0 if self.leaving else self.capacity - len(self.attempts)


@dataclasses.dataclass(eq=False)
class Attempt:
    """One try at a request, at one prefill and one decode job.

    Attributes:
      id: its own: a second try is another one, so that nothing of the first can be
        taken for it.
      events: (kind, job, value) of what the jobs say about it.
    """

    id: int
    prefill: Job
    decode: Job
    events: asyncio.Queue[tuple[str, Job, Any]] = dataclasses.field(
        default_factory=asyncio.Queue
    )

    def __post_init__(self) -> None:
        for job in (self.prefill, self.decode):
            job.attempts[self.id] = self


Pair = tuple[Job, Job]


class Jobs:
    """The jobs that are connected, and the requests that wait for a place.

    A place is one at a prefill job and one at a decode job; whoever has waited longest
    gets it, at the jobs with the least to do for their size.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Job] = {}
        self._waiting: collections.deque[
            tuple[asyncio.Future[Pair], Collection[Job], Callable[[Pair], None]]
        ] = collections.deque()

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    def of(self, role: str) -> list[Job]:
        """Those of a role."""
        return [job for job in self.by_name.values() if job.role == role]

    def missing_roles(self) -> list[str]:
        """Roles that nobody has."""
        return [role for role in ROLES if not self.of(role)]

    def add(self, job: Job) -> None:
        """It is here; one that has connected again takes its own place.

        Raises:
          NameTakenError: another one has its name, and is not known to be lost.
        """
        before = self.by_name.get(job.name)
        if before is not None:
            if before.instance != job.instance:
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(before.since))
                raise NameTakenError(
                    f"{job.role} job {job.name} in {job.where}: the name is taken by "
                    f"the {before.role} job in {before.where}, which has been here for "
                    f"{time.time() - before.since:.0f} s (since {since} UTC); give one "
                    "of them another name, or end that one first"
                )
            before.close("it has connected again")
            self.remove(before)
        self.by_name[job.name] = job
        self.hand_out()

    def remove(self, job: Job) -> bool:
        """It is lost: what was under way there hears of it."""
        if self.by_name.get(job.name) is not job:
            return False
        del self.by_name[job.name]
        for attempt in job.attempts.values():
            attempt.events.put_nowait(("lost", job, None))
        job.attempts.clear()
        return True

    def end(self, attempt: Attempt, job: Job) -> bool:
        """A job has no more to do with an attempt."""
        known = job.attempts.pop(attempt.id, None) is not None
        self.hand_out()
        return known

    async def take(self, avoid: Collection[Job], new_id: Callable[[], int]) -> Attempt:
        """Waits for a place, at other jobs than those to avoid if there are others."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        taken: list[Attempt] = []

        def take(pair: Pair) -> None:
            taken.append(Attempt(new_id(), *pair))

        entry = future, avoid, take
        self._waiting.append(entry)
        self.hand_out()
        try:
            await future
        except BaseException:
            if entry in self._waiting:
                self._waiting.remove(entry)
            # It may have had its place just before it was cancelled.
            for attempt in taken:
                self.end(attempt, attempt.prefill)
                self.end(attempt, attempt.decode)
            raise
        return taken[0]

    def hand_out(self) -> None:
        """Gives places that are free to those who wait."""
        while self._waiting:
            future, avoid, take = self._waiting[0]
            if not future.done():
                pair = self._choose(avoid)
                if pair is None:
                    return
                take(pair)
                future.set_result(pair)
            self._waiting.popleft()

    def _choose(self, avoid: Collection[Job]) -> Pair | None:
        chosen = []
        for role in ROLES:
            free = [job for job in self.of(role) if job.free > 0]
            if not free:
                return None
            chosen.append(min(free, key=_load(avoid)))
        return chosen[0], chosen[1]


def _load(avoid: Collection[Job]) -> Callable[[Job], tuple[bool, float, float]]:
    """Orders jobs; equal ones by chance, or the same pairs would work together."""
    return lambda job: (job in avoid, -job.free / job.capacity, random.random())
