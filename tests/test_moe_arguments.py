"""Bad arguments: one clear error each, before anything is bound."""

from __future__ import annotations

import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from moe_cases import make_mesh

from jaxfabric import moe

N, T, D, K, E = 2, 4, 8, 2, 4


def traced(function: Any, mesh: Any = None, **kwargs: Any) -> None:
    """Traces function inside a shard_map over two ranks."""
    mesh = mesh or make_mesh(N)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(), out_specs=P(), **kwargs)
    jax.eval_shape(mapped)


def call(
    x: Any = ((T, D), "float32"),
    ids: Any = ((T, K), "int32"),
    weights: Any = ((T, K), "float32"),
    start: bool = False,
    **changes: Any,
) -> moe.Dispatched:
    x, ids, weights = (jnp.zeros(*a) for a in (x, ids, weights))
    options: dict[str, Any] = {"axis_name": "expert", "num_experts": E} | changes
    if start:
        return moe.dispatch_done(moe.dispatch_start(x, ids, weights, **options))
    return moe.dispatch(x, ids, weights, **options)


BAD_DISPATCH = [
    ({"x": ((T, D), "int32")}, TypeError, "x must be one of float32.*got int32"),
    ({"x": ((T,), "float32")}, ValueError, r"x must be a non-empty matrix.*\(4,\)"),
    ({"x": ((T, 0), "float32")}, ValueError, r"non-empty matrix.*\(4, 0\)"),
    (
        {"ids": ((T, K), "uint8")},
        TypeError,
        r"ids must be int32, got uint8; pass ids.astype\(jnp.int32\)",
    ),
    ({"ids": ((T + 1, K), "int32")}, ValueError, r"T = 4 rows .*\(5, 2\)"),
    ({"ids": ((T, K, 1), "int32")}, ValueError, r"ids must be \[T, K\].*\(4, 2, 1\)"),
    ({"weights": ((T, K), "bfloat16")}, TypeError, "weights must be float32, got bf"),
    ({"weights": ((T, 3), "float32")}, ValueError, r"\(4, 2\) but weights \(4, 3\)"),
    (
        {"ids": ((T, 5), "int32"), "weights": ((T, 5), "float32")},
        ValueError,
        "5 experts per token .*num_experts=4",
    ),
    ({"num_experts": 5}, ValueError, "num_experts=5 .* 2 ranks of axis 'expert'"),
    ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
    ({"num_experts": 4.0}, TypeError, "num_experts must be an int, got float 4.0"),
    ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0.*None drops"),
    ({"capacity": 1.25}, TypeError, "capacity must be an int, got float"),
    ({"capacity": True}, TypeError, "capacity must be an int, got bool"),
    ({"expert_alignment": 0}, ValueError, "expert_alignment must be at least 1, got 0"),
    ({"axis_name": "ep"}, ValueError, r"'ep' is not in the mesh.*\('expert',\)"),
    ({"axis_name": ()}, TypeError, r"axis_name must be a mesh axis.*\(\)"),
    ({"axis_name": 3}, TypeError, "axis_name must be a mesh axis.* 3"),
    ({"implementation": "best"}, ValueError, "'best' is unknown.*'ragged'"),
    ({"implementation": "ragged"}, NotImplementedError, "'cpu'.*'reference'"),
    (
        {"implementation": "reference", "fabric": object()},
        ValueError,
        "fabric= was given, but implementation='reference'",
    ),
    ({"token": np.zeros(2, np.float32)}, TypeError, r"token must be float32\[1\].*\[2"),
    ({"token": np.zeros(1, np.int32)}, TypeError, r"float32\[1\], got int32\[1\]"),
    ({"key": []}, TypeError, "key must be a static hashable value.*list"),
    ({"timeout_s": 0}, ValueError, "timeout_s=0 must be above 0 seconds"),
    ({"timeout_s": float("nan")}, ValueError, "timeout_s=nan must be above 0"),
    ({"name": ""}, TypeError, "name must be a non-empty str, got ''"),
    ({"active": np.ones(2, bool)}, NotImplementedError, "active= comes with"),
    ({"wire_dtype": jnp.bfloat16}, ValueError, "wire_dtype=bfloat16 is not supported"),
    ({"dequantize": False}, ValueError, "add wire_dtype=jnp.float8_e4m3fn"),
]


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(("options", "error", "message"), BAD_DISPATCH)
def test_dispatch(options: Any, error: Any, message: str, start: bool) -> None:
    op = "jf.moe.dispatch_start" if start else "jf.moe.dispatch"
    if options.get("implementation") == "ragged":
        op = "jf.moe"
    with pytest.raises(error, match=f"(?s)^{re.escape(op)}: .*{message}"):
        traced(lambda: call(**options, start=start).stats.sent)


