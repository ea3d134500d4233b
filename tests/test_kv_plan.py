"""The pure parts of jf.kv: layouts, plans, the life cycle, what is given out."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import DIMS, content, fill, is_poison, layout, poison_pages, taken

import jaxfabric as jf
from jaxfabric.kv import State, _frames
from jaxfabric.kv._life_cycle import TRANSITIONS, Event, advance
from jaxfabric.kv._pages import FreeList, IdPairs

# --- Layouts -----------------------------------------------------------------


def test_a_layout_describes_a_pool() -> None:
    a = layout(dtype="bfloat16", tp_size=2, tp_rank=1)
    assert a.shape == (3, 24, 2, 4, 2, 8)
    assert a.local_heads == range(2, 4)
    assert a.nbytes == 3 * 24 * 2 * 4 * 2 * 8 * 2
    pool = np.zeros(a.shape, a.numpy_dtype)
    assert tuple(a.strides().values()) == pool.strides
    assert a.pages_for(1) == a.pages_for(4) == 1
    assert a.pages_for(5) == 2
    assert jf.kv.PageLayout.from_json(json.loads(json.dumps(a.to_json()))) == a


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers": 0}, "layers=0 must be an integer, at least 1"),
        ({"pages": 1.5}, "pages=1.5"),
        ({"heads": True}, "heads=True"),
        ({"page_tokens": 1 << 32}, "page_tokens=4294967296"),
        ({"tp_size": 3}, "heads=4 cannot be shared evenly by tp_size=3"),
        ({"tp_rank": 1}, "tp_rank=1 must be at least 0 and below tp_size=1"),
        ({"dtype": "nothing"}, "dtype='nothing' is no name"),
        ({"dtype": "O"}, "dtype='O'"),
        ({"dtype": "f4"}, "dtype='f4'"),
        ({"order": DIMS[1:]}, "must hold each of"),
        ({"order": DIMS[::-1]}, "head_size last"),
        ({"pages": 1 << 31, "layers": 1 << 31}, r"fewer than 2\*\*48"),
        ({"model": "m" * 257}, "model is a string"),
    ],
)
def test_bad_layouts_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        layout(**changes)


@pytest.mark.parametrize(
    "changes", [{"layers": -1}, {"order": 3}, {"dtype": 3}, {"dtype": "x"}, {"new": 1}]
)
def test_bad_layouts_of_peers_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(jf.FabricError, match="peer sent"):
        jf.kv.PageLayout.from_json({**layout().to_json(), **changes})
    with pytest.raises(jf.FabricError, match="peer sent"):
        jf.kv.PageLayout.from_json([])


# --- Plans -------------------------------------------------------------------


@st.composite
def transfers(draw: Any) -> dict[str, Any]:
    """Two layouts, ranges of tokens, and the pages of a request on both sides."""
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    tp = [n for n in (1, 2, 3, 4, 6, 8) if heads % n == 0 or n % heads == 0]
    order = [*draw(st.permutations(DIMS[:-1])), DIMS[-1]]
    same = {
        "heads": heads,
        "layers": draw(st.integers(1, 3)),
        "caches": draw(st.integers(1, 2)),
        "head_size": draw(st.integers(1, 3)),
        "dtype": draw(st.sampled_from(["uint8", "float16", "bfloat16"])),
        "order": tuple(order),
    }
    num_tokens = draw(st.integers(1, 30))
    cuts = sorted(draw(st.sets(st.integers(1, num_tokens), max_size=3)) | {num_tokens})
    case: dict[str, Any] = {"num_tokens": num_tokens, "cuts": [0, *cuts]}
    for side in ("sender", "receiver"):
        page_tokens = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
        needed = -(-num_tokens // page_tokens)
        pages = needed + draw(st.integers(0, 3))
        case[side] = [
            layout(
                **same, page_tokens=page_tokens, pages=pages, tp_size=size, tp_rank=rank
            )
            for size in [draw(st.sampled_from(tp))]
            for rank in range(size)
        ]
        case[f"{side}_pages"] = draw(st.permutations(range(pages)))[:needed]
    return case


@settings(max_examples=150, deadline=None)
@given(transfers())
def test_plans_move_what_reshaping_whole_caches_moves(case: dict[str, Any]) -> None:
    num_tokens, cuts = case["num_tokens"], case["cuts"]
    cache = content(case["sender"][0], num_tokens, 0)
    pools = []
    for sender in case["sender"]:
        pools.append(np.zeros(sender.shape, sender.numpy_dtype))
        fill(pools[-1], sender, case["sender_pages"], cache)
    sending: set[int] = set()
    for receiver in case["receiver"]:
        pool = np.zeros(receiver.shape, receiver.numpy_dtype)
        poison_pages(pool, receiver, range(receiver.pages))
        written = np.zeros(receiver.nbytes, np.uint8)
        ranks = jf.kv.source_ranks(len(pools), receiver)
        sending.update(ranks)
        for rank, sender in enumerate(case["sender"]):
            if rank not in ranks:
                why = "none in common|same heads as others"
                with pytest.raises(jf.PlanMismatchError, match=why):
                    jf.kv.check_bridge(sender, receiver)
                continue
            jf.kv.check_bridge(sender, receiver)
            for layers, tokens in itertools.product(
                ([0], list(range(1, receiver.layers))), itertools.pairwise(cuts)
            ):
                copies = jf.kv.plan_copies(
                    *(sender, receiver, layers),
                    *(case["sender_pages"], case["receiver_pages"]),
                    *(num_tokens, tokens),
                )
                span = np.arange(copies.nbytes)
                source = (copies.source[:, None] + span).ravel()
                target = (copies.target[:, None] + span).ravel()
                flat = pools[rank].reshape(-1).view(np.uint8)
                pool.reshape(-1).view(np.uint8)[target] = flat[source]
                np.add.at(written, target, 1)
        heads = receiver.local_heads
        np.testing.assert_array_equal(
            taken(pool, receiver, case["receiver_pages"], num_tokens),
            cache[:, :, :, heads.start : heads.stop],
        )
        assert written.max() == 1  # two writes have no order between them
        others = set(range(receiver.pages)) - set(case["receiver_pages"])
        assert is_poison(pool, receiver, sorted(others))
    if len(case["receiver"]) >= len(pools):
        assert len(sending) == len(pools)  # of replicas, none is idle


def test_what_follows_on_both_sides_is_one_copy() -> None:
    a = layout()
    same = jf.kv.plan_copies(a, a, [1], [0, 1], [2, 3], 8)
    page = a.nbytes // a.layers // a.pages
    assert (same.nbytes, len(same.source)) == (page, 2)
    half = layout(tp_size=2, tp_rank=1)
    split = jf.kv.plan_copies(a, half, [1], [0, 1], [2, 3], 8)
    assert (split.nbytes, len(split.source)) == (2 * 8 * 4, 2 * 2 * 4)
    smaller = layout(page_tokens=2, pages=48)
    cut = jf.kv.plan_copies(a, smaller, [1], [0, 1], [2, 3, 4, 5], 8)
    assert (cut.nbytes, len(cut.source)) == (2 * 4 * 8 * 4, 2 * 4)
    heads_first = ("layers", "pages", "caches", "heads", "page_tokens", "head_size")
    a, half = layout(order=heads_first), layout(order=heads_first, tp_size=2)
    split = jf.kv.plan_copies(a, half, [1], [0, 1], [2, 3], 8)
    assert (split.nbytes, len(split.source)) == (2 * 4 * 8 * 4, 2 * 2)


def test_what_no_plan_bridges_is_refused_with_both_values() -> None:
    for name, value in (
        ("model", "other"),
        ("dtype", "bfloat16"),
        ("layers", 5),
        ("heads", 8),
        ("head_size", 16),
        ("caches", 1),
        ("order", (*DIMS[:3], "heads", "page_tokens", "head_size")),
    ):
        other = layout(**{name: value})
        with pytest.raises(jf.PlanMismatchError) as caught:
            jf.kv.check_bridge(layout(), other)
        text = str(caught.value)
        assert name in text
        assert repr(value) in text
        assert repr(getattr(layout(), name)) in text
    jf.kv.check_bridge(layout(), layout(pages=9, page_tokens=3, tp_size=2))


def test_bad_arguments_of_a_plan_are_refused() -> None:
    a = layout()
    for layers, ours, theirs, tokens, match in (
        ([3], [0], [0], None, "layers"),
        ([0], [0, 1], [0], None, "4 tokens need 1 pages of 4 at the sender, got 2"),
        ([0], [0], [], None, "at the receiver, got 0"),
        ([0], [24], [0], None, "pages of the sender"),
        ([0], [0], [-1], None, "pages of the receiver"),
        ([0], [0], [0], (3, 2), "tokens 3 to 2"),
        ([0], [0], [0], (0, 5), "tokens 0 to 5"),
    ):
        with pytest.raises(ValueError, match=match):
            jf.kv.plan_copies(a, a, layers, ours, theirs, 4, tokens)


# --- The life cycle ----------------------------------------------------------


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(Event))
def test_each_pair_of_state_and_event(state: State, event: Event) -> None:
    legal = {
        (State.WAITING, Event.GRANTED): State.MOVING,
        (State.WAITING, Event.FAIL): State.RELEASED,
        (State.MOVING, Event.ALL_HERE): State.COMPLETE,
        (State.MOVING, Event.FAIL): State.DRAINING,
        (State.DRAINING, Event.QUIET): State.RELEASED,
        (State.COMPLETE, Event.RELEASE): State.RELEASED,
    }
    if (state, event) in legal:
        assert advance(state, event) is legal[state, event]
    else:
        with pytest.raises(ValueError, match=f"{state.value} cannot {event.value}"):
            advance(state, event)


def test_every_life_ends_and_drains_before_its_pages_are_free() -> None:
    after = {
        state: {to for (at, _), to in TRANSITIONS.items() if at is state}
        for state in State
    }
    assert after[State.RELEASED] == set()
    assert all(after[state] for state in State if state is not State.RELEASED)
    # While pages move, there is no way around DRAINING but by their arrival.
    assert after[State.MOVING] == {State.COMPLETE, State.DRAINING}


# --- What is given out -------------------------------------------------------


def test_pages_are_given_out_once_and_freed_once() -> None:
    pages = FreeList("pages", 4)
    first = pages.take(3)
    assert first == (0, 1, 2)
    with pytest.raises(jf.CapacityError, match="2 pages are wanted, and 1 of 4"):
        pages.take(2)
    assert pages.free == 1
    pages.give(first[:1])
    assert pages.take(2) == (3, 0)
    with pytest.raises(ValueError, match="pages: 1 was freed twice"):
        pages.give([1, 1])


def test_ids_do_not_collide_and_bad_ones_are_not_used_again() -> None:
    ids = IdPairs(100, 107)
    assert [ids.take() for _ in range(3)] == [100, 102, 104]
    with pytest.raises(jf.CapacityError, match="all ids"):
        ids.take()
    ids.give(102, clean=False)
    ids.give(104, clean=True)
    assert ids.take() == 104
    ids.give(104, clean=True)
    assert ids.take() == 104
    default = IdPairs()
    assert default.take() >= 1 << 26


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"3",
        b"{}",
        b'{"kind":[]}',
        b'{"kind":"never"}',
        b'{"kind":"bye","more":1}',
        b'{"kind":"open","leg":1,"request":2}',
        b'{"kind":"open","leg":1,"request":-1,"tokens":1}',
        b'{"kind":"open","leg":true,"request":1,"tokens":1}',
        b'{"kind":"open","leg":1,"request":18446744073709551616,"tokens":1}',
        b'{"kind":"grant","leg":1,"pages":[0.5],"id":1,"slot":0}',
        b'{"kind":"refuse","why":3}',
        b"[" * 100_000,
    ],
)
def test_messages_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(jf.FabricError, match="a peer sent"):
        _frames.decode(data)


def test_messages_survive_their_journey() -> None:
    data = _frames.encode("cancel", leg=1 << 63, why="x" * 9999)
    kind, fields = _frames.decode(data)
    assert kind == "cancel"
    assert fields == {"leg": 1 << 63, "why": "x" * 4096}
