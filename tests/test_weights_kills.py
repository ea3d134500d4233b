"""Ranks of a trainer and of a sampler are killed at any point, and come back.

A drill pushes versions from two ranks to two, and kills a rank or a job in a phase that
its seed chooses. After each kill: who lives ends what it does, with a named error or
well, within its time limit; what was taken is one whole version that was pushed, the
same on both ranks; nothing shows that a push called failed; and once the dead are back
the next version arrives.
"""

from __future__ import annotations

import collections
import random
import time
from typing import Any

import pytest
from transfer_cases import skip_unless_usable
from weights_ranks import Failed, Followed, Phase, Rank, key_of

LIMIT_S = 2.0  # of what may be in vain
MARGIN_S = 8.0  # an error may come so much later, on a busy machine
RECOVERY_S = 20.0  # of what must succeed
PHASE_S = 0.3  # how long a kill waits for its phase
VICTIMS = {
    "trainer": [(0,), (1,), (0, 1)],
    "sampler": [(0,), (1,), (0, 1)],
}
PHASES = {
    "trainer": (Phase.IDLE, Phase.BEGIN, Phase.BUCKETS),
    "sampler": (Phase.CONNECT, Phase.TAKE, Phase.FILLING),
}


class Drill:
    """Both jobs, and all that they were told and said.

    Attributes:
      kills: how many, by whose phase they waited for.
      endings: how many pushes and takes ended how, with a rank dead.
    """

    def __init__(self, transport: str, seed: int) -> None:
        self._transport = transport
        self._chance = random.Random(seed)
        self._names = 0
        self._began = time.monotonic()
        self.ranks: dict[str, list[Rank]] = {"trainer": [], "sampler": []}
        self._trainer = 0  # how many there were
        self._version = 0
        self._pushed: set[tuple[int, int]] = set()
        self._denied: dict[tuple[str, int], set[int]] = collections.defaultdict(set)
        self.kills: collections.Counter[tuple[str, Phase]] = collections.Counter()
        self.endings: collections.Counter[str] = collections.Counter()
        self.log: collections.deque[str] = collections.deque(maxlen=40)

    def start(self) -> None:
        for role in ("trainer", "sampler"):
            self._fill(role)
        self._connect(self.ranks["sampler"])
        self._settle()

    def close(self) -> None:
        for ranks in self.ranks.values():
            for rank in ranks:
                rank.close()

    def kill_once(self) -> None:
        """One kill, and all that follows from it."""
        chance = self._chance
        victims = chance.choice(sorted(VICTIMS)), chance.choice(VICTIMS["trainer"])
        watched = chance.choice(sorted(PHASES))
        phase = chance.choice(PHASES[watched])
        self._note(f"kill {victims} when {watched} is in {phase!r}")
        self._begin(connecting=phase is Phase.CONNECT)
        rank = chance.choice(self.ranks[watched])
        self._wait_for(rank, phase)
        for number in victims[1]:
            self.ranks[victims[0]][number].kill()
        self._collect(self.ranks["trainer"] + self.ranks["sampler"], in_vain=True)
        self._look()
        self._repair(*victims)
        self._settle()

    # --- Steps ---

    def _note(self, text: str) -> None:
        self.log.append(f"{time.monotonic() - self._began:7.2f} {text}")

    def _begin(self, *, connecting: bool) -> None:
        """One or two versions, and takes or anew connects meanwhile."""
        count = self._chance.choice((1, 1, 2))
        versions = [self._version + 1 + i for i in range(count)]
        self._push(versions, LIMIT_S)
        for rank in self.ranks["sampler"]:
            if connecting:
                self._ask_to_connect(rank, LIMIT_S)
            else:
                rank.ask("follow", versions[-1], LIMIT_S)

    def _push(self, versions: list[int], limit_s: float) -> None:
        self._version = versions[-1]
        self._pushed |= {(v, key_of(v, self._trainer)) for v in versions}
        self._versions = versions
        self._note(f"push {versions} of trainer {self._trainer}")
        for rank in self.ranks["trainer"]:
            rank.ask("push", versions, self._trainer, limit_s)

    def _ask_to_connect(self, rank: Rank, limit_s: float) -> None:
        addresses = [one.address for one in self.ranks["trainer"]]
        rank.ask("connect", addresses, limit_s)

    def _wait_for(self, rank: Rank, phase: Phase) -> None:
        met = rank.wait_for(phase, PHASE_S)
        rank.wait_for(None, self._chance.uniform(0, 3e-3))
        self.kills[rank.role, rank.phase if met else Phase.IDLE] += 1

    def _collect(self, ranks: list[Rank], *, in_vain: bool) -> None:
        """The answers of all, each within its limit; checks them."""
        limit_s = (LIMIT_S if in_vain else RECOVERY_S) + MARGIN_S
        followed: dict[int, Followed] = {}
        for rank in ranks:
            answer = rank.answer(limit_s)
            self._note(f"{rank.name} ({rank.number}): {answer}")
            if isinstance(answer, Failed):
                assert in_vain, self._story(f"{rank.name}: {answer}")
                self.endings[answer.kind] += 1
            elif isinstance(answer, Followed):
                followed[rank.number] = answer
                self._check_taken(rank, answer, in_vain=in_vain)
            elif isinstance(answer, list):
                self._check_push(answer, in_vain=in_vain)
        if len(followed) == 2:
            ours, theirs = (followed[i].taken for i in (0, 1))
            count = min(len(ours), len(theirs))
            assert ours[:count] == theirs[:count], self._story("they took not the same")

    def _check_taken(self, rank: Rank, answer: Followed, *, in_vain: bool) -> None:
        denied = self._denied[rank.name, rank.connects]
        for version, key in answer.taken:
            assert key is not None, self._story(f"{rank.name}: {version} is mixed")
            assert (version, key) in self._pushed, self._story(
                f"{rank.name}: {version} is {key}, which nobody pushed"
            )
            assert key not in denied, self._story(
                f"{rank.name} has {key}, which a push called failed"
            )
        versions = [version for version, _ in answer.taken]
        assert versions == sorted(versions), self._story(f"{rank.name}: {versions}")
        if answer.failure is not None:
            assert in_vain, self._story(f"{rank.name}: {answer}")
            self.endings[f"take: {answer.failure.kind}"] += 1

    def _check_push(self, outcomes: list[dict[str, str]], *, in_vain: bool) -> None:
        living = {f"{r.name}/{r.number}": r for r in self.ranks["sampler"] if r.alive}
        for version, by_name in zip(self._versions, outcomes, strict=True):
            assert in_vain or by_name.keys() >= living.keys(), self._story(f"{by_name}")
            for name, kind in by_name.items():
                self.endings[f"push: {kind}"] += 1
                rank = living.get(name)
                if kind == "Receipt" or rank is None:
                    continue  # a dead one's end may not have been noticed before
                assert in_vain, self._story(f"version {version}: {by_name}")
                if kind != "OutcomeUnknownError":
                    denied = self._denied[rank.name, rank.connects]
                    denied.add(key_of(version, self._trainer))

    def _look(self) -> None:
        """What a sampler that lives has is a whole version, or it says why not."""
        living = [rank for rank in self.ranks["sampler"] if rank.alive]
        if len(living) == 2:
            for rank in living:
                rank.ask("follow", 0, LIMIT_S)
            self._collect(living, in_vain=True)

    def _repair(self, role: str, numbers: tuple[int, ...]) -> None:
        """The dead come back: with their whole job, or alone where that is possible."""
        ranks = self.ranks[role]
        alone = self._chance.random() < 0.5 and (role == "trainer" or numbers == (1,))
        for rank in list(ranks):
            if not rank.alive or not alone:
                rank.close()
                ranks.remove(rank)
        self._note(f"{role} comes back, {len(ranks)} of it lives")
        if role == "trainer" and not alone and self._chance.random() < 0.5:
            # From a checkpoint: it pushes a number again that some may have.
            self._version -= 1
        came = self._fill(role)
        self._connect(self.ranks["sampler"] if role == "trainer" else came)

    def _settle(self) -> None:
        """The next version arrives everywhere."""
        self._push([self._version + 1], RECOVERY_S)
        for rank in self.ranks["sampler"]:
            rank.ask("follow", self._version, RECOVERY_S)
        self._collect(self.ranks["trainer"] + self.ranks["sampler"], in_vain=False)

    def _fill(self, role: str) -> list[Rank]:
        """Starts the ranks that a job lacks."""
        ranks = self.ranks[role]
        self._trainer += role == "trainer"
        came = []
        for number in (0, 1):
            if number in {rank.number for rank in ranks}:
                continue
            self._names += 1
            rank = Rank(role, number, f"{role}{self._names}", self._transport)
            came.append(rank)
            ranks.insert(number, rank)
            place: list[Any] = [number]
            if role == "sampler":
                # Asked for anew: who cuts off a lost peer may be elsewhere since.
                place.append(ranks[0].call(RECOVERY_S, "address") if number else None)
            rank.address = rank.call(RECOVERY_S, "open", *place)
            assert isinstance(rank.address, bytes), self._story(f"{rank.address!r}")
        return came

    def _connect(self, samplers: list[Rank]) -> None:
        for rank in samplers:
            self._ask_to_connect(rank, RECOVERY_S)
        for rank in samplers:
            answer = rank.answer(RECOVERY_S + MARGIN_S)
            assert answer is None, self._story(f"{rank.name}: connect: {answer}")

    def _story(self, what: str) -> str:
        return "\n".join([*self.log, what])


def drill(transport: str, seed: int, kills: int) -> Drill:
    """Runs a drill to its end."""
    skip_unless_usable(transport)
    made = Drill(transport, seed)
    try:
        made.start()
        for _ in range(kills):
            made.kill_once()
    finally:
        made.close()
    return made


@pytest.mark.parametrize(("transport", "kills"), [("shm", 6)])
def test_kills_at_any_point_mix_no_version(transport: str, kills: int) -> None:
    drill(transport, 1, kills)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_many_kills_at_any_point_mix_no_version(transport: str) -> None:
    made = drill(transport, 2, 100)
    print(transport, dict(made.kills), dict(made.endings))
    assert {phase for _, phase in made.kills} >= set(Phase)
