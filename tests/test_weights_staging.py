"""Staging of jf.weights: who hangs keeps some of it, and the others go on."""

from __future__ import annotations

from typing import Any

import pytest
from test_weights_plan import leaf, tree
from transfer_cases import PATIENCE_S, until
from weights_cases import assert_tiles, jobs, mesh, whole_arrays

import jaxfabric as jf
from jaxfabric.weights import _frames, _pack, _slot

SOURCE = tree(mesh(1), leaf("w", (64, 1 << 16)))
BUCKET_BYTES = 1 << 18


class Hangs:
    """A write that does not end."""

    def done(self) -> bool:
        return False

    def add_done_callback(self, function: Any) -> None:
        """Never calls it."""


def test_one_that_hangs_does_not_hold_up_the_others() -> None:
    """64 buckets for each; what is on its way to the first one never ends."""
    with jobs("shm", SOURCE, SOURCE, bucket_bytes=BUCKET_BYTES, staging=2) as both:
        (sender,) = both.senders
        until(lambda: len(sender._targets) == 1)
        (hanging,) = sender._targets.values()
        other = both.open_receiver(0)
        other.connect(both.addresses())
        real = sender.engine.submit_single_write

        def submit(source: Any, target: jf.MrDesc, *rest: Any, **more: Any) -> Any:
            if target is hanging.memory:
                return Hangs()
            return real(source, target, *rest, **more)

        sender.engine.submit_single_write = submit  # type: ignore[method-assign, assignment]
        arrays = whole_arrays(SOURCE)
        push = sender.push(arrays, 1, timeout_s=3.0)
        assert_tiles(SOURCE, arrays, other.take(1, PATIENCE_S).params)
        assert hanging.staged == 1
        with pytest.raises(jf.DeadlineError, match=hanging.name):
            push.wait(PATIENCE_S)
        assert sum(isinstance(o, jf.weights.Receipt) for o in push.outcomes().values())


def test_a_ring_that_cannot_be_written_keeps_no_staging() -> None:
    with jobs("shm", SOURCE, SOURCE, bucket_bytes=BUCKET_BYTES, staging=2) as both:
        (sender,) = both.senders
        until(lambda: len(sender._targets) == 1)
        (target,) = sender._targets.values()
        cut = _slot.cut_of(target.buckets, _pack.STRIP_BYTES)
        ring = {"slots": 4, "id": (1 << 26) - 3, "memory": "", "cut": cut}
        target.memory, memory = None, target.memory
        with pytest.raises(jf.FabricError, match="ring is malformed"):
            sender._on_ready(target, ring)
        target.memory, target.first_id = memory, 1 << 27
        push = sender.push(whole_arrays(SOURCE), 1)
        with pytest.raises(jf.FabricError, match="ring cannot be written"):
            push.wait(PATIENCE_S)
        assert sender._outgoing.staging.left == 2


def test_a_credit_for_a_slot_that_is_not_full_counts_for_nothing() -> None:
    with jobs("shm", SOURCE, SOURCE, bucket_bytes=BUCKET_BYTES) as both:
        sender = both.senders[0]
        push = sender.push(whole_arrays(SOURCE), 1, timeout_s=PATIENCE_S)
        push.wait(PATIENCE_S)
        (target,) = sender._targets.values()
        until(lambda: not target.under_way)
        free = sorted(target.slots)
        for slot in (free[0], 1 << 31):
            sender._on_message(target.peer, _frames.credit(slot, whole=False))
        assert sorted(target.slots) == free
        assert target in sender._targets.values()
