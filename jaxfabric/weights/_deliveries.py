"""Deliveries: the receivers of a Sender, from their greeting to each version's end."""

from __future__ import annotations

import collections
import contextlib
import secrets
import time
from collections.abc import Callable
from typing import Any

from jaxfabric._errors import (
    DeadlineError,
    FabricError,
    PeerLostError,
)
from jaxfabric._net_addr import MrDesc
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric.weights import _frames, _pack
from jaxfabric.weights._buckets import largest
from jaxfabric.weights._engine_use import IDS_BEGIN
from jaxfabric.weights._layout import TreeLayout
from jaxfabric.weights._outgoing import Outgoing
from jaxfabric.weights._plan import Plan
from jaxfabric.weights._push import Push, Receipt
from jaxfabric.weights._slot import HEADER_BYTES, cut_of
from jaxfabric.weights._strangers import Strangers
from jaxfabric.weights._target import Job, Target
from jaxfabric.weights._watch import Watch
from jaxfabric.weights._worker import Worker

_NAME_CHARS_MAX = 128
_LOOK_S = 2e-3  # between two looks whether a version is computed
_TRIES = 3  # of a bucket that comes spoilt


class Deliveries:
    """The part of a Sender that runs on its worker's thread.

    Args:
      plan_to: the plan to a layout; raises PlanMismatchError.
      bucket_bytes: of that plan.
      staging: buckets that are packed or written at a time.
      threads: that pack.
      run: of the job.
    """

    def __init__(
        self,
        engine: TransferEngine,
        rank: int,
        plan_to: Callable[[TreeLayout], Plan],
        bucket_bytes: int,
        staging: int,
        threads: int,
        run: str,
    ) -> None:
        self.engine, self.rank = engine, rank
        self._plan_to, self._run = plan_to, run
        # At exit they end in the reverse order: who uses the others goes first.
        self._outgoing = Outgoing(
            *(engine, staging, bucket_bytes, threads),
            *(self._post, self._unpacked, self._broken, self._counted),
        )
        self._targets: dict[int, Target] = {}
        self._strangers = Strangers()
        self._latest: Job | None = None
        self._current: Job | None = None
        self._queue: collections.deque[Job] = collections.deque()
        self._looking = False
        self._origin = secrets.randbits(63)
        self._worker = Worker("jf.weights.Sender")
        self._watch = Watch(
            engine, lambda *lost: self._worker.post(lambda: self._drop(*lost))
        )
        engine.submit_recvs(
            lambda peer, data: self._worker.post(lambda: self._on_message(peer, data))
        )

    def _post(self, work: Callable[[], object]) -> None:
        self._worker.post(work)

    # --- Greetings ---

    def _on_message(self, peer: int, data: bytes) -> None:
        target = self._targets.get(peer)
        try:
            credit = _frames.credited(data)
            if credit is not None:
                if target is not None:
                    self._on_credit(target, *credit)
                return
            if _frames.is_part(data):
                if target is not None and target.layout_parts is not None:
                    self._take_layout(target, data)
                return
            kind, fields = _frames.decode(data)
            if kind == "hello":
                self._hello(peer, fields)
            elif target is not None and kind in _HANDLERS:
                _HANDLERS[kind](self, target, fields)
        except Exception as error:  # hostile bytes may raise anything
            failure = error
            if not isinstance(failure, FabricError):
                failure = FabricError(
                    f"jf.weights: what peer {peer} sent is malformed: {error}"
                )
            if self._strangers.first(peer) or peer in self._targets:
                self._tell(peer, "refuse", version=0, why=str(failure))
            self._drop(peer, failure)

    def _hello(self, peer: int, fields: dict[str, Any]) -> None:
        self._drop(peer, FabricError("it began anew"))
        self._watch.add(peer)
        parts = _frames.Parts(fields["nbytes"])
        name = f"{fields['name'][:_NAME_CHARS_MAX]}/{fields['rank']}"
        if any(target.name == name for target in self._targets.values()):
            name += f"#{peer}"
        target = self._targets[peer] = Target(
            *(peer, fields["rank"], name, fields["connection"], parts)
        )
        self._outgoing.add(target)
        if fields["version"] != _frames.VERSION:
            raise FabricError(
                f"jf.weights: the receiver speaks version {fields['version']}, the "
                f"sender {_frames.VERSION}: run the same jaxfabric on both sides"
            )

    def _take_layout(self, target: Target, data: bytes) -> None:
        assert target.layout_parts is not None
        whole = target.layout_parts.add(data)
        if whole is None:
            return
        target.layout_parts = None
        layout = TreeLayout.from_bytes(whole)
        target.plan = self._plan_to(layout)
        if target.rank not in layout.ranks:
            raise FabricError(f"jf.weights: the target's layout has no {target.rank}")
        target.buckets = target.plan.sends(self.rank).get(target.rank, [])
        target.slot_bytes = HEADER_BYTES + largest(target.buckets)
        data = target.plan.to_bytes()
        self._tell(
            *(target.peer, "welcome"),
            version=_frames.VERSION,
            rank=self.rank,
            origin=self._origin,
            run=self._run,
            nbytes=len(data),
        )
        for part in _frames.in_parts(data):
            self._send(target.peer, part)

    def _on_ready(self, target: Target, fields: dict[str, Any]) -> None:
        if target.plan is None or target.memory is not None:
            return
        if fields["cut"] != cut_of(target.buckets, _pack.STRIP_BYTES):
            raise FabricError(
                "jf.weights: the receiver cuts the plan into other buckets: run the "
                "same jaxfabric on both sides"
            )
        slots = fields["slots"]
        if not 1 <= slots <= 1 << 16 or fields["id"] + slots > IDS_BEGIN:
            raise FabricError("jf.weights: a receiver's ring is malformed")
        target.memory = MrDesc.from_bytes(bytes.fromhex(fields["memory"]))
        target.first_id = fields["id"]
        target.slots = list(range(slots))
        self._tell(target.peer, "joined")
        self._catch_up([target])

    def _catch_up(self, targets: list[Target]) -> None:
        """Offers the newest version to receivers that came late."""
        if self._latest is None or not targets:
            return
        if self._queue:  # the next push is for them, too, unless it is given up
            for target in targets:
                target.put_off = True
            return
        if self._current is None:
            catch_up = Push(self._latest.version, self._cancel)
            now = time.monotonic()
            limit_s = self.engine.timeout_s
            self._current = Job(
                *(self._latest.version, self._latest.tile_of, catch_up),
                *(now + limit_s, now),
                catch_up=True,
                arrays=self._latest.arrays,
            )
            self._limit(self._current)
        for target in targets:
            self._offer(target, self._current)

    def _on_go(self, target: Target, fields: dict[str, Any]) -> None:
        job = target.job
        if job is not None and fields["version"] == job.version and not target.went:
            target.went = True
            if not job.first_post:
                job.first_post = time.monotonic()
                job.push._phases.wall["wait"] = job.first_post - job.waits_since
            self._outgoing.pump()

    def _on_credit(self, target: Target, slot: int, whole: bool) -> None:
        found = target.under_way.pop(slot, None)
        if found is None:
            return
        target.slots.append(slot)
        version, number = found
        if not whole and target.job is not None and version == target.job.version:
            target.spoilt += 1
            target.again.append(number)
            if target.spoilt > _TRIES:
                why = (
                    f"bucket {number} came with a wrong checksum; {target.spoilt} "
                    "buckets did: look at memory and NICs of both sides"
                )
                self._give_up(target, FabricError(why))
        self._outgoing.pump()

    def _on_have(self, target: Target, fields: dict[str, Any]) -> None:
        job = target.job
        if job is not None and fields["version"] == job.version:
            seconds = fields["verify_us"] / 1e6, fields["unpack_us"] / 1e6
            target.receipt = Receipt(*seconds)
            self._counted(target)

    def _counted(self, target: Target) -> None:
        """Ends a version that a receiver has, once all of its writes are counted."""
        if target.receipt is not None and not target.uncounted:
            self._end(target, target.receipt)

    def _on_refuse(self, target: Target, fields: dict[str, Any]) -> None:
        job = target.job
        error = FabricError(f"refused: {fields['why']}")
        if fields["version"] == 0:
            self._drop(target.peer, error)
        elif job is not None and fields["version"] == job.version:
            self._end(target, error)

    def _on_dropped(self, target: Target, fields: dict[str, Any]) -> None:
        """As `_on_refuse`; another rank of the trainer has given it up."""
        job = target.job
        if job is not None and fields["version"] == job.version:
            job.dropped = True
        self._on_refuse(target, fields)

    # --- Versions ---

    def _add_job(self, job: Job) -> None:
        self._queue.append(job)
        self._limit(job)
        self._next_job()

    def _limit(self, job: Job) -> None:
        left = max(0.0, job.until - time.monotonic())
        job.no_limit = self._worker.after(left, lambda: self._expire(job))

    def _look(self) -> None:
        self._looking = False
        self._next_job()

    def _next_job(self) -> None:
        current = self._current
        if current is not None and not current.catch_up:
            return
        if not self._queue:
            waiting = [t for t in self._targets.values() if t.put_off]
            self._catch_up(waiting)
            return
        if not self._queue[0].computed():
            if not self._looking:
                self._looking = True
                self._worker.after(_LOOK_S, self._look)
            return
        if current is not None:
            # Other ranks may offer the next version already, and never this one; what
            # its receivers have of it they drop once the next one is offered.
            for target in list(self._targets.values()):
                if target.job is current:
                    self._end(target, FabricError("a newer version is pushed"))
            return
        job = self._current = self._latest = self._queue.popleft()
        for target in list(self._targets.values()):
            if target.memory is not None:
                self._offer(target, job)
        self._finish_job()

    def _offer(self, target: Target, job: Job) -> None:
        target.put_off = False
        target.begin(job)
        job.push._opens(target.name, target.nbytes)
        self._tell(target.peer, "begin", version=job.version)

    def _unpacked(self, target: Target, error: Exception) -> None:
        """A bucket cannot be packed."""
        assert target.job is not None
        self._give_up(target, FabricError(target.job.why_unpacked(error)))

    # --- How it ends ---

    def _end(self, target: Target, outcome: Receipt | FabricError) -> None:
        job, target.job = target.job, None
        if job is not None:
            job.push._ends(target.name, outcome)
            self._finish_job()

    def _finish_job(self) -> None:
        job = self._current
        if job is None or any(t.job is job for t in self._targets.values()):
            return
        self._current = None
        if job.dropped and self._latest is job and not job.push._may_be_had():
            self._latest = None  # nobody gets it who comes later
        self._over(job)
        self._next_job()

    def _over(self, job: Job) -> None:
        job.end_limit()
        job.push._resolve()

    def _give_up(self, target: Target, error: FabricError) -> None:
        """Ends a version for one receiver, which goes on."""
        job = target.job
        if job is None:
            return
        job.dropped = True
        self._tell(target.peer, "dropped", version=job.version, why=str(error))
        self._end(target, target.judged(error))

    def _broken(self, target: Target, error: Exception) -> None:
        """A write failed: its ring cannot be used any more."""
        if not isinstance(error, FabricError):
            error = FabricError(f"its ring cannot be written: {error}")
        if self._targets.get(target.peer) is target:
            self._tell(target.peer, "refuse", version=0, why=str(error))
            self._drop(target.peer, error)

    def _drop(self, peer: int, error: FabricError) -> None:
        target = self._targets.pop(peer, None)
        if target is None:
            return
        self._outgoing.remove(target)
        self._end(target, target.judged(error))

    def _expire(self, job: Job) -> None:
        """Ends it, with what each receiver has not done."""
        why = "the time limit of the push has passed"
        if not job.computed():
            why += ", and its parameters are not computed yet"
        for target in list(self._targets.values()):
            if target.job is job:
                self._give_up(target, DeadlineError(f"{why}: {target.lacks()}"))
        self._stop(job, DeadlineError(why))

    def _cancel(self, handle: Push) -> None:
        def cancel() -> None:
            for job in [self._current, *self._queue]:
                if job is not None and job.push is handle:
                    self._stop(job, FabricError("cancelled by the sender"))

        self._worker.post(cancel)

    def _stop(self, job: Job, error: FabricError) -> None:
        if job in self._queue:  # never began
            self._queue.remove(job)
            job.push._opens("all", 0)
            job.push._ends("all", error)
            self._over(job)
            self._next_job()
        for target in list(self._targets.values()):
            if target.job is job:
                self._give_up(target, error)

    def _leave(self) -> None:
        while self._queue:
            self._stop(self._queue[-1], FabricError("the Sender was closed"))
        for peer in list(self._targets):
            why = "the Sender was closed"
            self._tell(peer, "refuse", version=0, why=why)
            self._drop(peer, PeerLostError(why, (self.rank,)))
        self._latest = None  # nobody gets it any more

    def _tell(self, peer: int, kind: str, **fields: Any) -> None:
        target = self._targets.get(peer)
        connection = 0 if target is None else target.connection
        self._send(peer, _frames.encode(kind, connection=connection, **fields))

    def _send(self, peer: int, data: bytes) -> None:
        with contextlib.suppress(FabricError):  # it is lost, which is noticed elsewhere
            self.engine.submit_send(peer, data)


_HANDLERS: dict[str, Callable[[Deliveries, Target, dict[str, Any]], None]] = {
    "ready": Deliveries._on_ready,
    "go": Deliveries._on_go,
    "have": Deliveries._on_have,
    "refuse": Deliveries._on_refuse,
    "dropped": Deliveries._on_dropped,
}
