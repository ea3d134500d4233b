"""Who sends what several ranks hold: all of them as many bytes, up to one part."""

from __future__ import annotations

import collections
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weights_plan import assert_arrived, carried_out, leaf, tree
from transfer_cases import PATIENCE_S
from weights_cases import assert_tiles, jobs, mesh, two_layouts, whole_arrays

from jaxfabric.weights import LeafLayout, MeshLayout, Plan, TreeLayout, _copies, plan
from jaxfabric.weights._quantise import quantise
from jaxfabric.weights._replicas import shares
from jaxfabric.weights._tiles import tiles_of

MIB = 1 << 20
PART = 4 * MIB  # more is shared


def sent(made: Plan) -> dict[int, int]:
    """Bytes that each source rank sends."""
    found = dict.fromkeys(made.source.ranks, 0)
    for (rank, _), nbytes in made.loads().items():
        found[rank] += nbytes
    return found


def small_parts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_copies, "_WHOLE_BYTES_MAX", 128)


# As flax names the layers of a scanned transformer: biases sort before kernels.
STACKED = {
    "attn.bias": (32, 3072),
    "attn.kernel": (32, 1024, 3072),
    "mlp.bias": (32, 4096),
    "mlp.kernel": (32, 1024, 4096),
    "norm.bias": (32, 1024),
    "out.kernel": (32, 4096, 1024),
}
UNALIKE = {
    f"layers.{i}.{name}": shape
    for i in range(6)
    for name, shape in (("kernel", (4096 + i, 1024)), ("z_bias", (1024 + i,)))
}


@pytest.mark.parametrize("shapes", [STACKED, UNALIKE, {"embed": (151_936, 1024)}])
@pytest.mark.parametrize("replicas", [2, 3, 8])
@pytest.mark.parametrize("targets", [1, 2])
def test_trees_of_few_kinds_are_shared_by_bytes(
    shapes: dict[str, tuple[int, ...]], replicas: int, targets: int
) -> None:
    leaves = [leaf(name, shape) for name, shape in shapes.items()]
    made = plan(tree(mesh(replicas), *leaves), tree(mesh(targets), *leaves))
    loads = sent(made)
    mean = sum(loads.values()) / replicas
    assert max(loads.values()) <= mean + PART
    assert sum(loads.values()) == targets * made.target.nbytes


@pytest.mark.parametrize("replicas", [2, 8])
def test_replicas_of_shards_share_those(replicas: int) -> None:
    cut = [leaf(n, s, *[""] * (len(s) - 1), "b") for n, s in STACKED.items()]
    to = [leaf(n, s, *[""] * (len(s) - 1), "a") for n, s in STACKED.items()]
    made = plan(tree(mesh(replicas, 2), *cut), tree(mesh(2), *to))
    loads = sent(made)
    assert max(loads.values()) <= made.target.nbytes / len(loads) + PART


def test_a_rank_that_alone_has_something_sends_less_of_the_rest() -> None:
    alone = MeshLayout((), (0,))
    shared = MeshLayout((("a", 4),), (0, 1, 2, 3))
    source = TreeLayout(
        (alone, shared),
        (
            LeafLayout("shared", (8192, 1024), "float32", 1, ((), ())),
            LeafLayout("z", (2048, 1024), "float32", 0, ((), ())),
        ),
    )
    target = tree(mesh(1), leaf("shared", (8192, 1024)), leaf("z", (2048, 1024)))
    made = plan(source, target)
    loads = sent(made)
    assert max(loads.values()) <= 10 * MIB + PART
    assert sum(loads.values()) == 40 * MIB


@given(
    loads=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    count=st.integers(0, 40),
    nbytes=st.integers(1, 20),
)
def test_parts_go_to_who_has_least(loads: list[int], count: int, nbytes: int) -> None:
    """As if they went one by one."""
    wanted = [0] * len(loads)
    so_far = list(loads)
    for _ in range(count):
        least = min(range(len(loads)), key=so_far.__getitem__)
        wanted[least] += 1
        so_far[least] += nbytes
    found = shares(loads, count, nbytes)
    assert sum(found) == count
    ends = [load + n * nbytes for load, n in zip(loads, found, strict=True)]
    assert sorted(ends) == sorted(so_far)  # who is first of equals may differ
    assert found == shares(loads, count, nbytes)


@given(layouts=two_layouts(), seed=st.integers(0, 1000), small=st.booleans())
@settings(max_examples=100, deadline=None)
def test_nobody_could_leave_more_than_a_part_to_another(
    layouts: Any, seed: int, small: bool
) -> None:
    """And what is cut for replicas arrives, each element once."""
    with pytest.MonkeyPatch.context() as patch:
        if small:
            small_parts(patch)
        source, target = layouts
        made = plan(source, target)
        loads = sent(made)
        for rank, load in loads.items():
            largest: collections.Counter[tuple[int, ...]] = collections.Counter()
            for buckets in made.sends(rank).values():
                for move in (move for bucket in buckets for move in bucket.moves):
                    ours = source.leaves[made.links[move.link].source]
                    holders = tiles_of(source, ours).holders[move.source_tile]
                    largest[holders] = max(largest[holders], move.nbytes)
            could = [
                min(loads[other] for other in holders) + nbytes
                for holders, nbytes in largest.items()
                if len(holders) > 1
            ]
            assert not could or load <= max(could)
        arrays = whole_arrays(source, seed)
        assert_arrived(made, arrays, carried_out(made, arrays))


def test_blocks_that_are_shared_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    source = tree(mesh(3), leaf("w", (2, 640, 256)))
    target = tree(
        mesh(1),
        leaf("w", (2, 640, 256), dtype="float8_e4m3fn"),
        leaf("w_s", (2, 5, 2)),
    )
    small_parts(monkeypatch)
    monkeypatch.setattr(_copies, "_PARTS_MAX", 1)
    arrays = whole_arrays(source)
    payload, scales = quantise(arrays["w"])
    made = plan(source, target, scales="{}_s")
    assert_arrived(made, {"w": payload, "w_s": scales}, carried_out(made, arrays))
    assert min(sent(made).values()) > 0


def test_replicas_push_their_shares() -> None:
    """Two of them, each about half of a leaf; all of it arrives."""
    leaves = (leaf("a", (64,)), leaf("w", (3072, 1024)))
    source, target = tree(mesh(2), *leaves), tree(mesh(1), *leaves)
    arrays = whole_arrays(source)
    with jobs("shm", source, target) as both:
        pushes = both.push(arrays, 1)
        for push in pushes:
            push.wait(PATIENCE_S)
        for taken in both.take(1).values():
            assert_tiles(target, arrays, taken.params)
        sizes = [push.progress()[1] for push in pushes]
    assert sum(sizes) >= target.nbytes
    assert max(sizes) - min(sizes) <= PART


def test_many_leaves_of_replicas_are_planned_in_seconds() -> None:
    names = [f"{layer}.{i}" for layer in range(64) for i in range(250)]
    source = tree(mesh(8, 32), *(leaf(name, (256, 32), "b") for name in names))
    target = tree(mesh(16, 8), *(leaf(name, (256, 32), "a") for name in names))
    begin = time.monotonic()
    made = plan(source, target)
    loads = sent(made)
    took = time.monotonic() - begin
    assert set(loads.values()) == {16_000 * 256 * 32 * 4 * 8 // 256}
    assert took < 15
