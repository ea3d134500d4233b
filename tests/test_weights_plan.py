"""Plans of jf.weights: pure functions, checked against whole arrays."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import time
import zlib
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_cases import (
    E4M3,
    Arrays,
    assert_tiles,
    mesh,
    poisoned,
    tile,
    two_layouts,
    whole_arrays,
)

import jaxfabric as jf
from jaxfabric.weights import (
    LeafLayout,
    MeshLayout,
    Place,
    Plan,
    Rates,
    Split,
    TreeLayout,
    _plan,
    estimate,
    plan,
)
from jaxfabric.weights._buckets import Bucket, bucket_size, largest
from jaxfabric.weights._match import check_cover
from jaxfabric.weights._pack import Tile, pack, unpack
from jaxfabric.weights._quantise import quantise
from jaxfabric.weights._tiles import TilesByKey, empty_tiles

MIB = 1 << 20


def leaf(name: str, shape: tuple[int, ...], *spec: str, dtype: str = "float32") -> Any:
    """On mesh 0, cut by at most one axis in each dimension ('' for none)."""
    padded = (*spec, *[""] * (len(shape) - len(spec)))
    cut = tuple((axis,) if axis else () for axis in padded)
    return LeafLayout(name, shape, dtype, 0, cut)


def tree(on: MeshLayout, *leaves: LeafLayout) -> TreeLayout:
    return TreeLayout((on,), leaves)


def carried_out(made: Plan, arrays: Arrays) -> dict[int, Any]:
    """Runs a plan in memory: the tiles of each target rank."""
    result = {rank: poisoned(made, rank) for rank in made.target.ranks}
    arrived = {rank: made.receives(rank) for rank in made.target.ranks}
    sent: collections.Counter[tuple[int, int]] = collections.Counter()
    for source in made.source.ranks:
        for target, buckets in made.sends(source).items():
            assert arrived[target].pop(source) == buckets
            for bucket in buckets:
                assert 0 < bucket.nbytes <= made.bucket_bytes
                data = np.full(bucket.nbytes, 0xEE, np.uint8)
                pack(made, bucket, lambda n, t: tile(made.source, n, t, arrays), data)
                unpack(made, bucket, tiles_at(result[target]), data)
                sent[source, target] += sum(move.nbytes for move in bucket.moves)
    assert not any(arrived.values())
    assert sent == made.loads()
    return result


def tiles_at(tiles: TilesByKey) -> Tile:
    return lambda leaf, which: tiles[leaf, which]


def assert_arrived(made: Plan, arrays: Arrays, result: dict[int, Any]) -> None:
    for tiles in result.values():
        assert_tiles(made.target, arrays, tiles)


@given(layouts=two_layouts(), seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_each_rank_gets_its_part(layouts: Any, seed: int) -> None:
    source, target = layouts
    made = plan(source, target)
    arrays = whole_arrays(source, seed)
    assert_arrived(made, arrays, carried_out(made, arrays))
    again = Plan.from_bytes(made.to_bytes())
    assert again == made
    assert again.digest == made.digest
    assert again.summary() == made.summary()


def test_boxes_larger_than_a_bucket_are_cut() -> None:
    source = tree(mesh(2), leaf("w", (1024, 1024), "a"), leaf("b", (3, 5)))
    target = tree(mesh(3), leaf("w", (1024, 1024)), leaf("b", (3, 5)))
    made = plan(source, target, bucket_bytes=256 << 10)
    arrays = whole_arrays(source)
    assert_arrived(made, arrays, carried_out(made, arrays))
    assert min(len(b) for b in made.sends(0).values()) >= 8


def test_replicas_share_the_work() -> None:
    source = tree(mesh(4, 2), *(leaf(f"w{i}", (64, 8), "b") for i in range(8)))
    target = tree(mesh(2), *(leaf(f"w{i}", (64, 8), "a") for i in range(8)))
    loads = plan(source, target).loads()
    sent = [sum(n for (s, _), n in loads.items() if s == rank) for rank in range(8)]
    assert sent == [8 * 64 * 8 * 4 // 8] * 8


def test_replicas_share_one_leaf_too() -> None:
    source = tree(mesh(4, 2), leaf("w", (64, 8), "b"))
    target = tree(mesh(8), leaf("w", (64, 8), "a"))
    loads = plan(source, target).loads()
    assert sorted(sender for sender, _ in loads) == list(range(8))


@given(layouts=two_layouts())
@settings(max_examples=50, deadline=None)
def test_nobody_sends_what_nobody_needs(layouts: Any) -> None:
    source, target = layouts
    loads = plan(source, target).loads()
    received: collections.Counter[int] = collections.Counter()
    for (_, rank), nbytes in loads.items():
        received[rank] += nbytes
    made = plan(source, target)
    for rank in target.ranks:
        held = sum(values.nbytes for values in poisoned(made, rank).values())
        assert received[rank] == held


# --- Other names and other pieces ------------------------------------------------


def test_experts_are_stacked_and_split() -> None:
    one = [leaf(f"experts.{i}.w", (8, 6), "a") for i in range(4)]
    separate = tree(mesh(2), *one)
    stacked = tree(mesh(4), leaf("w", (4, 8, 6), "a"))
    arrays = whole_arrays(separate)
    whole = {"w": np.stack([arrays[f"experts.{i}.w"] for i in range(4)])}
    into = {f"experts.{i}.w": Place("w", index=i) for i in range(4)}
    made = plan(separate, stacked, rename=into)
    assert_arrived(made, whole, carried_out(made, arrays))
    back = plan(stacked, separate, rename=lambda name: Split("experts.{}.w"))
    assert_arrived(back, arrays, carried_out(back, whole))


def test_halves_are_fused() -> None:
    source = tree(mesh(2), leaf("gate", (6, 8), "", "a"), leaf("up", (6, 8), "a"))
    target = tree(mesh(4), leaf("gate_up", (6, 16), "", "a"))
    arrays = whole_arrays(source)
    whole = {"gate_up": np.concatenate([arrays["gate"], arrays["up"]], axis=1)}
    into = {
        "gate": Place("gate_up", start=(0, 0)),
        "up": Place("gate_up", start=(0, 8)),
    }
    made = plan(source, target, rename=into)
    assert_arrived(made, whole, carried_out(made, arrays))


def test_dtypes_are_rounded_once() -> None:
    source = tree(mesh(2), leaf("w", (8, 8), "a"))
    target = tree(mesh(1), leaf("w", (8, 8), dtype="bfloat16"))
    arrays = whole_arrays(source)
    with pytest.raises(jf.PlanMismatchError, match=r"w is float32 .* w is bfloat16"):
        plan(source, target)
    made = plan(source, target, cast=True)
    whole = {"w": arrays["w"].astype("bfloat16")}
    assert_arrived(made, whole, carried_out(made, arrays))


def test_wide_leaves_are_quantised_in_buckets() -> None:
    source = tree(mesh(1), leaf("w", (128, 8192)))
    target = tree(
        mesh(1), leaf("w", (128, 8192), dtype="float8_e4m3fn"), leaf("w_s", (1, 64))
    )
    arrays = whole_arrays(source)
    payload, scales = quantise(arrays["w"])
    made = plan(source, target, scales="{}_s", bucket_bytes=256 << 10)
    assert_arrived(made, {"w": payload, "w_s": scales}, carried_out(made, arrays))


@pytest.mark.parametrize("bucket_bytes", [256 << 10, 8 * MIB])
def test_blocks_are_quantised(bucket_bytes: int) -> None:
    source = tree(mesh(2, 2), leaf("w", (3, 512, 768), "", "a", "b"))
    target = tree(
        mesh(3),
        leaf("w", (3, 512, 768), "a", dtype="float8_e4m3fn"),
        leaf("w_scale_inv", (3, 4, 6), "a"),
    )
    arrays = whole_arrays(source)
    arrays["w"][0, 3, 5], arrays["w"][1, :128, :128] = np.inf, 0
    payload, scales = quantise(arrays["w"])
    made = plan(source, target, scales="{}_scale_inv", bucket_bytes=bucket_bytes)
    whole = {"w": payload, "w_scale_inv": scales}
    assert_arrived(made, whole, carried_out(made, arrays))
    finite = np.isfinite(scales).repeat(128, 1).repeat(128, 2)
    near = payload.astype(np.float32) * scales.repeat(128, 1).repeat(128, 2)
    error = np.abs(near - arrays["w"])[finite]
    assert payload.dtype == E4M3
    assert error.max() <= 101 * 2.0**-4  # half of the last of three bits
    assert not finite[0, :128, :128].any()
    assert finite[0, 128:].all()


# --- What is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "options", "match"),
    [
        ([leaf("v", (8, 8))], {}, "w becomes v|w, which the target does not have"),
        ([leaf("w", (8, 9))], {}, r"w has shape \(8, 8\).*\(8, 9\)"),
        ([leaf("w", (8, 8)), leaf("v", (2,))], {}, r"nothing fills \(all of\) v"),
        (
            [leaf("w", (16, 8))],
            {"rename": {"w": Place("w", start=(4, 0))}},
            r"nothing fills \(all of\) w",
        ),
        (
            [leaf("w", (16, 8))],
            {"rename": {"w": Place("w", start=(9, 0))}},
            "w has shape",
        ),
        ([leaf("w", (8, 8), dtype="int8")], {}, "cast=True"),
        ([leaf("w", (8, 8))], {"rename": {"w": 3}}, "cannot become 3"),
        (
            [leaf("w", (8, 8), dtype="float8_e4m3fn"), leaf("w_s", (2, 1))],
            {"scales": "{}_s"},
            r"blocks of 128x128 need \(1, 1\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    target: list[LeafLayout], options: dict[str, Any], match: str
) -> None:
    source = tree(mesh(2), leaf("w", (8, 8), "a"))
    with pytest.raises(jf.PlanMismatchError, match=match):
        plan(source, tree(mesh(1), *target), **options)


def test_a_leaf_that_is_filled_twice_is_refused() -> None:
    source = tree(mesh(1), leaf("w", (8, 8)), leaf("v", (8, 8)))
    target = tree(mesh(1), leaf("w", (16, 8)))
    into = {"w": Place("w", start=(0, 0)), "v": Place("w", start=(7, 0))}
    with pytest.raises(jf.PlanMismatchError, match="w would be filled twice"):
        plan(source, target, rename=into)


def test_blocks_that_are_cut_through_are_refused() -> None:
    source = tree(mesh(2), leaf("w", (128, 128), "a"))
    target = tree(
        mesh(1),
        leaf("w", (128, 128), dtype="float8_e4m3fn"),
        leaf("w_s", (1, 1)),
    )
    with pytest.raises(jf.PlanMismatchError, match=r"w of shape .* through blocks"):
        plan(source, target, scales="{}_s")


@pytest.mark.parametrize(
    "data", [b"", b"x" * 40, (8).to_bytes(8, "little") + b"abc", b"\xff" * 24]
)
def test_bytes_that_are_no_plan_are_refused(data: bytes) -> None:
    with pytest.raises(jf.FabricError, match=r"no plan|no tree"):
        Plan.from_bytes(data)
    with pytest.raises(jf.FabricError, match="no tree"):
        TreeLayout.from_bytes(data)


def test_a_plan_of_another_format_is_refused() -> None:
    """Its ranks would send, and wait for, other parts."""
    layout = tree(mesh(1), leaf("w", (8, 8)))
    data = plan(layout, layout).to_bytes()
    for spoilt, match in (
        (data[:7] + b"\x03" + data[8:], "format is 3, and 2 is expected"),
        (data[8:], "do not begin as one of this version"),
        (layout.to_bytes(), "do not begin as one of this version"),
        (data[:7], "do not begin as one of this version"),
        (data[:-1], "it is cut off"),
    ):
        with pytest.raises(jf.FabricError, match=match):
            Plan.from_bytes(spoilt)


def test_how_a_plan_is_carried_out_belongs_to_its_format() -> None:
    """Both jobs compute who sends what, in which buckets: they must do it alike.

    If this digest changes, so must `_plan._FORMAT`, which tells two of them apart.
    """
    source = tree(
        mesh(3, 2),
        leaf("w", (1024, 1536), "b"),
        leaf("v", (6, 1280, 1024), "", "b", dtype="bfloat16"),
        *(leaf(f"n{i}", (48,)) for i in range(5)),
    )
    target = tree(
        mesh(4),
        leaf("w", (1024, 1536), "", "a"),
        leaf("v", (6, 1280, 1024), dtype="float8_e4m3fn"),
        leaf("v_s", (6, 10, 8)),
        *(leaf(f"n{i}", (48,), "a") for i in range(5)),
    )
    made = plan(source, target, scales="{}_s", bucket_bytes=1 * MIB)
    told = [
        [sorted(made.sends(rank).items()) for rank in source.ranks],
        [bucket_size(1 << 28, 32 * MIB, ranks) for ranks in (1, 64, 65, 1000)],
    ]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    assert (_plan._FORMAT, digest[:16]) == (2, "84bce3f5fbb8f1af")


NUMBERS: tuple[Any, ...] = (-1, 0, 1, 2, 7, 128, 1 << 16, (1 << 39) + 1, 1 << 70)
OTHERS: tuple[Any, ...] = (None, True, 1.5, "a", "", [], {}, [1, [2]])


@st.composite
def spoilt(draw: st.DrawFn, value: Any) -> Any:
    """A document of JSON in which something is changed, left out, or there twice."""
    if isinstance(value, list) and value and draw(st.integers(0, 7)):
        place = draw(st.integers(0, len(value) - 1))
        changed = draw(st.sampled_from(["inside", "inside", "gone", "twice"]))
        copies = {"inside": 1, "gone": 0, "twice": 2}[changed]
        one = draw(spoilt(value[place])) if copies == 1 else value[place]
        return value[:place] + [one] * copies + value[place + 1 :]
    return draw(st.sampled_from(NUMBERS + OTHERS))


def packed(*documents: Any) -> bytes:
    """As `Plan.to_bytes` does it."""
    parts = [zlib.compress(json.dumps(one).encode()) for one in documents]
    begin = _plan._MAGIC + bytes([_plan._FORMAT])
    return begin + b"".join(len(part).to_bytes(8, "little") + part for part in parts)


@given(data=st.data(), flips=st.lists(st.integers(0, 1 << 20), max_size=4))
@settings(max_examples=150, deadline=5000)
def test_bytes_of_a_hostile_peer_are_refused_or_make_sense(
    data: Any, flips: list[int]
) -> None:
    """What a plan from anywhere says, stays within the layouts that it says."""
    source = tree(mesh(2), leaf("w", (4, 256, 256), "a"), leaf("v", (4, 4)))
    target = tree(
        mesh(2),
        leaf("w", (4, 256, 256), "a", dtype="float8_e4m3fn"),
        leaf("w_s", (4, 2, 2), "a"),
        leaf("v", (4, 4), "a"),
    )
    made = plan(source, target, scales="{}_s")
    documents = [
        json.loads(zlib.decompress(one)) for one in _plan._split(made.to_bytes())
    ]
    which = data.draw(st.integers(0, 2))
    documents[which] = data.draw(spoilt(documents[which]))
    sent = bytearray(packed(*documents))
    for flip in flips[2:]:  # mostly none
        sent[flip % len(sent)] ^= 1 << flip % 8
    try:
        read = Plan.from_bytes(bytes(sent))
        check_cover(read.target, read.links)
    except jf.FabricError:
        return
    for rank in read.target.ranks[:4]:
        tiles = empty_tiles(read.target, rank)
        for buckets in read.receives(rank).values():
            for bucket in buckets:
                assert bucket.nbytes <= read.bucket_bytes
                unpack(read, bucket, tiles_at(tiles), np.zeros(bucket.nbytes, np.uint8))


# --- Layouts -------------------------------------------------------------------------


def test_a_layout_is_that_of_the_arrays() -> None:
    devices = np.asarray(jax.devices()[:1]).reshape(1, 1)
    on = jax.sharding.Mesh(devices, ("data", "model"))
    spec = jax.sharding.PartitionSpec(None, ("data", "model"))
    sharding = jax.sharding.NamedSharding(on, spec)
    params = {
        "layers": [{"w": jax.device_put(np.zeros((2, 4), np.float32), sharding)}],
        "scale": np.zeros(3, np.float32),
    }
    made = TreeLayout.of(params)
    assert [one.name for one in made.leaves] == ["layers.0.w", "scale"]
    assert made.leaves[0].spec == ((), ("data", "model"))
    assert made.ranks == (0,)
    assert TreeLayout.from_bytes(made.to_bytes()) == made


def test_a_layout_may_have_no_devices() -> None:
    on = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    spec = jax.sharding.PartitionSpec("model")
    sharding = jax.sharding.NamedSharding(on, spec)
    params = {"w": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=sharding)}
    made = TreeLayout.of(params, ranks=range(8))
    assert made.ranks == tuple(range(8))
    with pytest.raises(ValueError, match="AbstractMesh"):
        TreeLayout.of(params)


@pytest.mark.parametrize(
    ("on", "bad", "match"),
    [
        (mesh(2), leaf("w", (3,), "a"), "cannot be cut into 2 equal parts"),
        (mesh(2), leaf("w", (4,), "b"), "has the axes"),
        (mesh(2), leaf("w", (4, 4), "a", "a"), "has the axes"),
        (mesh(2), leaf("w", (4,), dtype="O"), "none of numbers"),
        (mesh(2), leaf("w", (0,)), "has shape"),
        (MeshLayout((("a", 2),), (0,)), leaf("w", (4,)), "2 positions, and 1 ranks"),
    ],
)
def test_bad_layouts_are_refused(on: MeshLayout, bad: LeafLayout, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tree(on, bad)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"a": {"rate": 1.0}}, "a.rate is of type float, and no array"),
        ({"a": jax.random.key(0)}, "a has keys of random numbers"),
        ({"a": np.zeros((0, 4))}, r"a has shape \(0, 4\), no elements"),
        ({"a": {"b": np.zeros(1)}, "a.b": np.zeros(1)}, "the same name, a.b"),
        ({"a": np.zeros(2, "i4,f4")}, "a has dtype 'void64'"),
    ],
)
def test_leaves_that_cannot_travel_are_named(params: Any, match: str) -> None:
    with pytest.raises(ValueError, match=f"TreeLayout: .*{match}"):
        TreeLayout.of(params)


def test_sums_that_are_not_made_yet_are_refused_by_name() -> None:
    on = jax.sharding.AbstractMesh(
        (2,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,)
    )
    spec = jax.sharding.PartitionSpec(None, unreduced={"a"})
    sharding = jax.sharding.NamedSharding(on, spec)
    params = {"w": jax.ShapeDtypeStruct((4,), np.float32, sharding=sharding)}
    with pytest.raises(ValueError, match=r"TreeLayout: w has .* reduce it before"):
        TreeLayout.of(params, ranks=range(2))


# --- Size ----------------------------------------------------------------------------


def test_many_leaves_are_planned_in_seconds() -> None:
    """64,000 leaves of 61 layers: planning depends on how many kinds there are."""
    names = [f"{layer}.{i}" for layer in range(64) for i in range(1000)]
    source = tree(mesh(8, 32), *(leaf(n, (256, 32), "b", "a") for n in names))
    target = tree(mesh(16, 8), *(leaf(n, (256, 32), "a") for n in names))
    begin = time.monotonic()
    made = plan(source, target)
    loads = made.loads()
    took = time.monotonic() - begin
    assert sum(loads.values()) == 64000 * math.prod((256, 32)) * 4 * 8
    assert max(loads.values()) <= 1.01 * min(loads.values())
    assert took < 60


def test_an_estimate_is_that_of_the_busiest_rank() -> None:
    source = tree(mesh(2), leaf("w", (1024, 1024), "a"))
    target = tree(mesh(4), leaf("w", (1024, 1024), "a"))
    made = plan(source, target, bucket_bytes=1 << 20)
    rates = Rates(link=1e9, write_s=1e-3, device_to_host=4e9, memory=8e9)
    found = estimate(made, rates)
    assert (found.sent, found.received) == (2 * MIB, MIB)
    assert (found.nbytes, found.writes) == (4 * MIB, 2)
    assert found.link_s == pytest.approx(2 * MIB / 1e9 + 2e-3)
    assert found.copy_s == pytest.approx(2 * MIB / 4e9)
    assert found.pack_s == pytest.approx(2 * 2 * MIB / 8e9)
    assert found.unpack_s == pytest.approx(2 * MIB / 8e9)
    assert found.total_s == found.link_s
    assert found.quantised == found.quantise_s == 0


def test_an_estimate_counts_what_is_quantised() -> None:
    """For each of the ranks that need it, and no more than that."""
    source = tree(mesh(2), leaf("v", (1024, 1024), "a"), leaf("w", (1024, 1024), "a"))
    target = tree(
        mesh(2),
        leaf("v", (1024, 1024)),
        leaf("w", (1024, 1024), dtype="float8_e4m3fn"),
        leaf("w_s", (8, 8)),
    )
    made = plan(source, target, scales="{}_s")
    assert made.loads(quantised=True) == dict.fromkeys(made.loads(), MIB // 2)
    found = estimate(made, Rates(memory=8e9, quantise=1e8))
    assert (found.sent, found.quantised) == (5 * MIB, MIB)
    assert found.quantise_s == pytest.approx(MIB / 1e8)
    assert found.pack_s == pytest.approx(2 * 5 * MIB / 8e9 + MIB / 1e8)
    assert found.total_s == found.pack_s


def test_buckets_shrink_with_what_ranks_share_and_with_their_number() -> None:
    assert bucket_size(1 << 30, 32 * MIB, 4) == 32 * MIB
    assert bucket_size(64 * MIB, 32 * MIB, 4) == 16 * MIB  # some of them overlap
    assert bucket_size(1 * MIB, 32 * MIB, 4) == 4 * MIB
    assert bucket_size(1 << 30, 32 * MIB, 256) == 8 * MIB
    assert bucket_size(1 << 30, 1 * MIB, 4) == 1 * MIB
    assert largest([]) == 0
    assert largest([Bucket((), 100), Bucket((), 64)]) == 128
