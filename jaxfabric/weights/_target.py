"""A receiver, as the sender sees it: its plan, its slots, and what is on its way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from jaxfabric._errors import FabricError, OutcomeUnknownError
from jaxfabric._net_addr import MrDesc
from jaxfabric.weights._buckets import Bucket
from jaxfabric.weights._frames import Parts
from jaxfabric.weights._plan import Plan
from jaxfabric.weights._push import Push, Receipt


def _nothing() -> None:
    """There is no timer."""


@dataclasses.dataclass(eq=False)
class Job:
    """A version that is being pushed, and the arrays that it consists of.

    Attributes:
      catch_up: it is no push of the caller's, but for who came late.
      arrays: those of them that are JAX's.
      pending: those of them of which it is not known that they are computed.
      dropped: whether its sender has given it up for a receiver.
      no_limit: ends its timer.
    """

    version: int
    tile_of: Any  # of the number of a leaf and of a tile: its array on the host
    push: Push
    until: float
    waits_since: float
    first_post: float = 0.0
    catch_up: bool = False
    arrays: list[Any] = dataclasses.field(default_factory=list)
    pending: list[Any] = dataclasses.field(default_factory=list)
    dropped: bool = False
    no_limit: Callable[[], object] = _nothing

    def computed(self) -> bool:
        """Whether its arrays are computed, so that nobody who reads them waits."""
        while self.pending:
            array = self.pending[-1]
            # Of what is deleted the reader says so.
            if not array.is_deleted() and not array.is_ready():
                return False
            self.pending.pop()
        return True

    def why_unpacked(self, error: Exception) -> str:
        """Why a bucket could not be packed, in words."""
        if any(array.is_deleted() for array in self.arrays):
            return (
                f"the parameters of version {self.version} are gone ({error}); do not "
                "donate them before the next push"
            )
        if isinstance(error, RuntimeError):  # JAX's
            return f"the parameters of version {self.version} are not there: {error}"
        return f"version {self.version} cannot be packed: {error!r}"

    def end_limit(self) -> None:
        """It is over: nothing refers to it in a circle, and keeps its arrays."""
        self.no_limit()
        self.no_limit = _nothing


@dataclasses.dataclass
class Target:
    """One receiver.

    Attributes:
      peer: number of its engine.
      rank: in its job.
      name: of its engine, and its rank.
      connection: number of its greeting; all that it is told says that number.
      layout_parts: until its layout is there.
      plan: to its layout.
      buckets: of this rank to it.
      slot_bytes: of each slot of its ring.
      memory: its ring of slots; ``None`` until it is ready.
      first_id: counts of slot ``i`` go to ``first_id + i``.
      job: what it is being sent, or waits for.
      went: it has said that it takes the version.
      next: the bucket that is sent next.
      again: buckets that came spoilt, to be sent once more.
      slots: those of its ring that are free.
      under_way: version and bucket in each slot that it has not emptied yet.
      spoilt: how many came spoilt.
      staged: how many of the Sender's staging buckets are on their way to it.
      handed: buckets by the call that writes them, until that is over.
      uncounted: writes of the job of which it is not known that they have ended.
      receipt: what it said of the job, until those are counted.
      put_off: it came while a push waited, and is to get the newest version.
    """

    peer: int
    rank: int
    name: str
    connection: int
    layout_parts: Parts | None
    plan: Plan | None = None
    buckets: list[Bucket] = dataclasses.field(default_factory=list)
    slot_bytes: int = 0
    memory: MrDesc | None = None
    first_id: int = 0
    job: Job | None = None
    went: bool = False
    next: int = 0
    again: list[int] = dataclasses.field(default_factory=list)
    slots: list[int] = dataclasses.field(default_factory=list)
    under_way: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    spoilt: int = 0
    staged: int = 0
    handed: dict[Future[Any], int] = dataclasses.field(default_factory=dict)
    uncounted: int = 0
    receipt: Receipt | None = None
    put_off: bool = False

    @property
    def nbytes(self) -> int:
        """Of all its buckets."""
        return sum(bucket.nbytes for bucket in self.buckets)

    def ready_bucket(self) -> int | None:
        """The bucket that can be sent now, if there is one."""
        if self.job is None or not self.went or not self.slots:
            return None
        if self.again:
            return self.again[0]
        return self.next if self.next < len(self.buckets) else None

    def may_have_all(self) -> bool:
        """Whether all that this rank has of the version was sent, and nothing spoilt.

        It may then have the version, whatever was heard of it.
        """
        return self.went and self.next == len(self.buckets) and not self.again

    def lacks(self) -> str:
        """What its job waits for."""
        if not self.went:
            return (
                "it has not let this rank write; its take() says which ranks of the "
                "trainer it is not connected to, or have not pushed the version, or "
                "whether take() itself is late"
            )
        if self.next < len(self.buckets):
            return f"{self.next} of {len(self.buckets)} buckets were written"
        return "it has not said that it has it"

    def revoke(self) -> None:
        """Takes back what is packed, and not begun to be written: it was not sent."""
        for call, number in list(self.handed.items()):
            if call.cancel():
                self.again.append(number)

    def judged(self, error: FabricError) -> Receipt | FabricError:
        """What became of its version, which it may have in spite of the error."""
        if self.receipt is not None:
            return self.receipt
        self.revoke()
        if not self.may_have_all():
            return error
        return OutcomeUnknownError(
            f"all was written, and it did not say that it has it: {error}"
        )

    def begin(self, job: Job) -> None:
        """Starts anew, with another version."""
        self.job, self.went, self.next, self.spoilt = job, False, 0, 0
        self.again.clear()
        self.uncounted, self.receipt = 0, None
