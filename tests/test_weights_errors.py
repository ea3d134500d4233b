"""What jf.weights says when something is missing, and what it gives back at its end."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from typing import Any

import numpy as np
import pytest
from test_weights_plan import leaf, tree
from transfer_cases import PATIENCE_S, engine
from weights_cases import TileReceiver, TileSender, assert_tiles, jobs, mesh

import jaxfabric as jf
from jaxfabric.weights import TreeLayout, _deliveries
from jaxfabric.weights._engine_use import IDS_BEGIN, take_ids

SOURCE = tree(mesh(2), leaf("w", (64, 96), "a"))
ONE = tree(mesh(1), leaf("w", (64, 96)))


def arrays_of(version: int) -> dict[str, Any]:
    return {"w": np.full((64, 96), version, np.float32)}


def test_who_is_missing_is_named() -> None:
    with jobs("shm", SOURCE, ONE, join=False) as both:
        (receiver,) = both.receivers
        with pytest.raises(jf.DeadlineError, match="no trainer is connected"):
            receiver.take(1, timeout_s=0.1)
        receiver.connect(both.addresses()[:1])
        first = both.senders[0].push(arrays_of(1), 1, timeout_s=0.5)
        with pytest.raises(jf.DeadlineError, match=r"ranks \[1\] .* are not connected"):
            receiver.take(1, timeout_s=0.1)
        with pytest.raises(jf.DeadlineError, match="has not let this rank write"):
            first.wait(PATIENCE_S)
        receiver.connect(both.addresses())
        first = both.senders[0].push(arrays_of(2), 2)
        with pytest.raises(jf.DeadlineError, match=r"ranks \[1\] .* have not pushed"):
            receiver.take(2, timeout_s=0.3)
        second = both.senders[1].push(arrays_of(2), 2)
        for push in (first, second):
            push.wait(PATIENCE_S)
        with pytest.raises(jf.DeadlineError, match="trainer has not pushed it"):
            receiver.take(3, timeout_s=0.1)


def test_what_a_receiver_lacks_is_in_the_sender_s_error() -> None:
    with jobs("shm", ONE, ONE) as both:
        (sender,), (receiver,) = both.senders, both.receivers
        receiver._on_bucket = lambda source, slot: None  # type: ignore[method-assign]
        push = sender.push(arrays_of(1), 1, timeout_s=0.3)
        with pytest.raises(jf.OutcomeUnknownError, match="has not said that it has it"):
            push.wait(PATIENCE_S)


def test_ranks_with_other_options_are_named() -> None:
    with jobs("shm", SOURCE, ONE, join=False, bucket_bytes=1 << 20) as both:
        both.options["bucket_bytes"] = 2 << 20
        addresses = [both.senders[0].address(), both.open_sender(1).address()]
        match = (
            r"rank . of the trainer has another plan than rank . "
            r"\(bucket_bytes=(1048576 and 2097152|2097152 and 1048576)\)"
        )
        with pytest.raises(jf.FabricError, match=match):
            both.receivers[0].connect(addresses)


def test_two_addresses_of_one_rank_are_told() -> None:
    with jobs("shm", SOURCE, ONE, join=False) as both:
        addresses = [both.senders[0].address(), both.open_sender(0).address()]
        with pytest.raises(jf.FabricError, match="two addresses are of one rank"):
            both.receivers[0].connect(addresses)


def test_ranks_of_two_runs_are_never_mixed() -> None:
    with jobs("shm", SOURCE, ONE, join=False, run="first") as both:
        receiver = both.receivers[0]
        receiver.connect(both.addresses())
        for push in both.push(arrays_of(1), 1):
            push.wait(PATIENCE_S)
        both.options["run"] = "second"
        later = [both.open_sender(rank) for rank in (0, 1)]
        match = "rank . of the trainer is of run '.*', and rank . of run '.*'"
        with pytest.raises(jf.FabricError, match=match):
            receiver.connect([both.addresses()[0], later[1].address()])
        for number, senders in enumerate((both.senders, later)):
            for sender in senders:
                sender.push(arrays_of(2 + number), 2)
        with contextlib.suppress(jf.FabricError):  # the first run may be there, whole
            found = receiver.take(2, timeout_s=0.3).params[0, 0]
            assert (found == 2).all()
        receiver.connect([sender.address() for sender in later])
        pushes = [sender.push(arrays_of(3), 3) for sender in later]
        for push in pushes:
            push.wait(PATIENCE_S)
        assert_tiles(ONE, arrays_of(3), receiver.take(3).params)
        both.options["run"] = 7
        with pytest.raises(ValueError, match="run="):
            both.open_sender(0)


def test_other_buckets_of_the_same_plan_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As another jaxfabric may cut them."""
    monkeypatch.setattr(_deliveries, "cut_of", lambda buckets, strips: 0)
    with jobs("shm", ONE, ONE, join=False) as both:
        with pytest.raises(jf.FabricError, match="the same jaxfabric on both sides"):
            both.receivers[0].connect(both.addresses())


