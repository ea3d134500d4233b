"""Push: one version on its way from one source rank to its receivers."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import rich.progress

from jaxfabric._errors import FabricError, OutcomeUnknownError, PeerLostError
from jaxfabric.weights._phases import Phases

_REDRAW_S = 0.1


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The time in which at least one of some intervals is.

    >>> covered([(0.0, 2.0), (5.0, 6.0), (1.0, 3.0)])
    4.0
    """
    whole, last = 0.0, -math.inf
    for begin, end in sorted(intervals):
        whole += max(0.0, end - max(begin, last))
        last = max(last, end)
    return whole


class Receipt(NamedTuple):
    """What a receiver said of a version that it has.

    Attributes:
      verify_s: seconds in which a thread checked what came.
      unpack_s: seconds in which a thread put it in its place. Where there are several,
        the time in which any of them was at work is shared out.
    """

    verify_s: float
    unpack_s: float


class PushStats(NamedTuple):
    """Where the time of a push went, in seconds by the clock, and what it moved.

    Phases overlap: while one bucket is written, the next one is packed.

    Attributes:
      wait_s: until the parameters were computed, and the first receiver was ready for
        the version.
      pack_s: in which a thread copied, cast or quantised, with copies from devices.
      seal_s: in which a thread computed checksums. Where several threads do either,
        the time in which any of them was at work is shared out.
      transfer_s: in which at least one write was under way: between the call that
        began it, and its end at this rank.
      span_s: from the leave to write to the last write's end. It has in it what writes
        wait for: buckets that are packed, and receivers that empty their slots.
      total_s: from `push` to the last receipt.
      nbytes: written by this rank.
      writes: how many.
      receipts: by receiver.
      core_s: for which this rank's threads ran, all together, not by the clock:
        "pack", "seal", and "write", as far as writes are their work and not that of a
        NIC.
    """

    wait_s: float
    pack_s: float
    seal_s: float
    transfer_s: float
    span_s: float
    total_s: float
    nbytes: int
    writes: int
    receipts: dict[str, Receipt]
    core_s: dict[str, float]


class Push:
    """A version that is being pushed; from `Sender.push`.

    Attributes:
      version: its number.

    Example::

      push = sender.push(params, version=7)
      train_step()                    # meanwhile
      push.wait()
      print(push.stats().total_s)
    """

    def __init__(self, version: int, cancel: Callable[[Push], None]) -> None:
        self.version = version
        self._cancel = cancel
        self._begin = time.monotonic()
        self._changed = threading.Condition()
        self._open: set[str] = set()
        self._failures: dict[str, FabricError] = {}
        self._receipts: dict[str, Receipt] = {}
        self._done = False
        self._total = self._written = 0
        self._phases = Phases()
        self._intervals: list[tuple[float, float]] = []  # of the writes

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done

    def progress(self) -> tuple[int, int]:
        """Bytes that are written, and bytes that are to be written."""
        return self._written, self._total

    def wait(
        self, timeout_s: float | None = None, *, bar: bool = False
    ) -> dict[str, Receipt]:
        """Waits until all receivers have the version; their receipts.

        A receiver is named by its engine's name and its rank, as in ``"host:4711/0"``.

        Args:
          timeout_s: how long to wait; ``None``: until it ends by its own time limit.
          bar: shows a progress bar meanwhile.

        Raises:
          TimeoutError: it has not ended within ``timeout_s``; it goes on.
          OutcomeUnknownError: a receiver was lost, or fell silent, after all was
            written: it may have the version.
          PeerLostError: receivers were lost before.
          FabricError: it was cancelled, refused, or ran out of time; each error names
            the receivers. The others have the version.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._bar() if bar else contextlib.nullcontext(lambda: None) as draw:
            while not self._wait_a_while(until):
                draw()
            draw()
        if not self._done:
            raise TimeoutError(
                f"push of version {self.version}: not done after {timeout_s} s of "
                "waiting; it goes on"
            )
        if self._failures:
            raise self._error()
        return dict(self._receipts)

    def _wait_a_while(self, until: float | None) -> bool:
        """Whether the wait is over: it is done, or the time has passed."""
        left = math.inf if until is None else until - time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self._done, max(0.0, min(left, _REDRAW_S)))
        return self._done or left <= _REDRAW_S

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Callable[[], None]]:
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(binary_units=True),
            rich.progress.TransferSpeedColumn(),
        )
        with rich.progress.Progress(*columns) as progress:
            task = progress.add_task(f"version {self.version}")

            def draw() -> None:
                written, total = self.progress()
                progress.update(task, completed=written, total=total or None)

            yield draw

    def outcomes(self) -> dict[str, Receipt | FabricError | None]:
        """Of each receiver; ``None`` while it is open."""
        with self._changed:
            return {
                **dict.fromkeys(self._open),
                **self._receipts,
                **self._failures,
            }

    def cancel(self) -> None:
        """Asks it to end early: receivers drop what they have of the version."""
        self._cancel(self)

    def stats(self) -> PushStats:
        """Where its time went so far."""
        wall, core = self._phases.wall, self._phases.core
        return PushStats(
            *(wall["wait"], wall["pack"], wall["seal"]),
            *(covered(self._intervals), wall["span"], wall["total"]),
            nbytes=self._written,
            writes=len(self._intervals),
            receipts=dict(self._receipts),
            core_s={phase: core[phase] for phase in ("pack", "seal", "write")},
        )

    # --- For the Sender ---

    def _opens(self, name: str, nbytes: int) -> None:
        with self._changed:
            self._open.add(name)
            self._total += nbytes

    def _wrote(self, nbytes: int, begin: float, end: float, first_post: float) -> None:
        self._phases.wall["span"] = max(self._phases.wall["span"], end - first_post)
        self._intervals.append((begin, end))
        self._written += nbytes

    def _ends(self, name: str, outcome: Receipt | FabricError) -> None:
        with self._changed:
            if name not in self._open:
                return
            self._open.discard(name)
            if isinstance(outcome, FabricError):
                self._failures[name] = outcome
            else:
                self._receipts[name] = outcome

    def _may_be_had(self) -> bool:
        """Whether a receiver has the version, or may have it."""
        with self._changed:
            unknown = any(
                isinstance(error, OutcomeUnknownError)
                for error in self._failures.values()
            )
            return unknown or bool(self._receipts)

    def _resolve(self) -> None:
        with self._changed:
            if not self._done and not self._open:
                self._phases.wall["total"] = time.monotonic() - self._begin
                self._done = True
                self._changed.notify_all()

    def _error(self) -> FabricError:
        names = sorted(self._failures)
        took = self._phases.wall["total"]
        text = f"push of version {self.version}: failed after {took:.1f} s: " + (
            "; ".join(f"receiver {name}: {self._failures[name]}" for name in names[:8])
        )
        kinds = {type(error) for error in self._failures.values()}
        for kind in (OutcomeUnknownError, PeerLostError):
            if kind in kinds:
                return kind(text)
        return (kinds.pop() if len(kinds) == 1 else FabricError)(text)