def test_outside_of_shard_map() -> None:
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(
            ValueError, match=r"not bound here; call it inside jax\.shard"
        ):
            wrap(call)()
    with jax.set_mesh(make_mesh(N)), pytest.raises(ValueError, match="not bound here"):
        jax.jit(call)()


def test_partly_manual_shard_map() -> None:
    mesh = make_mesh((2, 2), ("data", "expert"))
    with pytest.raises(
        ValueError, match=r"\('data',\) are not manual.*nest a jax.shard"
    ):
        traced(lambda: call().stats.sent, mesh, axis_names={"expert"})

    def nested() -> Any:
        inner = jax.shard_map(
            lambda: call().tokens,
            in_specs=(),
            out_specs=P("expert"),
            axis_names={"expert"},
        )
        return inner()

    jax.eval_shape(
        jax.shard_map(
            nested, mesh=mesh, in_specs=(), out_specs=P("data"), axis_names={"data"}
        )
    )


def test_fabric_that_is_not_open() -> None:
    errors = pytest.importorskip("jaxfabric._errors")
    with pytest.raises(errors.FabricError, match="no open Fabric has axis 'expert'"):
        traced(lambda: call(implementation="fabric").stats.sent)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        (
            (15, D),
            {},
            ValueError,
            "15 rows, but the plan over axis 'expert' has R = 16",
        ),
        ((16,), {}, ValueError, r"rows must be a non-empty matrix.*\(16,\)"),
        ((16, D), {"dtype": "int32"}, TypeError, "rows must be one of .* got int32"),
        ((16, D), {"accum_dtype": "int32"}, TypeError, "accum_dtype must be .* int32"),
        ((16, D), {"token": np.zeros(())}, TypeError, r"token must be float32\[1\]"),
        ((16, D), {"timeout_s": -1}, ValueError, "timeout_s=-1 must be above 0"),
        ((16, D), {"name": None}, TypeError, "name must be a non-empty str"),
    ],
)
def test_combine(
    rows: Any, options: Any, error: Any, message: str, start: bool
) -> None:
    def program() -> Any:
        given = dict(options)
        values = jnp.zeros(rows, given.pop("dtype", "float32"))
        plan = call().plan
        if start:
            return moe.combine_done(moe.combine_start(values, plan, **given))
        return moe.combine(values, plan, **given)

    with pytest.raises(error, match=rf"^jf\.moe\.combine(_\w+)?: .*{message}"):
        traced(program)


def test_wrong_kind_of_plan_or_pending() -> None:
    wrong: Any = None
    with pytest.raises(
        TypeError, match=r"combine: plan must be the \.plan of .*Dispatched"
    ):
        traced(lambda: moe.combine(jnp.zeros((16, D)), cast(Any, call())))
    with pytest.raises(
        TypeError, match="dispatch_done: pending must come from dispatch_s"
    ):
        moe.dispatch_done(wrong)
    with pytest.raises(
        TypeError, match="combine_done: pending must come from combine_st"
    ):
        moe.combine_done(wrong)


def test_plan_of_another_mesh() -> None:
    kept: list[moe.Plan] = []

    def keep() -> jax.Array:
        kept.append(call().plan)
        return jnp.zeros(())

    traced(keep)
    with pytest.raises(ValueError, match="plan is for 2 ranks but axis 'expert' has 4"):
        traced(lambda: moe.combine(jnp.zeros((16, D)), kept[0]), make_mesh(4))
