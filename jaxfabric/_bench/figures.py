"""What was measured, and the figures made of it."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np

from .case import Case


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One subject, one case, one round.

    Attributes:
      latency_s: seconds of each operation that was alone.
      operations: how many, in flight, took
      seconds: so many seconds.
      mean_s: instead of `latency_s`, from tools that tell the mean only.
    """

    latency_s: list[float]
    operations: int
    seconds: float
    mean_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one subject and one case, over all rounds.

    Attributes:
      mb_s: 10^6 bytes per second, median over the rounds.
      op_s: operations per second, likewise.
      p50_us: microseconds of one operation alone, all rounds together.
      p99_us: likewise; None if there are too few operations to tell.
      mean_us: median over the rounds of their means.
      operations: how many latencies were taken.
    """

    mb_s: float
    op_s: float
    p50_us: float | None
    p99_us: float | None
    mean_us: float | None
    operations: int


# Of fewer, the 99th percentile is only the slowest.
P99_LEAST = 100


def summarize(size: int, rounds: list[Measurement]) -> Figures:
    """Figures of operations of `size` bytes, from one round or more.

    >>> one = Measurement([2e-6, 4e-6, 3e-6], operations=10, seconds=0.5)
    >>> summarize(1000, [one])  # doctest: +NORMALIZE_WHITESPACE
    Figures(mb_s=0.02, op_s=20.0, p50_us=3.0, p99_us=None, mean_us=3.0,
            operations=3)
    """
    op_s = statistics.median(r.operations / r.seconds for r in rounds)
    means = [float(np.mean(r.latency_s)) if r.latency_s else r.mean_s for r in rounds]
    known = [mean for mean in means if mean is not None]
    all_us = np.array([s for r in rounds for s in r.latency_s]) * 1e6
    count = len(all_us)
    return Figures(
        mb_s=op_s * size / 1e6,
        op_s=op_s,
        p50_us=round(float(np.percentile(all_us, 50)), 3) if count else None,
        p99_us=(
            round(float(np.percentile(all_us, 99)), 3) if count >= P99_LEAST else None
        ),
        mean_us=round(statistics.median(known) * 1e6, 3) if known else None,
        operations=count,
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One subject in one case: figures, or the reason why there are none.

    Attributes:
      role: "floor", "ours" or "peer".
      medium: what the bytes go through; only equal ones are compared.
    """

    case: Case
    subject: str
    role: str
    medium: str
    figures: Figures | None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Flat, with the figures' names and units."""
        return {
            **{key: getattr(self.case, key) for key in ("kind", "size", "window")},
            "pages": self.case.size // self.case.page_bytes
            if self.case.kind == "paged"
            else None,
            "page_bytes": self.case.page_bytes if self.case.kind == "paged" else None,
            "targets": self.case.targets,
            "subject": self.subject,
            "role": self.role,
            "medium": self.medium,
            **(dataclasses.asdict(self.figures) if self.figures else {}),
            "reason": self.reason,
        }


@dataclasses.dataclass(frozen=True)
class Duel:
    """Ours against the best peer of the same case and medium.

    Attributes:
      what: "rate" or "latency".
      factor: how much better ours is; below 1 the peer is better.
    """

    case: Case
    medium: str
    what: str
    ours: str
    peer: str
    factor: float


def duels(rows: list[Row]) -> list[Duel]:
    """Every comparison that the rows allow, in their order."""
    found = []
    for row in rows:
        if row.role != "ours" or row.figures is None:
            continue
        rivals = [
            (other.subject, other.figures)
            for other in rows
            if other.role == "peer"
            and (other.case, other.medium) == (row.case, row.medium)
            and other.figures is not None
        ]
        if not rivals:
            continue
        name, best = max(rivals, key=lambda rival: rival[1].op_s)
        factor = row.figures.op_s / best.op_s
        found.append(Duel(row.case, row.medium, "rate", row.subject, name, factor))
        timed = [
            (time_us, rival)
            for rival, figures in rivals
            if (time_us := alone_us(figures)) is not None
        ]
        mine = alone_us(row.figures)
        if timed and mine:
            time_us, name = min(timed)
            found.append(
                Duel(row.case, row.medium, "latency", row.subject, name, time_us / mine)
            )
    return found


def alone_us(figures: Figures) -> float | None:
    """Microseconds of one operation alone: the median, else the mean."""
    return figures.mean_us if figures.p50_us is None else figures.p50_us
