"""What the parts of TransferEngine share: the native engine, its regions and errors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from jaxfabric import _ffi
from jaxfabric._errors import from_native
from jaxfabric._trace import EVENTS_MAX, Trace, begin_trace
from jaxfabric._trace_file import Recorded
from jaxfabric._transfer_future import TransferFuture
from jaxfabric._transfer_memory import Region


@contextlib.contextmanager
def native_errors() -> Iterator[None]:
    """Turns native errors into the documented ones."""
    try:
        yield
    except _ffi.native().StatusError as error:
        raise from_native(error) from None


class TransferBase:
    """A native engine and its regions; see TransferEngine."""

    _native: Any
    _close: Any
    _regions: dict[int, Region]
    timeout_s: float
    transport: str
    name: str
    nics: list[str]
    _trace: Trace | None = None

    def trace(
        self, path: str | os.PathLike[str], *, events_max: int = EVENTS_MAX
    ) -> Trace:
        """Records what this engine does, into a file for https://ui.perfetto.dev.

        The recording begins at once, and ends with the ``with`` block, with
        `Trace.stop`, or with `close`. ``jaxfabric trace merge`` makes one file of
        those of several engines, on one time line.

        Args:
          path: of the file.
          events_max: how many events are kept; the oldest give way, and are counted.

        Raises:
          FabricError: a recording of this engine is running, or it is closed.

        Example::

          with engine.trace("push.json"):
              engine.submit_single_write(region, desc, id=7).result()
        """
        with native_errors():
            self._trace = begin_trace(
                *(self._trace, path, events_max),
                *(self._native.start_trace, self._stop_trace),
            )
        return self._trace

    def _stop_trace(self) -> list[Recorded]:
        with native_errors():
            recording = self._native.stop_trace()
            peers = self._native.stats()["peers"]
        return [
            Recorded.from_native(
                *(os.getpid(), f"engine {self.name}", recording),
                peers={peer: row["name"] for peer, row in peers.items()},
                nics=self.nics or [self.transport],
            )
        ]

    def close(self) -> None:
        """Closes it; may be called again. What is under way fails with "closed"."""
        try:
            if self._trace is not None and not self.closed:
                self._trace.stop()
        finally:
            self._close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._close.alive

    def _future(
        self, native: Any, value: Callable[[Any], Any] | None = None
    ) -> TransferFuture:
        return TransferFuture(native, self, value)

    def _cancel(self, native: Any) -> bool:
        if self.closed:
            return False
        with native_errors():
            return bool(self._native.cancel(native))
