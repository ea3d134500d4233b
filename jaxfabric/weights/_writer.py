"""Writer: who calls the engine's writes, which over shared memory are copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from jaxfabric._transfer_future import TransferFuture
from jaxfabric.weights._worker import Worker


class Begun(NamedTuple):
    """A write that was begun.

    Attributes:
      write: its end.
      begin, end: when it was called, and when the call was over.
      core_s: for which its thread's core worked.
    """

    write: TransferFuture
    begin: float
    end: float
    core_s: float


class Writer:
    """Begins writes in its caller's thread, or in one of its own, in order."""

    def __init__(self, name: str, *, own_thread: bool) -> None:
        self._worker = Worker(name) if own_thread else None

    def submit(self, write: Callable[[], TransferFuture]) -> Future[Begun]:
        """What comes of it; it can be cancelled until it is begun."""

        def begin() -> Begun:
            begin, core = time.monotonic(), time.thread_time()
            under_way = write()
            return Begun(
                *(under_way, begin, time.monotonic()), time.thread_time() - core
            )

        if self._worker is not None:
            return self._worker.submit(begin)
        future: Future[Begun] = Future()
        try:
            future.set_result(begin())
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Waits for the write that it is at, but not for ever."""
        if self._worker is not None:
            self._worker.close()