def test_calls_that_make_no_sense_are_refused() -> None:
    with engine("shm") as own, engine("shm") as theirs:
        with pytest.raises(ValueError, match="slots=0"):
            TileReceiver(own, None, layout=ONE, slots=0)
        few: tuple[dict[str, Any], ...] = (
            {"staging": 0},
            {"host_bytes": -1},
            {"threads": 0},
        )
        for wrong in few:
            with pytest.raises(ValueError, match=next(iter(wrong))):
                TileSender(own, ONE, **wrong)
        with pytest.raises(ValueError, match="leader=") as held:
            TileReceiver(own, None, layout=ONE, leader=b"x")
        receiver = TileReceiver(own, None, layout=ONE)  # the engine is not that one's
        del held
        with pytest.raises(ValueError, match="no addresses"):
            receiver.connect([])
        for call in (receiver.take, lambda **more: receiver.connect([b"x"], **more)):
            with pytest.raises(ValueError, match="timeout_s=inf is not finite"):
                call(timeout_s=float("inf"))
        for kind in (TileReceiver, TileSender):
            with pytest.raises(jf.FabricError, match="is that of a TileReceiver"):
                kind(own, None, layout=ONE) if kind is TileReceiver else kind(own, ONE)
        receiver.close()
        with pytest.raises(jf.FabricError, match="the Receiver is closed"):
            receiver.connect([b"x"])
        sender = TileSender(theirs, ONE)
        theirs.close()
        with pytest.raises(jf.FabricError, match="the TransferEngine is closed"):
            sender.push(arrays_of(1), 1)
        sender.close()
    with pytest.raises(jf.FabricError, match="its TransferEngine is closed"):
        TileSender(own, ONE)


def test_ids_are_given_once() -> None:
    with engine("shm") as own, engine("shm") as other:
        assert [take_ids(own, 3), take_ids(own, 2), take_ids(other, 1)] == [0, 3, 0]
        with pytest.raises(jf.FabricError, match="ids are used up"):
            take_ids(own, IDS_BEGIN - 4)


@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_what_is_closed_gives_its_engine_back(transport: str) -> None:
    """The next ones on it work, and have all the memory that these had."""
    with engine(transport) as own, engine(transport) as theirs:
        before = len(own._regions), len(theirs._regions)
        for version in range(1, 5):
            with (
                TileSender(own, ONE) as sender,
                TileReceiver(theirs, None, layout=ONE) as receiver,
            ):
                receiver.connect([sender.address()])
                sender.push(arrays_of(version), version).wait(PATIENCE_S)
                assert_tiles(ONE, arrays_of(version), receiver.take(version).params)
                assert len(own._regions) > before[0]
                assert len(theirs._regions) > before[1]
                if version % 2:
                    sender.close()
            gc.collect()
            assert (len(own._regions), len(theirs._regions)) == before


def test_what_was_taken_stays_what_it_is() -> None:
    """Later calls give it again: it cannot be changed, and may be donated."""
    jax = pytest.importorskip("jax")
    like = {"here": np.zeros(8, np.float32), "there": jax.numpy.zeros(8)}
    params = {name: np.arange(8, dtype=np.float32) for name in like}
    with (
        engine("shm") as own,
        engine("shm") as theirs,
        jf.weights.Sender(own, TreeLayout.of(params)) as sender,
        jf.weights.Receiver(theirs, like) as receiver,
    ):
        receiver.connect([sender.address()])
        sender.push(params, 1).wait(PATIENCE_S)
        taken = receiver.take(1).params
        with pytest.raises(ValueError, match="read-only"):
            taken["here"] *= 0
        assert receiver.take().params is taken
        taken["there"].delete()
        for values in receiver.take().params.values():
            assert (np.asarray(values) == params["here"]).all()


def test_a_plan_with_holes_is_refused_at_once() -> None:
    made = jf.weights.plan(SOURCE, ONE)
    holes = dataclasses.replace(made, links=())
    with engine("shm") as own:
        with pytest.raises(jf.PlanMismatchError, match="w"):
            TileSender(own, SOURCE, plan=holes)
