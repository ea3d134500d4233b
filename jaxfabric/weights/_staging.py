"""Staging: registered memory in which a Sender puts buckets together."""

from __future__ import annotations

import contextlib

from jaxfabric._errors import FabricError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric.weights._buckets import Bucket
from jaxfabric.weights._crew import Crew
from jaxfabric.weights._pack import Strip, helpers_for, packing
from jaxfabric.weights._phases import Phases
from jaxfabric.weights._plan import Plan
from jaxfabric.weights._slot import HEADER_BYTES, Bytes, Checksum, seal
from jaxfabric.weights._target import Job

_CLOSE_S = 1.0


class Staging:
    """Room for a few buckets, which a crew packs one after the other.

    Attributes:
      free: numbers of those that are not in use.
      nbytes: of all of them.
    """

    def __init__(
        self, engine: TransferEngine, buckets: int, bucket_bytes: int, crew: Crew
    ) -> None:
        self._crew = crew
        self._engine = engine
        self._region = engine.alloc((buckets, HEADER_BYTES + bucket_bytes))
        self._memory: Bytes | None = self._region.array
        self.free = list(range(buckets))
        self.nbytes = self._region.array.nbytes

    @property
    def left(self) -> int:
        """How many are free."""
        return len(self.free)

    def fill(
        self, place: int, plan: Plan, bucket: Bucket, job: Job, number: int
    ) -> Bytes:
        """Packs and seals a bucket; its bytes, with their header."""
        assert self._memory is not None
        slot: Bytes = self._memory[place, : HEADER_BYTES + bucket.nbytes]
        checksum = Checksum(job.version, number, bucket.nbytes)

        def fill(strip: Strip, phases: Phases) -> None:
            strip.copy()
            phases.lap("pack")
            checksum.add(strip.number, strip.data)
            phases.lap("seal")

        self._crew.phases = job.push._phases
        strips = packing(plan, bucket, job.tile_of, slot[HEADER_BYTES:])
        self._crew.each(strips, fill, helpers_for(bucket))
        seal(slot, checksum)
        return slot

    def close(self) -> None:
        """Gives the memory back, unless a write that hangs may still read it."""
        with contextlib.suppress(FabricError):
            self._engine.unregister_memory(self._region, _CLOSE_S)
            self._memory, self.nbytes = None, 0
            del self._region
