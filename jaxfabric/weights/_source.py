"""A trainer's rank, as the receiver sees it: its buckets and the ring they come to."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxfabric._errors import FabricError
from jaxfabric._transfer_memory import Region
from jaxfabric.weights._buckets import Bucket
from jaxfabric.weights._frames import Parts


@dataclasses.dataclass
class Source:
    """One rank of the trainer.

    Attributes:
      peer: number of its engine.
      connection: number of the greeting; what answers an older one is not for it.
      parts: of its plan, until that is there.
      rank: in its job; -1 until it has said so.
      origin: tells it from another Sender of that rank.
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
