"""What the ranks of one test report, and what follows for the test."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any


class Status(enum.StrEnum):
    """How one rank ended the test."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    CRASHED = "crashed"  # the process died
    HUNG = "hung"  # it was still running when its time was over
    LOST = "lost"  # it died, and the mark says that it should


BAD = (Status.FAILED, Status.CRASHED, Status.HUNG)


@dataclasses.dataclass
class RankOutcome:
    """One rank's part of a test.

    Attributes:
      rank: its number.
      status: how it ended.
      time: seconds since the start of the test at which that was known.
      summary: one line.
      text: traceback, skip reason or stacks.
      output: what the process wrote during the test.
    """

    rank: int
    status: Status
    time: float
    summary: str = ""
    text: str = ""
    output: str = ""


@dataclasses.dataclass
class Outcome:
    """The result of a test on one or all hosts.

    Attributes:
      status: passed, failed or skipped.
      summary: one line, for pytest's summary.
      text: the report of a failure, or the reason of a skip.
      output: (title, text) of what each rank wrote.
      healthy: the cluster may be used for the next test.
    """

    status: Status
    summary: str = ""
    text: str = ""
    output: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    healthy: bool = True

    def to_json(self) -> dict[str, Any]:
        """As a dict of plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """The inverse of `to_json`."""
        data = dict(data, status=Status(data["status"]))
        data["output"] = [(title, text) for title, text in data["output"]]
        return cls(**data)


def merge_ranks(ranks: Sequence[RankOutcome]) -> Outcome:
    """The test's outcome: passed only if all ranks passed; first failure first."""
    output = [(f"output of rank {r.rank}", r.output) for r in ranks if r.output]
    bad = sorted((r for r in ranks if r.status in BAD), key=_blame)
    statuses = {r.status for r in ranks}
    # Ranks that went different ways may have left collectives unmatched.
    healthy = len(statuses) == 1 and not statuses & {
        Status.CRASHED,
        Status.HUNG,
        Status.LOST,
    }
    if bad:
        first = bad[0]
        text = "\n".join(
            f"{_header(r)}\n{r.text.rstrip()}\n" for r in bad if r.text or r is first
        )
        summary = f"rank {first.rank}: {first.summary}"
        return Outcome(Status.FAILED, summary, text, output, healthy)
    skipped = [r for r in ranks if r.status is Status.SKIPPED]
    if not skipped:
        return Outcome(Status.PASSED, output=output, healthy=healthy)
    if len(skipped) == len(ranks):
        return Outcome(Status.SKIPPED, text=skipped[0].text, healthy=healthy)
    who = ", ".join(str(r.rank) for r in skipped)
    summary = (
        f"rank {who} skipped the test ({skipped[0].text}) while others passed; a skip "
        "must be decided alike on all ranks"
    )
    return Outcome(Status.FAILED, summary, summary, output, healthy)


def merge_hosts(outcomes: Sequence[Outcome]) -> Outcome:
    """What all hosts report: failed if any host failed."""
    healthy = all(o.healthy for o in outcomes)
    bad = [(h, o) for h, o in enumerate(outcomes) if o.status is Status.FAILED]
    if bad:
        text = "\n".join(f"==== host {h} ====\n{o.text}" for h, o in bad)
        output = [(f"host {h}: {t}", x) for h, o in bad for t, x in o.output]
        summary = f"host {bad[0][0]}: {bad[0][1].summary}"
        return Outcome(Status.FAILED, summary, text, output, healthy)
    if len({o.status for o in outcomes}) > 1:
        who = [h for h, o in enumerate(outcomes) if o.status is Status.SKIPPED]
        summary = f"host {who[0]} skipped the test, others passed"
        return Outcome(Status.FAILED, summary, summary, healthy=False)
    return dataclasses.replace(outcomes[0], healthy=healthy)


def _blame(rank: RankOutcome) -> tuple[bool, float]:
    # A hang is most often the consequence of another rank's failure.
    return rank.status is Status.HUNG, rank.time


def _header(rank: RankOutcome) -> str:
    title = f" rank {rank.rank}: {rank.status} after {rank.time:.1f} s "
    return title.center(70, "-")
