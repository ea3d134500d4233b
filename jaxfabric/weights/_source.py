"""A trainer's ranks, as the receiver sees them: buckets, and the rings they come to."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from jaxfabric._errors import FabricError
from jaxfabric._transfer_memory import Region
from jaxfabric.weights._buckets import Bucket
from jaxfabric.weights._frames import Parts
from jaxfabric.weights._plan import Plan


@dataclasses.dataclass
class Source:
    """One rank of the trainer.

    Attributes:
      peer: number of its engine.
      connection: number of the greeting; what answers an older one is not for it.
      parts: of its plan, until that is there.
      rank: in its job; -1 until it has said so.
      origin: tells it from another Sender of that rank.
      run: of its job, as that is called.
      buckets: that it sends to this rank.
      ring: slots that it writes into.
      first_id: counts of slot ``i`` come under ``first_id + i``.
      failure: why it does not send.
      joined: whether it sends to this ring what it pushes from now on.
      offered: the version that it wants to send; 0 for none.
      waits: for the count of each slot.
      taken: buckets of the version that is being filled.
    """

    peer: int
    connection: int = 0
    parts: Parts | None = None
    rank: int = -1
    origin: int = 0
    run: str = ""
    buckets: list[Bucket] = dataclasses.field(default_factory=list)
    ring: Region | None = None
    first_id: int = 0
    failure: FabricError | None = None
    joined: bool = False
    offered: int = 0
    waits: dict[int, Any] = dataclasses.field(default_factory=dict)
    taken: set[int] = dataclasses.field(default_factory=set)

    @property
    def name(self) -> str:
        """For errors."""
        return f"rank {self.rank}" if self.rank >= 0 else f"peer {self.peer}"

    @property
    def complete(self) -> bool:
        """Whether all of the version has come."""
        return len(self.taken) == len(self.buckets)


def joint_origin(sources: list[Source]) -> int:
    """Tells one trainer from another: all ranks of a sampler find the same."""
    origins = sorted((source.rank, source.origin) for source in sources)
    digest = hashlib.sha256(repr(origins).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def missing(sources: Mapping[int, Source], plan: Plan | None, filling: int) -> str:
    """Why a version has not come, as far as is known. Any thread."""
    ready = [one for one in list(sources.values()) if one.ring is not None]
    if plan is None or not ready:
        return "no trainer is connected: connect() to the addresses of its ranks"
    absent = sorted(set(plan.source.ranks) - {one.rank for one in ready})
    if absent:
        return (
            f"ranks {absent[:16]} of the trainer are not connected: connect() to the "
            "addresses of all of them"
        )
    if filling:
        part = sorted(one.rank for one in ready if not one.complete)
        return f"ranks {part[:16]} of the trainer have not sent all of it"
    newest = max(one.offered for one in ready)
    late = sorted(one.rank for one in ready if one.offered < newest)
    if late:
        return f"ranks {late[:16]} of the trainer have not pushed version {newest}"
    return "the trainer has not pushed it, or has given it up"


def clash(source: Source, other: Source) -> str:
    """Why one that has come takes another's place; "" if it does not."""
    if other.rank == source.rank:
        return (
            f"another Sender of rank {source.rank} is connected: that was started "
            "again, or two addresses are of one rank"
        )
    if other.rank >= 0 and other.run != source.run:
        return (
            f"rank {other.rank} of the trainer is of run {other.run!r}, and rank "
            f"{source.rank} of run {source.run!r}: connect() to addresses of one run"
        )
    return ""


def difference(source: Source, made: Plan, other: Source, known: Plan | None) -> str:
    """Why two ranks of a trainer cannot send together."""
    what = "rename=, cast= or scales= differ"
    if known is not None and known.source != made.source:
        what = "their layouts differ"
    elif known is not None and known.bucket_bytes != made.bucket_bytes:
        what = f"bucket_bytes={made.bucket_bytes} and {known.bucket_bytes}"
    return (
        f"rank {source.rank} of the trainer has another plan than rank {other.rank} "
        f"({what}): give all of its ranks the same options"
    )
