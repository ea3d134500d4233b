"""Arrivals: the senders of a Receiver, and the versions that come from them."""

from __future__ import annotations

import contextlib
import hashlib
import time
from typing import Any

from jaxfabric._errors import FabricError, PeerLostError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric._transfer_memory import Region
from jaxfabric.weights import _frames, _pack
from jaxfabric.weights._agreement import Agreement
from jaxfabric.weights._buckets import Bucket, largest
from jaxfabric.weights._crew import NICE, Crew, Dropped
from jaxfabric.weights._engine_use import take_ids
from jaxfabric.weights._layout import TreeLayout
from jaxfabric.weights._match import check_cover
from jaxfabric.weights._pack import Strip, unpacking
from jaxfabric.weights._phases import Phases
from jaxfabric.weights._plan import Plan
from jaxfabric.weights._slot import HEADER_BYTES, Checksum, claimed, cut_of, is_whole
from jaxfabric.weights._source import Source, clash, difference, joint_origin, missing
from jaxfabric.weights._strangers import Strangers
from jaxfabric.weights._tiles import empty_tiles
from jaxfabric.weights._versions import Versions
from jaxfabric.weights._watch import Watch
from jaxfabric.weights._worker import Worker

_FOREVER_S = 1e9
_RETIRE_S = 1.0
_LEAVE_S = 5.0  # all together


