"""Crew: threads that share tasks, part by part."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxfabric.weights._phases import Phases
from jaxfabric.weights._worker import Worker

_THREADS_MAX = 4  # by default; each of them copies several GB/s
# Of who unpacks: it has a third of a core that it shares with who serves or writes.
NICE = 3
_CLOSE_S = 10.0
_CORES_PER_THREAD = 4  # other processes of the job, and JAX, want some, too

_NONE_LEFT: Any = object()

Do = Callable[[Any, Phases], object]


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


@dataclasses.dataclass(eq=False)
class Task:
    """Parts that are done in any order.

    Attributes:
      parts: those that are left; made one at a time, as they are needed.
      do: is called with a part, and its thread's phases.
      done: is called once, by any thread, when all parts are done, or no more of them
        will be: with what failed first, or ``None``.
      handing: held while a part is made, which may wait for a device.
      all_taken: whether nobody will begin another part.
      busy: threads that are at one.
      failure: what failed first.
    """

    parts: Iterator[Any]
    do: Do
    done: Callable[[Exception | None], object]
    handing: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    all_taken: bool = False
    busy: int = 0
    failure: Exception | None = None


class Dropped(Exception):
    """A task was not finished, since nobody wants it any more."""


class Crew:
    """Helpers, and whoever calls `finish`. They begin tasks in order.

    Args:
      name, nice: of the helpers; see `Worker`.

    Attributes:
      helpers: how many threads of its own there are.
      phases: where time goes: by the clock, that in which any thread is at a part,
        shared out as the threads' own; and over cores, the sum.
    """

    def __init__(self, name: str, helpers: int, *, nice: int = 0) -> None:
        self.helpers = helpers
        self.phases = Phases()
        self._workers = [Worker(f"{name}.{i + 1}", nice=nice) for i in range(helpers)]
        self._changed = threading.Condition()  # guards what follows, and the tasks
        self._tasks: collections.deque[Task] = collections.deque()
        self._busy = 0
        self._laps = Phases()

    def begin(
        self,
        parts: Iterable[Any],
        do: Do,
        done: Callable[[Exception | None], object] = lambda failure: None,
        helpers: int | None = None,
    ) -> Task:
        """Adds a task; without helpers nothing is done before `finish`.

        Args:
          parts, do, done: of the `Task`.
          helpers: how many are of use; ``None``: all.
        """
        task = Task(iter(parts), do, done)
        with self._changed:
            self._tasks.append(task)
        for worker in self._workers[:helpers]:
            worker.post(self._work)
        return task

    def finish(self) -> None:
        """Helps until nothing is left to begin, and waits until all is done."""
        if not self.helpers:
            self._work_alone()
            return
        self._work()
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)

    def each(self, parts: Iterable[Any], do: Do, helpers: int) -> None:
        """Does each part once, now.

        Raises:
          Exception: what failed first. No thread is at work any more.
        """
        task = self.begin(parts, do, helpers=helpers)
        self.finish()
        if task.failure is not None:
            raise task.failure

    def drop(self, timeout_s: float | None = None) -> None:
        """Begins nothing more of any task, and waits for parts that are under way.

        What they read and wrote is nobody's then. They are copies within host memory,
        well below a ms each, and need no limit; where they may wait for a device,
        ``timeout_s`` is one.
        """
        with self._changed:
            dropped = list(self._tasks)
            self._tasks.clear()
            self._changed.wait_for(lambda: not self._busy, timeout_s)
        for task in dropped:
            task.done(Dropped())

    def close(self) -> None:
        """Drops all, and ends the helpers."""
        self.drop(_CLOSE_S)
        for worker in self._workers:
            worker.close()

    def _work_alone(self) -> None:
        """As `_work`, for the only thread: it needs no locks."""
        while self._tasks:
            task = self._tasks.popleft()
            self.phases.start()
            try:
                for part in task.parts:
                    task.do(part, self.phases)
            except Exception as error:
                task.failure = error
            task.done(task.failure)

    def _work(self) -> None:
        """Does parts until none is left to begin."""
        mine = Phases()
        while True:
            with self._changed:
                if not self._tasks:
                    return
                task = self._tasks[0]
                mine.start()
                if not self._busy:
                    self.phases.start()
                task.busy += 1
                self._busy += 1
            failure: Exception | None = None
            part = _NONE_LEFT
            try:
                # Without the other lock: whoever drops the task has a limit.
                with task.handing:
                    part = next(task.parts, _NONE_LEFT)
                if part is not _NONE_LEFT:
                    task.do(part, mine)
            except Exception as error:
                failure = error
            with self._changed:
                ends = part is _NONE_LEFT or failure is not None
                over = self._end_part(task, mine, failure, ends)
            if over:
                task.done(task.failure)

    def _end_part(
        self, task: Task, mine: Phases, failure: Exception | None, ends: bool
    ) -> bool:
        """Whether the task is over with it. Needs the lock."""
        task.busy -= 1
        self._busy -= 1
        self._laps.add(mine)
        if not self._busy:
            self.phases.join(self._laps)
            self._changed.notify_all()
        task.failure = task.failure or failure
        if ends and task in self._tasks:
            self._tasks.remove(task)
            task.all_taken = True
        return task.all_taken and not task.busy
