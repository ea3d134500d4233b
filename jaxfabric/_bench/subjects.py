"""What is compared: the floors, our engine, and the peers."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from . import case as cases
from .case import Case
from .child_process import CaseFailed, Child, NotInstalled, SubjectFailed
from .figures import Measurement

# Of one case in one round, beside the time that it is meant to take.
CASE_TIMEOUT_S = 60.0
INSTALL_PEERS = "not installed: pip install 'jaxfabric[peers]'"

Outcome = Measurement | SubjectFailed


class Subject(Protocol):
    """Something that writes into another process's memory."""

    @property
    def name(self) -> str:
        """As in the tables."""

    @property
    def role(self) -> str:
        """ "floor", "ours" or "peer"."""

    @property
    def medium(self) -> str:
        """What the bytes go through."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of `case.KINDS`, those that it can do."""

    @property
    def versions(self) -> dict[str, str]:
        """Of what did the work; known once something was measured."""

    def measure(
        self, plan: list[Case], seconds: float
    ) -> Iterator[tuple[Case, Outcome]]:
        """One round over all cases, which ends when the subject fails."""


@dataclasses.dataclass
class ChildSubject:
    """A subject whose two ends are Python modules.

    Attributes:
      module: of `ends`.
      options: for the ends; becomes JSON.
      python: the interpreter.
      environment: variables for the children.
      missing: the reason where its package is missing.
    """

    name: str
    role: str
    medium: str
    module: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    python: str = sys.executable
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: str = ""
    kinds: tuple[str, ...] = cases.KINDS
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def measure(
        self, plan: list[Case], seconds: float
    ) -> Iterator[tuple[Case, Outcome]]:
        """See `Subject`; verifies the bytes at the targets.

        Raises:
          SubjectFailed: nothing more can be measured.
        """
        bytes_ = max(case.bytes_ for case in plan)
        with contextlib.ExitStack() as stack:
            # Ended in reverse: first the one that writes.
            targets = [
                stack.enter_context(self._start("Target", bytes_))
                for _ in range(max(case.targets for case in plan))
            ]
            initiator = stack.enter_context(self._start("Initiator", bytes_))
            self._connect(initiator, targets)
            for case in plan:
                try:
                    yield case, measure_case(initiator, targets, case, seconds)
                except CaseFailed as failure:
                    yield case, failure

    def _start(self, role: str, bytes_: int) -> Child:
        return Child(
            role,
            self.module,
            bytes_,
            self.options,
            python=self.python,
            environment=self.environment,
        )

    def _connect(self, initiator: Child, targets: list[Child]) -> None:
        try:
            for child in (*targets, initiator):
                child.wait_until_ready()
            cards = [t.ask("card", CASE_TIMEOUT_S)["card"] for t in targets]
            answer = initiator.ask("connect", CASE_TIMEOUT_S, cards=cards)
        except NotInstalled as failure:
            text = self.missing or f"cannot be imported: {failure}"
            raise NotInstalled(text) from failure
        self.versions = answer["versions"]


def measure_case(
    initiator: Child, targets: list[Child], case: Case, seconds: float
) -> Measurement:
    """One case in one round.

    Raises:
      CaseFailed: it cannot be done, or bytes are wrong at a target.
      SubjectFailed: a child died or says nothing.
    """
    effort = cases.effort(case.size, seconds=seconds)
    used = list(enumerate(targets[: case.targets]))
    told = {"case": case.to_json()}
    for peer, target in used:
        target.ask("prepare", CASE_TIMEOUT_S, peer=peer, **told)
    answer = initiator.ask(
        "measure",
        CASE_TIMEOUT_S + 2 * seconds,
        effort=dataclasses.asdict(effort),
        **told,
    )
    for peer, target in used:
        check = target.ask(
            "check",
            CASE_TIMEOUT_S,
            peer=peer,
            operations=answer["all_operations"],
            **told,
        )
        if wrong := check["wrong_bytes"]:
            raise CaseFailed(f"{case.label}: {wrong} wrong bytes at target {peer}")
    return Measurement(**answer["measurement"])