class Arrivals:
    """The part of a Receiver that runs on its worker's thread."""

    def __init__(
        self,
        engine: TransferEngine,
        layout: TreeLayout,
        rank: int,
        leader: bytes | None,
        slots: int,
        threads: int,
    ) -> None:
        self.engine, self.layout, self.rank = engine, layout, rank
        self._slots = slots
        self._versions = Versions(empty_tiles(layout, rank), empty_tiles(layout, rank))
        self._sources: dict[int, Source] = {}
        self._strangers = Strangers()
        self._plan: Plan | None = None
        self._plan_digest = b""
        self._buckets: dict[int, list[Bucket]] = {}  # by source rank
        self._rings: list[Region] = []  # also of those that are gone
        self._connections = self._spoilt = 0
        self._filling: object = None  # differs each time that a version begins
        with contextlib.ExitStack() as undo:  # at exit they end in the reverse order
            name, helpers = "jf.weights.Receiver", threads if threads > 1 else 0
            self._crew = Crew(name, helpers, nice=NICE)
            undo.callback(self._crew.close)
            self._worker = Worker(name, nice=0 if helpers else NICE)
            undo.callback(self._worker.close)
            self._watch = Watch(
                engine, lambda *lost: self._worker.post(lambda: self._drop(*lost))
            )
            self._agreement = Agreement(
                *(engine, self._versions, layout.ranks, rank, leader),
                lambda: self._worker.post(self._advance),
                lambda: missing(self._sources, self._plan, self._versions.filling),
            )
            undo.pop_all()
        engine.submit_recvs(
            lambda peer, data: self._worker.post(lambda: self._on_message(peer, data))
        )

    # --- Messages ---

    def _on_message(self, peer: int, data: bytes) -> None:
        source = self._sources.get(peer)
        try:
            if _frames.is_part(data):
                if source is not None and source.parts is not None:
                    self._take_plan(source, data)
                return
            kind, fields = _frames.decode(data)
            if self._agreement.on_message(peer, kind, fields) or source is None:
                return
            if fields.get("connection", 0) not in (0, source.connection):
                return  # it crossed the greeting of this one
            if kind == "welcome":
                if source.parts is not None or source.ring is not None:
                    raise FabricError("jf.weights: a sender gave two plans")
                source.rank, source.origin = fields["rank"], fields["origin"]
                source.run = fields["run"]
                source.parts = _frames.Parts(fields["nbytes"])
            elif kind == "joined":
                with self._versions.changed:
                    source.joined = True
                    self._versions.changed.notify_all()
            elif kind == "begin":
                self._offered(source, fields["version"])
            elif kind in ("refuse", "dropped"):
                self._refused(source, kind, fields)
        except Exception as error:  # hostile bytes may raise anything
            failure = error
            if not isinstance(failure, FabricError):
                failure = FabricError(
                    f"jf.weights: what peer {peer} sent is malformed: {error}"
                )
            if self._strangers.first(peer) or peer in self._sources:
                self._tell(peer, "refuse", version=0, why=str(failure))
            self._drop(peer, failure)

    def _hello(self, source: Source) -> None:
        layout = self.layout.to_bytes()
        peer = source.peer
        self._drop(peer, FabricError("it is connected anew"))
        self._versions.forgive()
        self._connections += 1
        source.connection = self._connections
        self._sources[peer] = source
        self._watch.add(peer)
        self._tell(
            peer,
            "hello",
            version=_frames.VERSION,
            rank=self.rank,
            name=self.engine.name,
            connection=source.connection,
            nbytes=len(layout),
        )
        for part in _frames.in_parts(layout):
            self._send(peer, part)

    def _take_plan(self, source: Source, data: bytes) -> None:
        assert source.parts is not None
        whole = source.parts.add(data)
        if whole is None:
            return
        source.parts = None
        self._use_plan(source, whole)
        for other in list(self._sources.values()):
            if other is not source and (why := clash(source, other)):
                self._replace(other, why)
        self._versions.forgive()
        source.buckets = self._buckets.get(source.rank, [])
        slot_bytes = HEADER_BYTES + largest(source.buckets)
        slots = max(1, min(self._slots, len(source.buckets)))
        source.first_id = take_ids(self.engine, slots)
        source.ring = self.engine.alloc((slots, slot_bytes))
        self._rings.append(source.ring)
        for slot in range(slots):
            self._expect(source, slot)
        self._tell(
            *(source.peer, "ready"),
            slots=slots,
            id=source.first_id,
            memory=source.ring.desc.to_bytes().hex(),
            cut=cut_of(source.buckets, _pack.STRIP_BYTES),
        )

    def _use_plan(self, source: Source, data: bytes) -> None:
        """The plan of all sources: it is read once."""
        digest = hashlib.sha256(data).digest()
        if self._plan is not None and digest == self._plan_digest:
            return
        made = Plan.from_bytes(data)
        if made.target != self.layout:
            raise FabricError("jf.weights: the sender's plan leads to another layout")
        check_cover(made.target, made.links)
        buckets = made.receives(self.rank)
        for other in list(self._sources.values()):
            if other is not source and other.ring is not None:
                self._replace(other, difference(source, made, other, self._plan))
        self._plan, self._plan_digest, self._buckets = made, digest, buckets

    def _replace(self, source: Source, why: str) -> None:
        self._tell(source.peer, "refuse", version=0, why=why)
        self._drop(source.peer, FabricError(why))

    # --- What comes ---

    def _expect(self, source: Source, slot: int) -> None:
        def came(done: Any) -> None:
            if done.exception(0) is None:
                self._worker.post(lambda: self._on_bucket(source, slot))

        source.waits[slot] = self.engine.expect_imm_count(
            source.first_id + slot, 1, came, peers=[source.peer], timeout_s=_FOREVER_S
        )

    def _senders(self) -> list[Source]:
        """All ranks of the trainer; empty unless each of them is there."""
        ready = [one for one in self._sources.values() if one.ring is not None]
        if self._plan is None:
            return []
        whole = {one.rank for one in ready} == set(self._plan.source.ranks)
        return ready if whole else []

    def _on_bucket(self, source: Source, slot: int) -> None:
        if self._sources.get(source.peer) is not source:
            return
        assert source.ring is not None
        version, number = claimed(source.ring.array[slot])
        if number >= len(source.buckets) or not 0 < version == self._versions.filling:
            self._emptied(source, slot, whole=False)
            return
        self._empty(source, slot, number)
        if not self._crew.helpers:
            self._crew.finish()

    def _empty(self, source: Source, slot: int, number: int) -> None:
        """Copies a bucket to its tiles, in the crew's threads.

        If it turns out to be spoilt, the tiles have what is wrong until it comes again:
        nobody sees them.
        """
        assert self._plan is not None
        assert source.ring is not None
        memory, bucket = source.ring.array[slot], source.buckets[number]
        version, filling = self._versions.filling, self._filling
        back = self._versions.back
        checksum = Checksum(version, number, bucket.nbytes)

        def empty(strip: Strip, phases: Phases) -> None:
            checksum.add(strip.number, strip.data)
            phases.lap("verify")
            strip.copy()
            phases.lap("unpack")

        def took(failure: Exception | None) -> None:
            if self._sources.get(source.peer) is not source:
                return
            whole = failure is None and is_whole(memory, checksum)
            if self._filling is filling:
                (source.taken.add if whole else source.taken.discard)(number)
                if failure is None:
                    self._spoilt += not whole
                elif not isinstance(failure, Dropped):  # no memory, for instance
                    why = f"version {version} cannot be unpacked: {failure!r}"
                    self._abandon(FabricError(why))
            self._emptied(source, slot, whole)

        def done(failure: Exception | None) -> None:
            if self._crew.helpers:
                self._worker.post(lambda: took(failure))
            else:
                took(failure)

        strips = unpacking(
            *(self._plan, bucket),
            lambda leaf, tile: back[leaf, tile],
            memory[HEADER_BYTES:],
        )
        self._crew.begin(strips, empty, done)

    def _emptied(self, source: Source, slot: int, whole: bool) -> None:
        """Its sender may use a slot again."""
        try:
            self._expect(source, slot)
        except FabricError as error:
            self._drop(source.peer, error)
            return
        self._send(source.peer, _frames.credit(slot, whole))
        if source.complete:
            self._advance()

    def _offered(self, source: Source, version: int) -> None:
        filling = self._versions.filling
        if filling and source.offered == filling != version:
            # It has gone on, and what the others send of that is in vain.
            self._versions.filling = 0
            self._refuse(filling, f"{source.name} goes on to version {version}")
        source.offered = version
        self._grant()

    def _grant(self) -> None:
        """Lets all sources send, once they offer the same version."""
        versions = self._versions
        sources = self._senders()
        version = max((source.offered for source in sources), default=0)
        if version == 0 or versions.filling:
            return
        if any(source.offered != version for source in sources):
            return  # the others will offer it, too
        origin = joint_origin(sources)
        known = version == versions.newest and origin == versions.origin
        if version < versions.newest or known:
            for source in sources:
                source.offered = 0
                if known:
                    self._tell_have(source, version)
                else:
                    why = f"version {versions.newest} is here, which is newer"
                    self._tell(source.peer, "refuse", version=version, why=why)
            return
        self._crew.drop()  # what came of a version that was given up
        self._crew.phases = Phases()
        self._filling = object()
        versions.begin(version, origin)
        for source in sources:
            source.taken.clear()
            self._tell(source.peer, "go", version=version)
        self._advance()

    def _advance(self) -> None:
        """Makes what is filled the newest, unless that is held just now."""
        versions = self._versions
        sources = self._senders()
        if not sources or not versions.filling:
            return
        if not all(s.complete and s.offered == versions.filling for s in sources):
            return
        version = versions.filling
        self._crew.drop()  # buckets that came twice
        if not versions.swap():
            return  # `take` comes back here
        for source in sources:
            source.offered = 0
            self._tell_have(source, version)

    def _tell_have(self, source: Source, version: int) -> None:
        self._tell(
            *(source.peer, "have"),
            version=version,
            verify_us=int(self._crew.phases.wall["verify"] * 1e6),
            unpack_us=int(self._crew.phases.wall["unpack"] * 1e6),
        )

    # --- What does not come ---

    def _refused(self, source: Source, kind: str, fields: dict[str, Any]) -> None:
        error = FabricError(f"the sender, {source.name}: {fields['why']}")
        if fields["version"] == 0:
            self._drop(source.peer, error)
        elif fields["version"] == source.offered:
            source.offered = 0
            self._abandon(error, kind)

    def _drop(self, peer: int, error: FabricError) -> None:
        source = self._sources.pop(peer, None)
        if source is None:
            return
        if isinstance(error, PeerLostError):
            error = PeerLostError(
                f"the sender, {source.name}, is lost: {error}; connect to its "
                "successor",
                (source.rank,) if source.rank >= 0 else (),
            )
        with self._versions.changed:
            source.failure = error
        self._abandon(error, stays=True)
        self._retire(source)

    def _leave(self) -> None:
        """Gives all back to the engine."""
        until = time.monotonic() + _LEAVE_S
        for source in list(self._sources.values()):
            self._tell(source.peer, "refuse", version=0, why="the Receiver was closed")
        for source in list(self._sources.values()):
            del self._sources[source.peer]
            self._retire(source, min(_RETIRE_S, max(0.01, until - time.monotonic())))

    def _retire(self, source: Source, limit_s: float = _RETIRE_S) -> None:
        """Gives back a ring; what may still be written into it stays registered."""
        self._crew.drop()  # nobody reads it
        for wait in source.waits.values():
            wait.cancel()
        if source.ring is not None:
            with contextlib.suppress(FabricError):
                self.engine.unregister_memory(source.ring, limit_s)
                self._rings.remove(source.ring)

    def _abandon(
        self, error: FabricError, kind: str = "refuse", *, stays: bool = False
    ) -> None:
        """Gives up the version that is being filled, and tells of it by `kind`."""
        version = self._versions.filling
        self._versions.fail(error, stays=stays)
        if version:
            self._refuse(version, str(error), kind)

    def _refuse(self, version: int, why: str, kind: str = "refuse") -> None:
        """Tells all who offer a version that it will not come about."""
        for source in self._sources.values():
            if source.offered == version:
                source.offered = 0
                self._tell(source.peer, kind, version=version, why=why)

    def _tell(self, peer: int, kind: str, **fields: Any) -> None:
        if kind in ("refuse", "dropped"):
            source = self._sources.get(peer)
            fields["connection"] = 0 if source is None else source.connection
        self._send(peer, _frames.encode(kind, **fields))

    def _send(self, peer: int, data: bytes) -> None:
        with contextlib.suppress(FabricError):  # it is lost, which is noticed elsewhere
            self.engine.submit_send(peer, data)
