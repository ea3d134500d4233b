"""Agreement: all ranks of a sampler take the same version."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxfabric._errors import DeadlineError, FabricError, PeerLostError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric.weights import _frames
from jaxfabric.weights._versions import Versions
from jaxfabric.weights._watch import Watch

_LOOK_S = 0.05  # between two looks at what another trainer sends


class Agreement:
    """Finds the version that each rank has, each time that all of them take.

    A rank that takes holds its newest version and tells the lowest rank, the leader.
    If all hold the same one, that is it. Otherwise those with an older one let go of
    it and wait for the newest that any has: since a trainer begins a version only
    after the one before has ended everywhere, it comes, or fails by name. The loss of
    a rank is told to each of the others once; after that they wait for its return.

    Args:
      advance: called on any thread once a version is let go of.
      missing: says why a version has not come.
    """

    def __init__(
        self,
        engine: TransferEngine,
        versions: Versions,
        ranks: Sequence[int],
        rank: int,
        leader: bytes | None,
        advance: Callable[[], object],
        missing: Callable[[], str],
    ) -> None:
        self._engine, self._versions, self._advance = engine, versions, advance
        self._ranks, self._rank = tuple(ranks), rank
        self._missing = missing
        self._number = 0  # of the last report
        self._answer: tuple[str, int] | None = None  # to it
        self._lost: FabricError | None = None
        self._peers: dict[int, int] = {}  # the leader's: peers by rank
        self._reports: dict[int, tuple[int, tuple[int, int]]] = {}  # the leader's
        self._watch = Watch(engine, self._peer_lost)
        self._untold: dict[int, set[int]] = {}  # the leader's: by rank that is lost
        self._leader: int | None = None
        first = self._ranks[0]
        if (leader is None) != (rank == first):
            raise ValueError(
                f"Receiver: rank {rank} of {self._ranks[:16]}: leader= is the address "
                f"of rank {first}, and given to all others"
            )
        if leader is not None:
            self._leader = engine.connect(leader).result()
            self._watch.add(self._leader)
            engine.submit_send(self._leader, _frames.encode("join", rank=rank))

    def agree(self, min_version: int, timeout_s: float) -> tuple[int, int]:
        """The version that all ranks take now, and its origin; held until `release`.

        Raises:
          DeadlineError: a version, or a rank, has not come in time.
          PeerLostError: another rank is lost.
          FabricError: what `Versions` says.
        """
        until = time.monotonic() + timeout_s
        while True:
            self._wait_for(min_version, until, timeout_s)
            held = version, origin = self._versions.hold()
            agreed = False
            try:
                if len(self._ranks) == 1:
                    agreed = True
                    return held
                self._report(version, origin)
                kind, wanted = self._wait_for_answer(until, timeout_s)
                if kind == "gone":
                    raise PeerLostError(
                        f"Receiver.take: rank {wanted} of this sampler is lost; start "
                        "it again, with leader=, or take without it in another job",
                        (wanted,),
                    )
                agreed = kind == "use"
                if agreed:
                    return held
            except FabricError:
                with contextlib.suppress(FabricError):
                    self._report(0, 0)  # it takes no part any more
                raise
            finally:
                if not agreed:
                    self._versions.release()
                    self._advance()
            min_version = wanted
            if wanted <= version:  # some have another trainer's: all look again
                self._wait_for_another(held)

    def on_message(self, peer: int, kind: str, fields: dict[str, Any]) -> bool:
        """Takes messages between ranks; ``False`` for others."""
        if kind == "join" and self._leader is None:
            if fields["rank"] in self._ranks[1:]:
                self._joined(fields["rank"], peer)
        elif kind == "newest" and self._leader is None:
            for rank, known in self._peers.items():
                if known == peer:
                    key = fields["version"], fields["origin"]
                    self._collect(rank, fields["number"], key)
        elif kind in ("use", "want") and peer == self._leader:
            self._answered(kind, fields["number"], fields["version"])
        elif kind == "gone" and peer == self._leader:
            self._answered(kind, fields["number"], fields["rank"])
        else:
            return False
        return True

    def _wait_for(self, version: int, until: float, timeout_s: float) -> None:
        versions = self._versions
        with versions.changed:
            came = versions.changed.wait_for(
                lambda: versions.newest >= version or versions.failure is not None,
                max(0.0, until - time.monotonic()),
            )
            if versions.newest >= version:
                return
            if came and versions.failure is not None:
                raise versions.take_failure()
        raise DeadlineError(
            f"Receiver.take: version {version} has not come after {timeout_s} s; the "
            f"newest is {versions.newest}"
            + (f", and {versions.filling} is on its way" if versions.filling else "")
            + f"; {self._missing()}"
        )

    def _wait_for_answer(self, until: float, timeout_s: float) -> tuple[str, int]:
        with self._versions.changed:
            self._versions.changed.wait_for(
                lambda: self._answer is not None or self._lost is not None,
                max(0.0, until - time.monotonic()),
            )
            if self._answer is not None:
                return self._answer
            if self._lost is not None:
                raise self._lost
        missing = "the leader has not answered"
        if self._leader is None:
            late = [rank for rank in self._ranks if rank not in self._reports]
            missing = f"ranks {late} have not called take(), or have no version yet"
        raise DeadlineError(f"Receiver.take: after {timeout_s} s {missing}")

    def _wait_for_another(self, held: tuple[int, int]) -> None:
        versions = self._versions
        with versions.changed:
            versions.changed.wait_for(
                lambda: (versions.newest, versions.origin) != held, _LOOK_S
            )

    def _report(self, version: int, origin: int) -> None:
        with self._versions.changed:
            self._number, self._answer = self._number + 1, None
        if self._leader is None:
            self._collect(self._rank, self._number, (version, origin))
        else:
            message = _frames.encode(
                "newest", version=version, origin=origin, number=self._number
            )
            self._engine.submit_send(self._leader, message)

    def _joined(self, rank: int, peer: int) -> None:
        with self._versions.changed:
            self._peers[rank] = peer
            self._reports.pop(rank, None)
            self._untold.pop(rank, None)
            for untold in self._untold.values():
                untold.discard(rank)
        self._watch.add(peer)

    def _peer_lost(self, peer: int, error: FabricError) -> None:
        with self._versions.changed:
            if peer == self._leader:
                self._lost = error
                self._versions.changed.notify_all()
            # Not those whose successors are here already.
            gone = [rank for rank, known in self._peers.items() if known == peer]
            for rank in gone:
                del self._peers[rank]
                self._reports.pop(rank, None)
                self._untold[rank] = set(self._ranks) - {rank}
            waiting = list(self._reports)
        for each in waiting:
            self._tell_gone(each)

    def _tell_gone(self, rank: int) -> bool:
        """Tells one that reports of a loss, if it has not been told yet."""
        with self._versions.changed:
            untold = (lost for lost, to in self._untold.items() if rank in to)
            lost = next(untold, None)
            if lost is None or rank not in self._reports:
                return False
            self._untold[lost].discard(rank)
            number, _ = self._reports.pop(rank)
        self._reply(rank, "gone", number, rank=lost)
        return True

    def _collect(self, rank: int, number: int, key: tuple[int, int]) -> None:
        """Decides, once all have reported. Any thread of the leader."""
        with self._versions.changed:
            self._reports[rank] = number, key
            if key[0] == 0:
                del self._reports[rank]
            if self._tell_gone(rank) or len(self._reports) < len(self._ranks):
                return
            keys = {key for _, key in self._reports.values()}
            newest = max(version for version, _ in keys)
            behind = [r for r, (_, key) in self._reports.items() if key[0] < newest]
            # The others hold it, and their reports, until those behind have it, too.
            # Of one number from two trainers nobody knows which is the newer one.
            answers = {r: self._reports.pop(r)[0] for r in behind or self._ranks}
        kind = "want" if len(keys) > 1 else "use"
        for each, its_number in answers.items():
            self._reply(each, kind, its_number, version=newest)

    def _reply(self, to: int, kind: str, number: int, **what: int) -> None:
        if to == self._rank:
            (value,) = what.values()
            self._answered(kind, number, value)
        elif to in self._peers:
            message = _frames.encode(kind, number=number, **what)
            with contextlib.suppress(FabricError):  # it is lost
                self._engine.submit_send(self._peers[to], message)

    def _answered(self, kind: str, number: int, value: int) -> None:
        with self._versions.changed:
            if number == self._number:
                self._answer = kind, value
                self._versions.changed.notify_all()
