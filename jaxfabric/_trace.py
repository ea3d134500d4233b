"""Trace: a recording of what a Fabric or a TransferEngine does, as a Perfetto file."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence

from jaxfabric._errors import FabricError
from jaxfabric._trace_file import Recorded, trace_events, write_trace

# About 60 MB here at most, and as much in the file.
EVENTS_MAX = 1 << 18


class Trace:
    """A recording that is under way; from `Fabric.trace` or `TransferEngine.trace`.

    It begins when it is made. It ends, and its file is written, with the ``with``
    block, with `stop`, or when the Fabric or engine is closed, whichever is first. The
    file appears at once, complete.

    Attributes:
      path: of the file.

    Example::

      with fabric.trace("step.json"):
          jax.block_until_ready(step(x))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        events_max: int,
        start: Callable[[int], object],
        stop: Callable[[], Sequence[Recorded]],
    ) -> None:
        if events_max < 1:
            raise ValueError(f"trace: events_max={events_max} must be at least 1")
        self.path = pathlib.Path(path)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"trace: there is no folder {self.path.parent}")
        self._stop = stop
        self.stopped = False
        start(events_max)

    def stop(self) -> None:
        """Ends the recording and writes the file; may be called again."""
        if self.stopped:
            return
        self.stopped = True
        write_trace(self.path, trace_events(self._stop()))

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Trace({str(self.path)!r}, {'written' if self.stopped else 'running'})"


def begin_trace(
    running: Trace | None,
    path: str | os.PathLike[str],
    events_max: int,
    start: Callable[[int], object],
    stop: Callable[[], Sequence[Recorded]],
) -> Trace:
    """A new Trace, unless `running` is still one.

    Raises:
      FabricError: one is running already.
    """
    if running is not None and not running.stopped:
        raise FabricError(
            f"trace: {running.path} is being recorded; stop it first, since there is "
            "one recording at a time"
        )
    return Trace(path, events_max, start, stop)
