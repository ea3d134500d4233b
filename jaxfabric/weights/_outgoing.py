"""Outgoing: a Sender's buckets, packed and written, receiver by receiver."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable
from concurrent.futures import Future

from jaxfabric._transfer_engine import TransferEngine
from jaxfabric._transfer_future import TransferFuture
from jaxfabric.weights._crew import Crew
from jaxfabric.weights._slot import Bytes
from jaxfabric.weights._staging import Staging
from jaxfabric.weights._target import Job, Target
from jaxfabric.weights._writer import Begun, Writer


class Outgoing:
    """The part of a Sender's worker that packs and writes.

    Args:
      engine: that writes.
      staging: buckets that are packed or written at a time.
      bucket_bytes: of each.
      threads: that pack.
      post: runs something on the Sender's worker; from any thread.
      unpacked: is told of a receiver whose bucket cannot be packed, and why.
      broken: is told of a receiver whose ring cannot be written, and why.
      counted: is told of a receiver of which a write has ended.
    """

    def __init__(
        self,
        engine: TransferEngine,
        staging: int,
        bucket_bytes: int,
        threads: int,
        post: Callable[[Callable[[], object]], object],
        unpacked: Callable[[Target, Exception], object],
        broken: Callable[[Target, Exception], object],
        counted: Callable[[Target], object],
    ) -> None:
        self._engine, self._post = engine, post
        self._unpacked, self._broken, self._counted = unpacked, broken, counted
        with contextlib.ExitStack() as undo:  # there may be no memory
            self._crew = Crew("jf.weights.Sender", helpers=threads - 1)
            undo.callback(self._crew.close)
            self._writer = Writer("jf.weights.Sender.writes", own_thread=threads > 1)
            undo.callback(self._writer.close)
            self.staging = Staging(engine, staging, bucket_bytes, self._crew)
            undo.pop_all()
        self._turns: collections.deque[Target] = collections.deque()

    def add(self, target: Target) -> None:
        """A receiver that may be written to."""
        self._turns.append(target)

    def remove(self, target: Target) -> None:
        """One that is gone."""
        self._turns.remove(target)

    def pump(self) -> None:
        """Packs and writes what there is room for, receiver by receiver."""
        skipped = 0
        while self.staging.left and skipped < len(self._turns):
            target = self._turns[0]
            self._turns.rotate(-1)
            number = target.ready_bucket()
            # One that hangs keeps its places: some are left for the others.
            if number is None or target.staged >= self.staging.left:
                skipped += 1
                continue
            skipped = 0
            if target.again:
                target.again.pop(0)
            else:
                target.next += 1
            self._write(target, number)

    def _write(self, target: Target, number: int) -> None:
        job, made = target.job, target.plan
        assert job is not None
        assert made is not None
        bucket = target.buckets[number]
        staged = self.staging.free.pop()
        target.staged += 1
        try:
            slot_bytes = self.staging.fill(staged, made, bucket, job, number)
        except Exception as error:
            self.staging.free.append(staged)
            target.staged -= 1
            target.again.append(number)  # it was not sent
            self._unpacked(target, error)
            return
        self._submit(target, job, number, staged, slot_bytes)

    def _submit(
        self, target: Target, job: Job, number: int, staged: int, slot_bytes: Bytes
    ) -> None:
        """Begins to write a bucket that is packed."""
        memory = target.memory
        assert memory is not None
        slot = target.slots.pop()
        target.under_way[slot] = job.version, number
        target.uncounted += 1

        def write() -> TransferFuture:
            return self._engine.submit_single_write(
                slot_bytes,
                memory,
                target.first_id + slot,
                target_offset=slot * target.slot_bytes,
                timeout_s=max(0.1, job.until - time.monotonic()),
            )

        def called(call: Future[Begun]) -> None:
            target.handed.pop(call, None)
            if call.cancelled():
                if target.under_way.pop(slot, None) is not None:
                    target.slots.append(slot)
                ended()
                return
            error = call.exception(0)
            if isinstance(error, Exception):  # a ring that makes no sense may raise any
                ended()
                self._broken(target, error)
                return
            begun = call.result(0)
            job.push._phases.core["write"] += begun.core_s
            if begun.write.done():
                over(begun, begun.end)
            else:
                begun.write.add_done_callback(
                    lambda _: self._later(
                        functools.partial(over, begun, time.monotonic())
                    )
                )

        def over(begun: Begun, end: float) -> None:
            error = begun.write.exception(0)
            if error is None:
                nbytes = slot_bytes.nbytes
                job.push._wrote(nbytes, begun.begin, end, job.first_post)
            ended()
            if error is not None:
                self._broken(target, error)

        def ended() -> None:
            self.staging.free.append(staged)
            target.staged -= 1
            if target.job is job:
                target.uncounted -= 1
                self._counted(target)

        call = self._writer.submit(write)
        if call.done():  # where that is this thread's work; `pump` goes on
            called(call)
        else:
            target.handed[call] = number
            call.add_done_callback(lambda call: self._later(lambda: called(call)))

    def _later(self, work: Callable[[], object]) -> None:
        """From other threads, when a place may have become free."""
        self._post(work)
        self._post(self.pump)

    def close(self) -> None:
        """Ends its threads, after the worker's, and gives memory back."""
        self._writer.close()
        self._crew.close()
        if self._engine.closed:
            return
        try:
            self._engine.drain()
        finally:
            self.staging.close()
