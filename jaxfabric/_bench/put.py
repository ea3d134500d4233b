"""`jaxfabric bench put`: rounds over all subjects, and the rows made of them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxfabric._config import config

from . import case as cases
from . import machine
from .case import Case
from .child_process import SubjectFailed
from .fi_rma_bw import FiRmaBw
from .figures import Duel, Measurement, Row, duels, summarize
from .ib_write_bw import IbWriteBw
from .subjects import INSTALL_PEERS, ChildSubject, Outcome, Subject

# What `--subjects` chooses from.
FAMILIES = (
    *("memcpy", "sockets", "jaxfabric"),
    *("nixl", "mooncake", "fi_rma_bw", "ib_write_bw"),
)

QUICK_SIZES = (1 << 10, 1 << 16, 1 << 20)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      transports: of our engine, as in "shm" and "ofi/tcp"; floors and peers are
        those of the same media.
      sizes: bytes of one operation.
      rounds: how often each subject is measured, in turns.
      seconds: for each of the two measurements of a case, in each round.
      window: operations in flight, at most.
      one_place: all of them write the same bytes to the same place.
      peers: targets of a scatter.
      nics: Domains of our engine on each side.
      counted: our engine is measured a second time, with writes that are counted at
        their receivers.
      peer_python: the interpreter of NIXL's and Mooncake's processes.
    """

    transports: tuple[str, ...] = ("shm", "ofi/tcp")
    kinds: tuple[str, ...] = cases.KINDS
    sizes: tuple[int, ...] = cases.SIZES
    subjects: tuple[str, ...] = FAMILIES
    rounds: int = 3
    seconds: float = 0.2
    window: int = 16
    one_place: bool = False
    peers: int = 4
    nics: int = 1
    counted: bool = False
    peer_python: str = sys.executable

    def quick(self) -> Settings:
        """As little as shows that everything works."""
        return dataclasses.replace(
            self,
            sizes=tuple(s for s in self.sizes if s in QUICK_SIZES) or self.sizes[:1],
            rounds=1,
            seconds=0.01,
            peers=2,
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """All that was found.

    Attributes:
      machine: see `machine.describe`, at the beginning.
      load_after: the machine's load at the end.
      versions: of the libraries, by subject.
      benchmark: which command's it is.
    """

    settings: Settings
    rows: list[Row]
    machine: dict[str, Any]
    machine_line: str
    load_after: float
    versions: dict[str, dict[str, str]]
    benchmark: str = "put"

    @property
    def duels(self) -> list[Duel]:
        """Ours against the best peer, wherever both have figures."""
        return duels(self.rows)

    def to_json(self) -> dict[str, Any]:
        """Everything, the derived figures included."""
        return {
            "benchmark": self.benchmark,
            "machine": {**self.machine, "load_after": self.load_after},
            "settings": dataclasses.asdict(self.settings),
            "versions": self.versions,
            "rows": [row.to_json() for row in self.rows],
            "against_best_peer": [
                {
                    "kind": duel.case.kind,
                    "size": duel.case.size,
                    "medium": duel.medium,
                    "what": duel.what,
                    "ours": duel.ours,
                    "peer": duel.peer,
                    "factor": duel.factor,
                }
                for duel in self.duels
            ],
        }


def medium(transport: str) -> str:
    """What a transport's bytes go through, as in "tcp" for "ofi/tcp"."""
    return "efa" if "efa" in transport else transport.rpartition("/")[2]


def subjects_of(settings: Settings) -> list[Subject]:
    """Floors, ours and peers, of the media that the transports use."""
    python = settings.peer_python
    media = {medium(transport) for transport in settings.transports}
    found: dict[str, list[Subject]] = {family: [] for family in FAMILIES}
    if "shm" in media:
        found["memcpy"] = [ChildSubject("memcpy", "floor", "shm", "memcpy")]
    if "tcp" in media:
        found["sockets"] = [ChildSubject("sockets", "floor", "tcp", "sockets")]
    found["jaxfabric"] = [
        ChildSubject(
            f"jaxfabric {transport}{', counted' if counted else ''}",
            "ours",
            medium(transport),
            "fabric",
            options={
                "transport": transport,
                "nics": settings.nics,
                "counted": counted,
            },
        )
        for transport in settings.transports
        for counted in ((False, True) if settings.counted else (False,))
    ]
    # UCX takes what is fastest, which is shared memory, unless it is told.
    for name, environment in (("shm", {}), ("tcp", {"UCX_TLS": "tcp"})):
        nixl = ChildSubject(f"NIXL {name}", "peer", name, "nixl", python=python)
        nixl.environment, nixl.missing = environment, INSTALL_PEERS
        mooncake = dataclasses.replace(
            nixl, name=f"Mooncake {name}", module="mooncake", versions={}
        )
        if name in media:
            found["nixl"].append(nixl)
            found["fi_rma_bw"].append(FiRmaBw(provider=name, medium=name))
            if name == "tcp":  # all that its wheel without CUDA has
                found["mooncake"].append(mooncake)
    if "verbs" in media:
        nics = config.settings.nics
        device = nics.split(",")[0].split(":")[0].strip() if nics else None
        found["ib_write_bw"].append(IbWriteBw(medium="verbs", device=device))
    return [
        s for family in FAMILIES if family in settings.subjects for s in found[family]
    ]


def run(
    settings: Settings,
    say: Callable[[str], None],
    plan: list[Case] | None = None,
    benchmark: str = "put",
) -> Result:
    """Measures everything; a subject that fails has its reason in its rows.

    Args:
      say: is told what is done now, a line at a time.
      plan: the cases; None for those that the settings name.
      benchmark: name of the command.
    """
    before, line = machine.describe(), machine.line()
    plan = plan or cases.plan(
        settings.kinds,
        settings.sizes,
        peers=settings.peers,
        window=settings.window,
        one_place=settings.one_place,
    )
    subjects = subjects_of(settings)
    outcomes, failed = take_turns(subjects, plan, settings, say)
    return Result(
        settings=settings,
        rows=rows_of(subjects, plan, outcomes, failed),
        machine=before,
        machine_line=line,
        load_after=float(machine.describe()["load"] or 0),
        versions={s.name: s.versions for s in subjects if s.versions},
        benchmark=benchmark,
    )


Outcomes = dict[tuple[str, Case], list[Outcome]]


def take_turns(
    subjects: Sequence[Subject],
    plan: list[Case],
    settings: Settings,
    say: Callable[[str], None],
) -> tuple[Outcomes, dict[str, SubjectFailed]]:
    """All rounds: what each subject found in each case, and those that failed.

    Each subject lives for its turn alone: idle threads of one would cost the others
    time. Every other round goes backwards. Who fails once has no more turns. Ctrl-C
    ends the turns, not the program.
    """
    outcomes: Outcomes = {}
    failed: dict[str, SubjectFailed] = {}
    turns = [
        (turn, subject)
        for turn in range(settings.rounds)
        for subject in (subjects if turn % 2 == 0 else reversed(subjects))
    ]
    for turn, subject in turns:
        fitting = [case for case in plan if case.kind in subject.kinds]
        if subject.name in failed or not fitting:
            continue
        say(f"round {turn + 1} of {settings.rounds}: {subject.name}")
        try:
            for case, outcome in subject.measure(fitting, settings.seconds):
                outcomes.setdefault((subject.name, case), []).append(outcome)
        except SubjectFailed as failure:
            failed[subject.name] = failure
        except KeyboardInterrupt:
            say("interrupted; this is what there is")
            break
    return outcomes, failed


def rows_of(
    subjects: Sequence[Subject],
    plan: list[Case],
    outcomes: Outcomes,
    failed: dict[str, SubjectFailed],
) -> list[Row]:
    """Figures of the rounds that went well, and the first failure."""
    rows = []
    for case in plan:
        for subject in subjects:
            if case.kind not in subject.kinds:
                continue
            found = outcomes.get((subject.name, case), [])
            rounds = [o for o in found if isinstance(o, Measurement)]
            failures = [o for o in found if isinstance(o, SubjectFailed)]
            if subject.name in failed:
                failures.append(failed[subject.name])
            reason = "" if rounds else "not measured"
            if failures:
                reason = str(failures[0])
            rows.append(
                Row(
                    case,
                    subject.name,
                    subject.role,
                    subject.medium,
                    summarize(case.size, rounds) if rounds else None,
                    reason,
                )
            )
    return rows
