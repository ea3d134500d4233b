"""Plans between leaves of other dtypes: quantised, copied with scales, or rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_weights_plan import assert_arrived, carried_out, leaf, tree
from weights_cases import E4M3, Arrays, mesh, whole_arrays

import jaxfabric as jf
from jaxfabric.weights import LeafLayout, Place, Plan, plan
from jaxfabric.weights._dtypes import can_cast
from jaxfabric.weights._quantise import quantise

SCALES = "{}_s"
HALVES: Any = (0.5, 0.0)


def test_what_is_quantised_already_keeps_its_scales() -> None:
    """Beside what is quantised on its way: nothing is quantised twice."""
    source = tree(
        mesh(2),
        leaf("w", (256, 128), "a", dtype="bfloat16"),
        leaf("v", (256, 128), "", "a", dtype="float8_e4m3fn"),
        leaf("v_s", (2, 1), "a"),
    )
    target = tree(
        mesh(2),
        *(leaf(name, (256, 128), "a", dtype="float8_e4m3fn") for name in "wv"),
        *(leaf(name, (2, 1), "a") for name in ("w_s", "v_s")),
    )
    made = plan(source, target, scales=SCALES)
    arrays = whole_arrays(source)
    payload, scales = quantise(arrays["w"])
    wanted = {**arrays, "w": payload, "w_s": scales}
    assert_arrived(made, wanted, carried_out(made, arrays))
    assert_arrived(made, wanted, carried_out(Plan.from_bytes(made.to_bytes()), arrays))


def test_a_stack_may_be_quantised_in_part() -> None:
    """Expert 0 is bfloat16, expert 1 is e4m3 with scales; they become one leaf."""
    source = tree(
        mesh(1),
        leaf("e0", (256, 256), dtype="bfloat16"),
        leaf("e1", (256, 256), dtype="float8_e4m3fn"),
        leaf("e1_s", (2, 2)),
    )
    target = tree(
        mesh(2),
        leaf("e", (2, 256, 256), "a", dtype="float8_e4m3fn"),
        leaf("e_s", (2, 2, 2), "a"),
    )
    into = {
        "e0": Place("e", index=0),
        "e1": Place("e", index=1),
        "e1_s": Place("e_s", index=1),
    }
    arrays = whole_arrays(source)
    payload, scales = quantise(arrays["e0"])
    wanted: Arrays = {
        "e": np.stack([payload, arrays["e1"]]),
        "e_s": np.stack([scales, arrays["e1_s"]]),
    }
    made = plan(source, target, rename=into, scales=SCALES)
    assert_arrived(made, wanted, carried_out(made, arrays))
    without: Any = {**into, "e1_s": None}
    with pytest.raises(jf.PlanMismatchError, match=r"nothing fills \(all of\) e_s"):
        plan(source, target, rename=without, scales=SCALES)
    twice = {**into, "e1_s": Place("e_s", index=0)}
    with pytest.raises(
        jf.PlanMismatchError,
        match=r"e_s would be filled twice, .* the scales of e0 .* from e1_s; e0 is q",
    ):
        plan(source, target, rename=twice, scales=SCALES)


def test_scales_of_other_shapes_go_with_what_is_quantised_already() -> None:
    """One for each row, for instance: they are only copied."""
    leaves = (leaf("w", (256, 128), dtype="float8_e4m3fn"), leaf("w_s", (256, 1)))
    made = plan(tree(mesh(1), *leaves), tree(mesh(1), *leaves), scales=SCALES)
    arrays = whole_arrays(made.source)
    assert arrays["w"].dtype == E4M3
    assert_arrived(made, arrays, carried_out(made, arrays))


@pytest.mark.parametrize(
    ("source", "target", "options", "match"),
    [
        ("float32", "int8", {"cast": True}, "w is float32 .* convert it in"),
        ("float32", "bool", {"cast": True}, "convert it in"),
        ("complex64", "float32", {"cast": True}, "convert it in"),
        ("int32", "int8", {"cast": True}, "convert it in"),
        ("float8_e4m3fn", "bfloat16", {"cast": True}, "convert it in"),
        ("float32", "float8_e4m3fn", {"cast": True}, "a leaf of scales, and plan"),
        ("float32", "float8_e4m3fn", {}, "a leaf of scales, and plan"),
        (
            "float32",
            "float8_e4m3fn",
            {"cast": True, "scales": "{}_scale"},
            "whose scales would be w_scale: the target has no such leaf",
        ),
        ("float32", "float8_e4m3fn", {"scales": "{}{}"}, "has to have one {}"),
        ("float32", "bfloat16", {}, "cast=True rounds it"),
    ],
)
def test_casts_that_change_values_are_refused(
    source: str, target: str, options: dict[str, Any], match: str
) -> None:
    ours = tree(mesh(1), leaf("w", (8, 8), dtype=source))
    theirs = tree(mesh(1), leaf("w", (8, 8), dtype=target))
    with pytest.raises(jf.PlanMismatchError, match=match):
        plan(ours, theirs, **options)


def test_what_rounds_or_widens_is_cast() -> None:
    floats = ("float16", "bfloat16", "float32", "float64")
    assert all(can_cast(a, b) for a in floats for b in floats)
    assert can_cast("uint8", "int16")
    assert can_cast("int4", "int8")
    assert not can_cast("int8", "uint16")
    assert can_cast("bool", "bool")
    assert not can_cast("int8", "float32")
    assert not can_cast("float8_e5m2", "float8_e4m3fn")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_a_plan_that_quantises_twice_is_refused(dtype: str) -> None:
    """Also one that came as bytes."""
    target = tree(
        mesh(1), leaf("w", (128, 128), dtype="float8_e4m3fn"), leaf("w_s", (1, 1))
    )
    made = plan(tree(mesh(1), leaf("w", (128, 128))), target, scales=SCALES)
    spoilt = Plan(
        tree(mesh(1), leaf("w", (128, 128), dtype=dtype)),
        *(made.target, made.links, made.bucket_bytes),
    )
    with pytest.raises(jf.PlanMismatchError, match=f"w, {dtype}.* cannot be quantised"):
        Plan.from_bytes(spoilt.to_bytes())


def test_plans_with_holes_and_doubles_are_refused() -> None:
    """Whoever reads them."""
    layout = tree(mesh(2), leaf("a", (4, 4)), leaf("b", (4, 4), "a"))
    made = plan(layout, layout)
    for links, match in (
        (made.links[:1], r"nothing fills \(all of\) b"),
        ((*made.links, made.links[0]), "a would be filled twice, .* from a and .*"),
    ):
        spoilt = Plan(layout, layout, links, made.bucket_bytes)
        with pytest.raises(jf.PlanMismatchError, match=match):
            spoilt.check()
        with pytest.raises(jf.PlanMismatchError, match=match):
            Plan.from_bytes(spoilt.to_bytes())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rename": {"A": "b"}}, r"rename= has A, no leaves of the source"),
        ({"rename": lambda name: {}[name]}, r"rename= of a failed: KeyError"),
        ({"rename": {"a": Place("b", start=HALVES)}}, "starts at no numbers"),
        ({"rename": {"a": jf.weights.Split("x{y}")}}, "has to have one {}"),
    ],
)
def test_renames_that_fail_name_the_leaf(options: Any, match: str) -> None:
    source: LeafLayout = leaf("a", (4, 4))
    with pytest.raises(jf.PlanMismatchError, match=match):
        plan(tree(mesh(1), source), tree(mesh(1), leaf("b", (4, 4))), **options)


def test_sizes_and_trees_that_make_no_plan_are_refused() -> None:
    layout = tree(mesh(1), leaf("a", (4, 4)))
    with pytest.raises(ValueError, match=r"bucket_bytes=1000000\.0 is no integer"):
        plan(layout, layout, bucket_bytes=1e6)  # type: ignore[arg-type]
    empty = jf.weights.TreeLayout.of({})
    with pytest.raises(jf.PlanMismatchError, match="the target's tree has no leaves"):
        plan(layout, empty)
    with pytest.raises(jf.PlanMismatchError, match="the source's tree has no leaves"):
        plan(empty, layout)
