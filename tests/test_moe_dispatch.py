"""dispatch and combine against the contract in plain Python, bit for bit."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from moe_cases import IMPLEMENTATIONS, data, make_mesh, on_ranks, open_fabric

from jaxfabric import moe

# ranks, tokens, experts per token, experts
SHAPES = [(1, 5, 2, 4), (2, 6, 4, 4), (4, 6, 3, 8), (4, 5, 4, 4), (8, 3, 2, 16)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"expand": False, "dtype": jnp.bfloat16},
    {"expert_alignment": 8, "capacity": 5},
    {"expert_alignment": 16, "expand": False, "capacity": 1},
    {"capacity": 7, "dtype": jnp.bfloat16, "zero_tail": False},
    {"capacity": 10**6, "expert_alignment": 3, "dtype": jnp.float16},
]
D = 5
# Half of all pairs: each shape meets half of the options, and the reverse.
PAIRS = [
    pytest.param(shape, options, id="x".join(map(str, shape)) + "-" + "-".join(options))
    for i, shape in enumerate(SHAPES)
    for j, options in enumerate(OPTIONS)
    if (i + j) % 2 == 0
]


def same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes(), (actual, expected)


def check_dispatch(got: dict[str, Any], want: moe_oracle.RankOut, options: Any) -> None:
    used = len(want.tokens)
    if not options.get("zero_tail", True):
        used = int(want.group_sizes.sum())
    same_bits(got["tokens"][:used], want.tokens[:used])
    for name in ("group_sizes", "weights", "recv_count", "slot_row", "sent"):
        same_bits(got[name], getattr(want, name))
    same_bits(got["received"], want.recv_count)
    if want.row_index is not None:
        same_bits(got["row_index"], want.row_index)
    assert got["dropped_at_receiver"] == want.dropped
    assert got["dropped_at_sender"] == 0


def check_combine(y: np.ndarray, want: np.ndarray, rows: np.ndarray) -> None:
    # One rounding to the wire dtype, one of the result; eight summands at most.
    epsilon = float(jnp.finfo(rows.dtype).eps)
    scale = 8 * np.abs(rows[np.isfinite(rows)].astype(np.float64)).max(initial=1)
    np.testing.assert_allclose(
        y.astype(np.float64), want, rtol=0, atol=4 * epsilon * scale
    )


@pytest.mark.parametrize(("shape", "options"), PAIRS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_contract(implementation: str, shape: Any, options: Any) -> None:
    n, t, k, e = shape
    static = {name: v for name, v in options.items() if name != "dtype"}
    dtype = jnp.dtype(options.get("dtype", jnp.float32))
    capacity, align = options.get("capacity"), options.get("expert_alignment", 1)
    total = moe_oracle.num_rows(n, t, k, e // n, capacity, align)

    def program(x: Any, ids: Any, weights: Any, rows: Any) -> dict[str, Any]:
        d = moe.dispatch(
            *(x, ids, weights),
            axis_name="expert",
            num_experts=e,
            implementation=implementation,
            **static,
        )
        out = {"tokens": d.tokens, "group_sizes": d.group_sizes, "weights": d.weights}
        out |= {"recv_count": d.plan.recv_count, "slot_row": d.plan.slot_row}
        out |= vars(d.stats)
        if d.row_index is not None:
            out["row_index"] = d.row_index
        out["weighted"] = moe.combine(rows, d.plan)
        out["plain"] = moe.combine(rows, d.plan, weighted=False)
        return out

    mesh = make_mesh(n)
    rng = np.random.default_rng(0)
    run = on_ranks(mesh, program)
    with open_fabric(implementation, mesh):
        for kind in moe_oracle.ROUTINGS:
            x, weights = data(rng, n, t, D, k, dtype)
            ids = moe_oracle.routing(kind, rng, n, t, k, e)
            want = moe_oracle.dispatch(
                *(x, ids, weights, e),
                capacity=capacity,
                alignment=align,
                expand=options.get("expand", True),
            )
            # Combine may not look at padding or tail: they hold NaN.
            rows = np.full((n, total, D), np.nan, dtype)
            for out, mine in zip(want, rows, strict=True):
                used = [r for r, origin in enumerate(out.origin) if origin]
                mine[used] = rng.normal(size=(len(used), D)).astype(dtype)
            got = run(x, ids, weights, rows)
            for rank, out in enumerate(want):
                check_dispatch({n: v[rank] for n, v in got.items()}, out, options)
            for name in ("weighted", "plain"):
                y = moe_oracle.combine(rows, want, x.shape, weighted=name == "weighted")
                check_combine(got[name], y, rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("capacity", [None, 1, 7, 16, 31, 32])
def test_capacity_keeps_the_first(implementation: str, capacity: int | None) -> None:
    n, t, k, e = 2, 8, 2, 4
    rng = np.random.default_rng(1)
    x, weights = data(rng, n, t, 2, k)
    ids = moe_oracle.routing("one_rank", rng, n, t, k, e)
    want = moe_oracle.dispatch(x, ids, weights, e, capacity=capacity)
    mesh = make_mesh(n)

    def program(x: Any, ids: Any, weights: Any) -> Any:
        d = moe.dispatch(
            *(x, ids, weights),
            axis_name="expert",
            num_experts=e,
            capacity=capacity,
            implementation=implementation,
        )
        return d.tokens, d.stats.dropped_at_receiver

    with open_fabric(implementation, mesh):
        tokens, dropped = on_ranks(mesh, program)(x, ids, weights)
    for rank, out in enumerate(want):
        same_bits(tokens[rank], out.tokens)
        assert dropped[rank] == out.dropped
    assert (max(dropped) > 0) == (capacity is not None and capacity < n * t * k)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("sizes", "names", "axis"),
    [
        ((2, 2), ("a", "b"), ("a", "b")),
        ((2, 4), ("data", "expert"), "expert"),
        ((4, 2), ("expert", "data"), "expert"),
        ((2, 2, 2), ("a", "data", "b"), ("a", "b")),
    ],
)
@pytest.mark.parametrize("check_vma", [True, False])
def test_meshes(
    implementation: str, sizes: Any, names: Any, axis: Any, check_vma: bool
) -> None:
    """Axis tuples, and expert axes beside others, give the bits of a plain axis."""
    axes = (axis,) if isinstance(axis, str) else axis
    others = tuple(name for name in names if name not in axes)
    n = int(np.prod([sizes[names.index(a)] for a in axes]))
    groups = int(np.prod([sizes[names.index(a)] for a in others]))
    t, k, e = 4, 2, 8
    rng = np.random.default_rng(2)
    mesh = make_mesh(sizes, names)
    cases = []
    for _ in range(groups):
        x, weights = data(rng, n, t, D, k)
        cases.append((x, moe_oracle.routing("skips", rng, n, t, k, e), weights))

    def arrange(per_group: list[np.ndarray]) -> np.ndarray:
        """[group][rank] to the mesh's order of devices."""
        grid = np.stack(per_group).reshape(
            *[sizes[names.index(a)] for a in others + axes], *per_group[0].shape[1:]
        )
        order = [(others + axes).index(name) for name in names]
        order += range(len(names), grid.ndim)
        return grid.transpose(order).reshape(-1, *per_group[0].shape[1:])

    def program(x: Any, ids: Any, weights: Any) -> Any:
        d = moe.dispatch(
            *(x, ids, weights),
            axis_name=axis,
            num_experts=e,
            implementation=implementation,
        )
        return d.tokens, d.group_sizes, moe.combine(d.tokens, d.plan)

    arrays = [arrange(list(a)) for a in zip(*cases, strict=True)]
    with open_fabric(implementation, mesh):
        got = on_ranks(mesh, program, check_vma=check_vma)(*arrays)
    outs = [moe_oracle.dispatch(*case, e) for case in cases]
    same_bits(got[0], arrange([np.stack([o.tokens for o in out]) for out in outs]))
    same_bits(got[1], arrange([np.stack([o.group_sizes for o in out]) for out in outs]))
    y = [
        moe_oracle.combine(np.stack([o.tokens for o in out]), out, case[0].shape)
        for out, case in zip(outs, cases, strict=True)
    ]
    np.testing.assert_allclose(got[2], arrange(y), rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_another_kind(implementation: str) -> None:
    """Combine takes rows of another dtype and width than what was dispatched."""
    n, t, k, e = 2, 4, 2, 4
    rng = np.random.default_rng(3)
    x, weights = data(rng, n, t, 3, k, jnp.bfloat16)
    ids = moe_oracle.routing("random", rng, n, t, k, e)
    mesh = make_mesh(n)

    def program(x: Any, ids: Any, weights: Any) -> Any:
        d = moe.dispatch(
            *(x, ids, weights),
            axis_name="expert",
            num_experts=e,
            implementation=implementation,
        )
        rows = jnp.tile(d.tokens.astype(jnp.float32), (1, 2))
        return moe.combine(rows, d.plan)

    with open_fabric(implementation, mesh):
        y = on_ranks(mesh, program)(x, ids, weights)
    want = x.astype(np.float32) * weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(y, np.tile(want, (1, 1, 2)), rtol=1e-6)


def test_oracle_by_hand() -> None:
    """The oracle itself, on the example of dispatch's docstring."""
    x = np.array([[[1.0]], [[2.0]]], np.float32)
    ids = np.array([[[0, 3]], [[0, 1]]], np.int32)
    weights = np.array([[[0.5, 0.25]], [[0.125, 2.0]]], np.float32)
    first, second = moe_oracle.dispatch(x, ids, weights, 4)
    assert first.tokens.ravel().tolist() == [1, 2, 2, 0]
    assert first.group_sizes.tolist() == [2, 1]
    assert first.weights.tolist() == [0.5, 0.125, 2.0, 0]
    assert first.slot_row.tolist() == [[0, -1], [1, 2]]
    assert second.tokens.ravel().tolist() == [1, 0, 0, 0]
    assert second.group_sizes.tolist() == [0, 1]
    assert second.sent.tolist() == [1, 0]
    y = moe_oracle.combine(
        np.stack([first.tokens, second.tokens]), [first, second], x.shape
    )
    assert y.ravel().tolist() == [0.75, 4.25]
