"""Worker: one thread that does what happens, one thing after the other."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_JOIN_S = 10.0
_LOOK_S = 3600.0  # a queue takes no endless time limits

T = TypeVar("T")


class Worker:
    """Runs what is posted, in order, on a thread of its own.

    What belongs to the thread needs no lock. What fails unexpectedly goes to
    ``sys.excepthook``, and the thread goes on.

    Args:
      name: of the thread.
      nice: how much nicer it is than who makes it, as with nice(2): where cores are
        short, others go first.
    """

    def __init__(self, name: str, *, nice: int = 0) -> None:
        self._nice = nice
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = (
            queue.SimpleQueue()
        )
        self._due: list[tuple[float, Callable[[], object]]] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        # At exit it must let go of its engine while Python still runs.
        self._end = weakref.finalize(self, _end, self._queue, self._thread)

    def post(self, work: Callable[[], object]) -> None:
        """Runs ``work()`` after what was posted before; nothing after `close`."""
        if not self._closed:
            self._queue.put(work)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Like `post`; its outcome, which can be cancelled as long as it waits."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        self.post(run)
        return future

    def after(
        self, timeout_s: float, work: Callable[[], object]
    ) -> Callable[[], object]:
        """Runs ``work()`` once that time has passed, unless what it gives is called.

        For the worker's thread only. What ``work`` holds is held until either.
        """
        entry = time.monotonic() + timeout_s, work
        self._due.append(entry)

        def never() -> None:
            self._due[:] = [one for one in self._due if one is not entry]

        return never

    def close(self) -> None:
        """Ends after what was posted; not to be called by the worker itself."""
        if not self._closed:
            self._closed = True
            self._end()

    def _run(self) -> None:
        self._yield_to_others()
        while True:
            left_s = self._until_due()
            try:
                # What is due must not wait for a queue that is never empty.
                work = (
                    self._next_due() if left_s <= 0 else self._queue.get(timeout=left_s)
                )
            except queue.Empty:
                continue
            if work is None:
                return
            try:
                work()
            except Exception:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            del work  # and what it holds, while nothing else comes

    def _yield_to_others(self) -> None:
        if not self._nice:
            return
        # Of this thread alone, on Linux. Where it is forbidden, all are alike.
        with contextlib.suppress(OSError):
            thread = os.PRIO_PROCESS, threading.get_native_id()
            os.setpriority(*thread, min(19, os.getpriority(*thread) + self._nice))

    def _until_due(self) -> float:
        due = min((due for due, _ in self._due), default=math.inf)
        return min(_LOOK_S, due - time.monotonic())

    def _next_due(self) -> Callable[[], object]:
        first = min(range(len(self._due)), key=lambda i: self._due[i][0])
        return self._due.pop(first)[1]


def _end(work: queue.SimpleQueue[Any], thread: threading.Thread) -> None:
    work.put(None)
    thread.join(_JOIN_S)
