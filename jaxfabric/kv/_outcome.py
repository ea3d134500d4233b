"""Outcome: how something ends, to be waited for by a thread or awaited."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator
from typing import Any

_SLICE_S = 0.2  # so that Ctrl-C is noticed while a thread waits


class Outcome:
    """The end of something that is under way, in a thread or under asyncio.

    Example::

      peer = sender.connect(address).result()      # in a thread
      peer = await sender.connect(address)         # under asyncio
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> Any:
        """Waits for the end, and raises what went wrong.

        Args:
          timeout_s: how long to wait; ``None`` until it ends by its own time limit.

        Raises:
          TimeoutError: it has not ended within ``timeout_s``; it goes on.
          FabricError: it failed.
        """
        failure = self.exception(timeout_s)
        if failure is not None:
            raise failure
        return self._future.result()

    def exception(self, timeout_s: float | None = None) -> BaseException | None:
        """Waits like `result`, but returns what went wrong instead of raising it."""
        left = float("inf") if timeout_s is None else timeout_s
        while True:
            try:
                return self._future.exception(min(left, _SLICE_S))
            except concurrent.futures.TimeoutError:
                left -= _SLICE_S
                if left <= 0:
                    raise TimeoutError(
                        f"{self._label}: not done after {timeout_s} s of waiting; it "
                        "goes on"
                    ) from None

    def add_done_callback(self, function: Callable[[Any], object]) -> None:
        """Calls ``function(self)`` once it is done, on some thread."""
        self._future.add_done_callback(lambda _: function(self))

    def __await__(self) -> Generator[Any, None, Any]:
        # Who gives up waiting gives up nothing else: it goes on.
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()

    def _resolve(self, value: Any, failure: BaseException | None = None) -> None:
        """Ends it; only the first call does. Never under a lock: callbacks run."""
        try:
            if failure is None:
                self._future.set_result(value)
            else:
                self._future.set_exception(failure)
        except concurrent.futures.InvalidStateError:
            return
