"""Gradients of dispatch and combine against a dense program on one device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from moe_cases import (
    IMPLEMENTATIONS,
    NEEDS_NATIVE,
    data,
    experts,
    make_mesh,
    on_mesh,
    open_fabric,
)

from jaxfabric import moe

N, T, D, K, E = 4, 5, 4, 3, 8
SPEC = P("expert")


def kept(ids: np.ndarray, capacity: int | None) -> np.ndarray:
    """float[N, T, K]: 1 where an assignment survives."""
    x = np.zeros((*ids.shape[:2], 1), np.float32)
    outs = moe_oracle.dispatch(x, ids, np.zeros(ids.shape), E, capacity=capacity)
    mask = np.zeros(ids.shape, np.float32)
    for out in outs:
        for origin in filter(None, out.origin):
            mask[origin] = 1
    return mask


def dense(x: Any, weights: Any, w: Any, ids: Any, mask: Any) -> jax.Array:
    """y[N, T, D] without any dispatch; w[E, D, D]."""
    rows = jnp.tanh(jnp.einsum("ntd,ntkdf->ntkf", x, w[np.where(ids < 0, 0, ids)]))
    return (rows * (weights * mask)[..., None]).sum(2)


def sharded(mesh: Any, ids: np.ndarray, form: str, **options: Any) -> Any:
    """The same function of x, weights, w through dispatch and combine."""

    def whole(x: Any, ids: Any, weights: Any, w: Any) -> jax.Array:
        d = moe.dispatch(x, ids, weights, axis_name="expert", num_experts=E, **options)
        return moe.combine(experts(d, w), d.plan)

    def halves(x: Any, ids: Any, weights: Any, w: Any) -> Any:
        flight = moe.dispatch_start(
            *(x, ids, weights), axis_name="expert", num_experts=E, **options
        )
        d = moe.dispatch_done(flight)
        return moe.combine_done(moe.combine_start(experts(d, w), d.plan))

    def unweighted(x: Any, ids: Any, weights: Any, w: Any) -> jax.Array:
        d = moe.dispatch(x, ids, weights, axis_name="expert", num_experts=E, **options)
        rows = d.weights[:, None] * experts(d, w)
        return moe.combine(rows, d.plan, weighted=False)

    def reduced(x: Any, ids: Any, weights: Any, w: Any) -> jax.Array:
        d = moe.dispatch(x, ids, weights, axis_name="expert", num_experts=E, **options)
        rows, slots = d.weights[:, None] * experts(d, w), d.plan.slot_row
        rows = jnp.where(slots[..., None] < 0, 0, rows[slots]).sum(1)
        return moe.combine(rows, d.plan, expand=False, weighted=False)

    def weighted(x: Any, ids: Any, weights: Any, w: Any) -> jax.Array:
        d = moe.dispatch(x, ids, weights, axis_name="expert", num_experts=E, **options)
        return moe.combine(d.tokens, d.plan, expand=False)

    bodies = (whole, halves, unweighted, reduced, weighted)
    body = {body.__name__: body for body in bodies}[form]
    mapped = jax.shard_map(body, mesh=mesh, in_specs=SPEC, out_specs=SPEC)
    (routes,) = on_mesh(mesh, SPEC, ids.reshape(N * T, K))

    def program(x: jax.Array, weights: jax.Array, w: jax.Array) -> jax.Array:
        y = mapped(x.reshape(N * T, D), routes, weights.reshape(N * T, K), w)
        return y.reshape(N, T, D)

    return program


def loss(function: Any, *operands: Any) -> jax.Array:
    """A scalar that weighs every element of y differently."""
    y = function(*operands)
    return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape)) + y**2).sum()


def second(function: Any, *operands: Any) -> jax.Array:
    """A scalar of first derivatives, so that its gradient has second ones."""
    grads = jax.grad(lambda *o: loss(function, *o), argnums=(0, 1, 2))(*operands)
    return sum((g * jnp.sin(jnp.arange(g.size)).reshape(g.shape)).sum() for g in grads)


FORMS = ["whole", "halves", "unweighted"]
CASES = [
    ("reference", "whole"),
    # They differ from the first in a line, and compile for long.
    *(pytest.param("reference", form, marks=pytest.mark.slow) for form in FORMS[1:]),
    *(pytest.param("fabric", form, marks=NEEDS_NATIVE) for form in FORMS),
]


def close(actual: Any, expected: Any) -> None:
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, abs(b).max()))


@pytest.mark.parametrize(("implementation", "form"), CASES)
@pytest.mark.parametrize(
    "options",
    [{}, {"expand": False, "expert_alignment": 4}, {"capacity": 4}],
    ids=["plain", "no-expand", "capacity"],
)
def test_gradients(implementation: str, form: str, options: Any) -> None:
    rng = np.random.default_rng(0)
    x, weights = data(rng, N, T, D, K)
    w = rng.normal(size=(E, D, D)).astype(np.float32)
    mesh = make_mesh(N)
    scalar = second if form != "unweighted" else loss
    with open_fabric(implementation, mesh):
        for kind in ("random", "skips"):
            ids = moe_oracle.routing(kind, rng, N, T, K, E)
            mask = kept(ids, options.get("capacity"))
            assert (mask.sum() < (ids >= 0).sum()) == ("capacity" in options)

            def plain(
                x: Any, weights: Any, w: Any, ids: Any = ids, mask: Any = mask
            ) -> jax.Array:
                return dense(x, weights, w, ids, mask)

            program = sharded(mesh, ids, form, implementation=implementation, **options)
            got = jax.jit(jax.value_and_grad(loss, (1, 2, 3)), static_argnums=0)
            value, grads = got(program, x, weights, w)
            expected, wanted = got(plain, x, weights, w)
            np.testing.assert_allclose(value, expected, rtol=1e-5)
            close(grads, wanted)
            # Dropped and skipped assignments have no gradient at all.
            assert not np.asarray(grads[1])[mask == 0].any()
            if scalar is second and kind == "skips":
                got = jax.jit(jax.grad(second, (1, 2, 3)), static_argnums=0)
                close(got(program, x, weights, w), got(plain, x, weights, w))


@NEEDS_NATIVE
def test_rows_that_the_program_has_summed() -> None:
    rng = np.random.default_rng(4)
    x, weights = data(rng, N, T, D, K)
    w = rng.normal(size=(E, D, D)).astype(np.float32)
    ids = moe_oracle.routing("skips", rng, N, T, K, E)
    mask = kept(ids, None)
    mesh = make_mesh(N)
    with open_fabric("fabric", mesh):
        program = sharded(mesh, ids, "reduced", implementation="fabric")
        got = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
        plain = functools.partial(dense, ids=ids, mask=mask)
        close(got(program, x, weights, w), got(plain, x, weights, w))
        with pytest.raises(ValueError, match="weighted=False"):
            sharded(mesh, ids, "weighted", implementation="fabric")(x, weights, w)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_unused_rows_do_not_spoil_gradients(implementation: str) -> None:
    """NaN in padding and tail, as grouped GEMMs leave them, stays there."""
    rng = np.random.default_rng(1)
    x, weights = data(rng, N, T, D, K)
    ids = moe_oracle.routing("skips", rng, N, T, K, E)
    mesh = make_mesh(N)

    def body(x: Any, ids: Any, weights: Any) -> jax.Array:
        d = moe.dispatch(
            *(x, ids, weights),
            axis_name="expert",
            num_experts=E,
            expert_alignment=4,
            implementation=implementation,
        )
        real = (d.weights != 0)[:, None]
        return moe.combine(jnp.where(real, d.tokens, jnp.nan), d.plan)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=SPEC, out_specs=SPEC)
    arrays = on_mesh(
        *(mesh, SPEC, x.reshape(-1, D), ids.reshape(-1, K), weights.reshape(-1, K))
    )
    with open_fabric(implementation, mesh):
        grads = jax.jit(jax.grad(lambda *a: (mapped(*a) ** 2).sum(), argnums=(0, 2)))(
            *arrays
        )
        jax.block_until_ready(grads)
    for grad in grads:
        assert np.isfinite(grad).all()
    mask = (ids >= 0).astype(np.float32).reshape(-1, K)
    total = (weights.reshape(-1, K) * mask).sum(1, keepdims=True)
    np.testing.assert_allclose(
        grads[0], 2 * total**2 * x.reshape(-1, D), rtol=1e-4, atol=1e-5
    )


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_gradients(implementation: str) -> None:
    """bfloat16 rows have bfloat16 gradients, routing weights float32 ones."""
    rng = np.random.default_rng(2)
    x, weights = data(rng, N, T, D, K, jnp.bfloat16)
    ids = moe_oracle.routing("random", rng, N, T, K, E)
    mesh = make_mesh(N)

    def body(x: Any, ids: Any, weights: Any) -> jax.Array:
        d = moe.dispatch(
            *(x, ids, weights),
            axis_name="expert",
            num_experts=E,
            implementation=implementation,
        )
        return moe.combine(d.tokens, d.plan).astype(jnp.float32)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=SPEC, out_specs=SPEC)
    arrays = on_mesh(
        *(mesh, SPEC, x.reshape(-1, D), ids.reshape(-1, K), weights.reshape(-1, K))
    )
    with open_fabric(implementation, mesh):
        dx, dw = jax.jit(jax.grad(lambda *a: mapped(*a).sum(), (0, 2)))(*arrays)
        jax.block_until_ready((dx, dw))
    assert dx.dtype == jnp.bfloat16
    assert dw.dtype == jnp.float32
    total = np.broadcast_to(weights.reshape(-1, K).sum(1, keepdims=True), dx.shape)
    np.testing.assert_allclose(dx.astype(np.float32), total, rtol=2e-2)
    rows = x.reshape(-1, 1, D).astype(np.float32).sum(-1)
    np.testing.assert_allclose(
        dw, np.broadcast_to(rows, dw.shape), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("fabric", marks=NEEDS_NATIVE)]
)
def test_no_rank_is_promoted(implementation: str) -> None:
    """Some programs forbid it everywhere: jax_numpy_rank_promotion="raise"."""
    rng = np.random.default_rng(0)
    x, weights = data(rng, N, T, D, K)
    w = rng.normal(size=(E, D, D)).astype(np.float32)
    mesh = make_mesh(N)
    ids = moe_oracle.routing("skips", rng, N, T, K, E)
    program = sharded(mesh, ids, "whole", implementation=implementation)
    gradient = jax.grad(functools.partial(second, program), (0, 1, 2))
    with jax.numpy_rank_promotion("raise"), open_fabric(implementation, mesh):
        got = jax.eval_shape(gradient, x, weights, w)
    assert [g.shape for g in got] == [x.shape, weights.shape, w.shape]
