"""Receiver: one rank of a sampler, which takes versions of a trainer's parameters."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfabric._errors import DeadlineError, FabricError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric.weights._arrivals import Arrivals
from jaxfabric.weights._crew import thread_count
from jaxfabric.weights._engine_use import claimed_by, release
from jaxfabric.weights._layout import TreeLayout
from jaxfabric.weights._shards import check_like, target_tree
from jaxfabric.weights._source import Source
from jaxfabric.weights._tiles import TilesByKey


class Taken(NamedTuple):
    """What `Receiver.take` gives.

    Attributes:
      version: its number.
      params: tree of arrays, all of that version.
    """

    version: int
    params: Any


class Receiver(Arrivals):
    """One rank of a sampler: takes versions that all ranks of a trainer push.

    A version becomes visible when all of it has come and every checksum is right; a
    half of one never does. Until `take` the sampler goes on with the one it has. The
    arrays of all versions have the same shapes, dtypes and shardings, so programs are
    not compiled again.

    Memory on the host: twice what this rank holds of the tree, and ``slots`` buckets
    for each rank of the trainer. `take` makes the arrays of a version; the user's are
    his own.

    Args:
      engine: a TransferEngine of this receiver's own: it takes all its messages.
      like: tree of arrays, or of ``jax.ShapeDtypeStruct`` with shardings: what `take`
        makes.
      layout: of that tree; ``None`` is ``TreeLayout.of(like)``.
      rank: of this process in the layout.
      leader: where the sampler has several ranks, the `address` of its lowest one,
        through which they agree on what they take; ``None`` on that one itself.
      slots: buckets that each rank of the trainer may have on the way.
      threads: that check and unpack a bucket together. ``None``: one for each four
        cores that the process may use, up to 4. They are a little nicer than the
        process (nice(2), by 3): where cores are short, who serves goes first.

    Raises:
      ValueError: the layout has no such rank, or a number is too small.
      FabricError: ``like`` is not of the ``layout``; or the engine is closed, or
        another's.

    Example::

      receiver = jf.weights.Receiver(jf.TransferEngine(job="rl", token=t), params)
      receiver.connect(trainer_addresses)
      version, params = receiver.take(min_version=1, timeout_s=60)
      while True:
          tokens = generate(params, prompts)
          version, params = receiver.take()      # newer ones, as they come
    """

    def __init__(
        self,
        engine: TransferEngine,
        like: Any,
        *,
        layout: TreeLayout | None = None,
        rank: int = 0,
        leader: bytes | None = None,
        slots: int = 2,
        threads: int | None = None,
    ) -> None:
        described = TreeLayout.of(like) if layout is None else layout
        if rank not in described.ranks:
            raise ValueError(f"Receiver: rank={rank} is none of {described.ranks[:16]}")
        if slots < 1:
            raise ValueError(f"Receiver: slots={slots} must be above 0")
        check_like(described, like, rank)
        self._like = like
        self._current: Taken | None = None
        self._taken = (0, 0)
        self._closed = False
        with claimed_by(engine, self):
            super().__init__(
                engine, described, rank, leader, slots, thread_count(threads)
            )

    def address(self) -> bytes:
        """What other ranks of the sampler take as ``leader``."""
        return self.engine.address().to_bytes()

    @property
    def version(self) -> int:
        """The newest version that is whole here; 0 before the first."""
        return self._versions.newest

    def connect(
        self, addresses: Sequence[bytes], timeout_s: float | None = None
    ) -> None:
        """Asks a trainer for its versions, the newest one first, if it has one.

        Args:
          addresses: `Sender.address` of all its ranks, in any order. Those of a
            trainer that was started again take the places of the old ones.
          timeout_s: until all have answered; ``None`` is the engine's.

        Raises:
          PeerLostError, DeadlineError: an address is stale, or does not answer.
          FabricError: a sender refuses, for instance since no plan leads from its
            layout to this one; it says why. Or this Receiver is closed.
          ValueError: there are no addresses, or the limit is not finite.
        """
        limit_s = self._limit("connect", timeout_s)
        if not addresses:
            raise ValueError("Receiver.connect: there are no addresses")
        if self._closed:
            raise FabricError("Receiver.connect: the Receiver is closed")
        until = time.monotonic() + limit_s
        peers = [self.engine.connect(address, limit_s) for address in addresses]
        numbers = [future.result() for future in peers]
        self._versions.forgive()
        asked = [Source(peer) for peer in dict.fromkeys(numbers)]
        for source in asked:
            self._worker.post(functools.partial(self._hello, source))

        def answered() -> bool:
            return any(source.failure for source in asked) or all(
                source.joined for source in asked
            )

        with self._versions.changed:
            if not self._versions.changed.wait_for(
                answered, max(0.0, until - time.monotonic())
            ):
                joined = {source.peer for source in asked if source.joined}
                late = [i for i, number in enumerate(numbers) if number not in joined]
                raise DeadlineError(
                    f"Receiver.connect: after {limit_s} s addresses {late[:16]} of "
                    f"{len(numbers)} have not answered: are these senders alive, or "
                    "still busy with a plan?"
                )
        for source in asked:
            if source.failure is not None:
                raise source.failure

    def take(self, min_version: int = 0, timeout_s: float | None = None) -> Taken:
        """The newest version that all ranks of the sampler have.

        With several ranks all call it as often, and get the same version.

        Args:
          min_version: waits for this one, or a later one.
          timeout_s: how long; ``None`` is the engine's.

        Returns:
          The version and its arrays: the same ones as before if there is nothing
          newer, so NumPy's cannot be written to; new ones if those were donated.

        Raises:
          DeadlineError: it has not come in time. What was taken before stays valid.
          PeerLostError: a sender is lost, whose part is missing.
          FabricError: the sender has given the version up, and says why. Or this
            Receiver is closed.
          ValueError: the limit is not finite.
        """
        limit_s = self._limit("take", timeout_s)
        key = self._agreement.agree(max(1, min_version), limit_s)
        try:
            if self._current is None or self._taken != key or _gone(self._current):
                self._current = Taken(key[0], self._tree(self._versions.front))
                self._taken = key
                _make_read_only(self._current)
        finally:
            self._versions.release()
            self._worker.post(self._advance)  # to what is whole since
        return self._current

    def _limit(self, what: str, timeout_s: float | None) -> float:
        """Seconds that a call may take; raises if it cannot be made at all."""
        limit_s = self.engine.timeout_s if timeout_s is None else float(timeout_s)
        if not math.isfinite(limit_s):
            raise ValueError(f"Receiver.{what}: timeout_s={timeout_s} is not finite")
        if self.engine.closed:
            raise FabricError(f"Receiver.{what}: its TransferEngine is closed")
        return limit_s

    def _tree(self, tiles: TilesByKey) -> Any:
        return target_tree(self.layout, self._like, tiles)

    def stats(self) -> dict[str, float]:
        """Versions, number of sources, bytes of memory, and what became of buckets.

        ``verify_s`` and ``unpack_s`` are seconds of the newest version by the clock,
        ``verify_core_s`` and ``unpack_core_s`` those that its thread ran.
        """
        phases = self._crew.phases
        rings = [region.array.nbytes for region in list(self._rings)]
        return {
            "version": self._versions.newest,
            "filling": self._versions.filling,
            "sources": len(self._sources),
            "bytes": self._versions.nbytes + sum(rings),
            "spoilt": self._spoilt,
            **{f"{name}_s": phases.wall[name] for name in ("verify", "unpack")},
            **{f"{name}_core_s": phases.core[name] for name in ("verify", "unpack")},
        }

    def close(self) -> None:
        """Takes no more; may be called again. What was taken stays valid."""
        if self._closed:
            return
        self._closed = True
        self._versions.fail(FabricError("the Receiver was closed"), stays=True)
        if not self.engine.closed:
            self._worker.post(self._leave)
        self._worker.close()
        self._crew.close()
        try:
            if not self.engine.closed:
                self.engine.submit_recvs(None)
                self.engine.drain()
        finally:
            release(self.engine)

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *rest: object) -> None:
        self.close()


def _gone(taken: Taken) -> bool:
    leaves = jax.tree_util.tree_leaves(taken.params)
    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves)


def _make_read_only(taken: Taken) -> None:
    for leaf in jax.tree_util.tree_leaves(taken.params):
        if isinstance(leaf, np.ndarray):
            leaf.flags.writeable = False
