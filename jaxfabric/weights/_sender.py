"""Sender: one rank of a trainer, which pushes versions of its parameters."""

from __future__ import annotations

import functools
import math
import operator
import threading
import time
from typing import Any

import jax

from jaxfabric._errors import CapacityError, FabricError, PlanMismatchError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric.weights._crew import thread_count
from jaxfabric.weights._deliveries import Deliveries
from jaxfabric.weights._engine_use import claimed_by, release
from jaxfabric.weights._layout import TreeLayout
from jaxfabric.weights._match import Rename
from jaxfabric.weights._plan import BUCKET_BYTES, Plan
from jaxfabric.weights._plan import plan as make_plan
from jaxfabric.weights._push import Push
from jaxfabric.weights._shards import HostTiles, source_tiles
from jaxfabric.weights._target import Job

_UNDER_WAY_MAX = 2
_RUN_CHARS_MAX = 128


class Sender(Deliveries):
    """One rank of a trainer: writes versions of its parameters to receivers.

    Receivers come by themselves, at any time: they connect to `address`. Each gets
    the newest version as soon as it is there, and every one that is pushed later. All
    ranks of the trainer push the same versions.

    Args:
      engine: a TransferEngine of this sender's own: it takes all its messages.
      layout: of the parameters, from `TreeLayout.of`; the same on all ranks.
      rank: of this process in the layout.
      plan: to the receivers' layout; ``None`` makes one for each layout that comes,
        with the options that follow.
      bucket_bytes, rename, cast, scales: as for `jf.weights.plan`.
      staging: buckets that are packed or written at a time. It takes
        ``staging * bucket_bytes`` of registered memory. Of three, a receiver that hangs
        keeps two until it is lost, so that the others go on; two such keep all.
      host_bytes: of tiles that are kept in host memory, if the parameters are not.
      threads: that pack a bucket together. With more than one, another calls the
        engine's writes, which over ``"shm"`` are copies. ``None``: one for each four
        cores that the process may use, up to 4.
      run: what all ranks of one run of the trainer have in common, and no other run
        does, such as the number that a scheduler gives it. A receiver that is given
        addresses of two runs then refuses them; without it, it cannot tell.

    Raises:
      ValueError: the layout has no such rank, or a number is too small.
      FabricError: the engine is closed, or another's.
      PlanMismatchError: the plan leaves something out, or fills it twice.

    Example::

      layout = jf.weights.TreeLayout.of(params)
      sender = jf.weights.Sender(jf.TransferEngine(job="rl", token=t), layout)
      publish(sender.address())
      push = sender.push(params, version=1)
      params = train_step(params)
      push.wait()
    """

    def __init__(
        self,
        engine: TransferEngine,
        layout: TreeLayout,
        *,
        rank: int = 0,
        plan: Plan | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        rename: Rename | None = None,
        cast: bool = False,
        scales: str | None = None,
        staging: int = 3,
        host_bytes: int = 256 << 20,
        threads: int | None = None,
        run: str = "",
    ) -> None:
        if plan is not None and plan.source != layout:
            raise ValueError("Sender: plan= leads from another layout than layout=")
        if plan is not None:
            plan.check()
        if rank not in layout.ranks:
            raise ValueError(f"Sender: rank={rank} is none of {layout.ranks[:16]}")
        if not isinstance(run, str) or len(run) > _RUN_CHARS_MAX:
            raise ValueError(f"Sender: run= has to be a text of {_RUN_CHARS_MAX} chars")
        if staging < 1 or host_bytes < 0:
            raise ValueError(f"Sender: staging={staging}, host_bytes={host_bytes}")
        self.layout = layout
        self._plan = plan
        self._make_plan = functools.partial(
            make_plan,
            layout,
            bucket_bytes=bucket_bytes,
            rename=rename,
            cast=cast,
            scales=scales,
        )
        self._plans: dict[TreeLayout, Plan] = {}
        self._host_bytes = host_bytes
        self._lock = threading.Lock()  # of the three that follow
        self._closed = False
        self._pushed = 0
        self._handles: list[Push] = []
        with claimed_by(engine, self):
            super().__init__(
                *(engine, rank, self._plan_of),
                plan.bucket_bytes if plan else bucket_bytes,
                staging,
                thread_count(threads),
                run,
            )

    def address(self) -> bytes:
        """What `Receiver.connect` takes."""
        return self.engine.address().to_bytes()

    def receivers(self) -> dict[str, str]:
        """The receivers that are connected, and what they are doing."""
        return {
            target.name: "idle"
            if target.job is None
            else f"version {target.job.version}, {target.next} of "
            f"{len(target.buckets)} buckets"
            for target in list(self._targets.values())
            if target.memory is not None
        }

    def stats(self) -> dict[str, int]:
        """Bytes of host memory.

        ``bytes`` are its own: ``staging`` buckets; tiles of parameters that are not in
        host memory, at most ``host_bytes`` and one tile; and NumPy's leaves, once for
        each push that is under way or the newest. ``ring_bytes`` are those of the
        receivers' rings that it writes into: over ``"shm"`` they are mapped here, too.
        """
        jobs = [self._latest, self._current, *list(self._queue)]
        kept = {id(job.tile_of): job.tile_of.nbytes for job in jobs if job is not None}
        rings = [
            (len(target.slots) + len(target.under_way)) * target.slot_bytes
            for target in list(self._targets.values())
            if target.plan is not None
        ]
        return {
            "bytes": self._outgoing.staging.nbytes + sum(kept.values()),
            "ring_bytes": sum(rings),
        }

    def push(
        self, params: Any, version: int, *, timeout_s: float | None = None
    ) -> Push:
        """Begins to write a version to all receivers; returns at once.

        JAX's arrays must live until it is done, and as long as it is the newest
        version: receivers that come later get it. So do not donate them to a program
        before the next push. NumPy arrays are copied.

        Args:
          params: tree of arrays, of the layout.
          version: above all that were pushed before, and above 0.
          timeout_s: for all of it; ``None`` is the engine's.

        Raises:
          CapacityError: two pushes are under way already; wait for one.
          FabricError: the tree is not that of the layout, the version is not new, or
            the Sender or its engine is closed.
          TypeError: ``version`` is no whole number.
          ValueError: ``timeout_s`` is not finite and above 0.

        Example::

          sender.push(params, version=step).wait()
        """
        limit_s = self.engine.timeout_s if timeout_s is None else float(timeout_s)
        if not 0 < limit_s < math.inf:
            raise ValueError(f"push: timeout_s={timeout_s} must be finite and above 0")
        version = operator.index(version)  # NumPy's would not travel
        tiles = self._tiles(params)
        arrays = [tile for tile in tiles.values() if isinstance(tile, jax.Array)]
        tile_of = HostTiles(tiles, self._host_bytes)
        with self._lock:
            why = None
            if self._closed or self.engine.closed:
                why = f"the {'Sender' if self._closed else 'TransferEngine'} is closed"
            elif not self._pushed < version < 1 << 63:
                why = f"{self._pushed} was pushed; versions rise"
            if why is not None:
                raise FabricError(f"push of version {version}: {why}")
            self._handles = [one for one in self._handles if not one.done()]
            if len(self._handles) >= _UNDER_WAY_MAX:
                raise CapacityError(
                    f"push of version {version}: {len(self._handles)} pushes are under "
                    "way; wait() for one of them"
                )
            self._pushed = version
            handle = Push(version, self._cancel)
            self._handles.append(handle)
            now = time.monotonic()
            job = Job(
                *(version, tile_of, handle, now + limit_s, now),
                arrays=arrays,
                pending=list(arrays),
            )
            self._worker.post(lambda: self._add_job(job))
        return handle

    def _tiles(self, params: Any) -> dict[tuple[int, int], Any]:
        return source_tiles(self.layout, params, self.rank)

    def close(self) -> None:
        """Ends what is under way, and takes leave; may be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._worker.post(self._leave)
        self._worker.close()
        try:
            if not self.engine.closed:
                self.engine.submit_recvs(None)
            self._outgoing.close()
        finally:
            release(self.engine)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *rest: object) -> None:
        self.close()

    def _plan_of(self, layout: TreeLayout) -> Plan:
        if self._plan is not None:
            if self._plan.target != layout:
                raise PlanMismatchError(
                    "jf.weights: the receiver's layout is not that of the Sender's "
                    "plan=; make the plan anew, or leave it out"
                )
            return self._plan
        if layout not in self._plans:
            self._plans[layout] = self._make_plan(layout)
        return self._plans[layout]
