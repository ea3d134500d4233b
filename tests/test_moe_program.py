"""dispatch and combine inside larger programs: remat, scan, plans kept for later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_cases import (
    IMPLEMENTATIONS,
    data,
    experts,
    make_mesh,
    on_mesh,
    on_ranks,
    open_fabric,
)

from jaxfabric import moe

N, T, D, K, E = 4, 5, 4, 2, 8
SPEC = P("expert")
NAMES = ("jaxfabric_dispatch", "jaxfabric_combine")


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def rows_sent(jaxpr: Any) -> int:
    """How often the reference gathers rows: dispatches and replays."""
    return sum(
        equation.primitive.name.startswith("all_gather")
        and equation.invars[0].aval.shape == (T, D)
        for equation in equations(jaxpr)
    )


def case(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x, weights = data(rng, N, T, D, K)
    w = rng.normal(size=(N, E // N, D, D)).astype(np.float32)
    return x, moe_oracle.routing("skips", rng, N, T, K, E), weights, w


def layer(x: Any, ids: Any, weights: Any, w: Any, **options: Any) -> jax.Array:
    d = moe.dispatch(x, ids, weights, axis_name="expert", num_experts=E, **options)
    return moe.combine(experts(d, w), d.plan)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("no remat", 2),  # dispatch; combine's backward
        ("recompute all", 3),  # both again
        ("save names", 2),
    ],
)
def test_checkpoint_names(policy: str, expected: int) -> None:
    """save_only_these_names avoids the second dispatch."""
    x, ids, weights, w = case()
    mesh = make_mesh(N)
    names = jax.checkpoint_policies.save_only_these_names(*NAMES)

    def body(*operands: Any) -> jax.Array:
        f = layer
        if policy != "no remat":
            f = jax.checkpoint(f, policy=names if policy == "save names" else None)
        return f(*operands)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=SPEC, out_specs=SPEC)
    grad = jax.grad(lambda *a: (mapped(*a) ** 2).sum(), argnums=(0, 2, 3))
    arrays = [a.reshape(-1, *a.shape[2:]) for a in (x, ids, weights, w)]
    assert rows_sent(jax.make_jaxpr(grad)(*arrays).jaxpr) == expected


@pytest.mark.parametrize("halves", [False, True])
def test_own_checkpoint_name(halves: bool) -> None:
    """name= is the name, for both forms."""
    x, ids, weights, w = case()
    mesh = make_mesh(N)
    policy = jax.checkpoint_policies.save_only_these_names("mine")

    def block(x: Any, ids: Any, weights: Any, w: Any) -> jax.Array:
        options: dict[str, Any] = {"axis_name": "expert", "num_experts": E}
        if halves:
            pending = moe.dispatch_start(x, ids, weights, name="mine", **options)
            d = moe.dispatch_done(pending)
        else:
            d = moe.dispatch(x, ids, weights, name="mine", **options)
        return moe.combine(experts(d, w), d.plan)

    body = jax.checkpoint(block, policy=policy)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=SPEC, out_specs=SPEC)
    grad = jax.grad(lambda *a: (mapped(*a) ** 2).sum(), argnums=(0, 2, 3))
    arrays = [a.reshape(-1, *a.shape[2:]) for a in (x, ids, weights, w)]
    assert rows_sent(jax.make_jaxpr(grad)(*arrays).jaxpr) == 2


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_plan_is_a_value(implementation: str) -> None:
    """A plan is used twice, out of order, after other dispatches, under remat."""
    x, ids, weights, _ = case()
    x2, ids2, weights2, _ = case(1)
    mesh = make_mesh(N)

    def combined(rows: Any, plan: moe.Plan) -> jax.Array:
        return moe.combine(rows, plan)

    def program(x: Any, ids: Any, weights: Any, x2: Any, ids2: Any, w2: Any) -> Any:
        options: dict[str, Any] = {"axis_name": "expert", "num_experts": E}
        options["implementation"] = implementation
        first = moe.dispatch(x, ids, weights, **options, key="first")
        second = moe.dispatch(x2, ids2, w2, **options, key="second")
        late = moe.combine(second.tokens, second.plan)
        once = moe.combine(first.tokens, first.plan, key="once")
        twice = jax.checkpoint(combined)(2 * first.tokens, first.plan)
        return late, once, twice

    with open_fabric(implementation, mesh):
        late, once, twice = on_ranks(mesh, program)(x, ids, weights, x2, ids2, weights2)
    for y, (a, i, w) in ((late, (x2, ids2, weights2)), (once, (x, ids, weights))):
        want = a * (w * (i >= 0)).sum(-1, keepdims=True)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(twice, 2 * once)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scan_cond_and_several_in_flight(implementation: str) -> None:
    x, ids, weights, w = case()
    mesh = make_mesh(N)
    options: dict[str, Any] = {"axis_name": "expert", "num_experts": E}
    options["implementation"] = implementation

    def once(x: Any, ids: Any, weights: Any, w: Any) -> jax.Array:
        return layer(x, ids, weights, w, implementation=implementation)

    def scanned(x: Any, ids: Any, weights: Any, w: Any) -> jax.Array:
        def step(x: Any, _: None) -> tuple[jax.Array, None]:
            return once(x, ids, weights, w), None

        return lax.scan(step, x, None, length=3)[0]

    def looped(x: Any, ids: Any, weights: Any, w: Any) -> jax.Array:
        return lax.fori_loop(0, 3, lambda _, x: once(x, ids, weights, w), x)

    def unrolled(x: Any, ids: Any, weights: Any, w: Any) -> jax.Array:
        for _ in range(3):
            x = once(x, ids, weights, w)
        return x

    def flight(x: Any, ids: Any, weights: Any, w: Any) -> Any:
        pending = [
            moe.dispatch_start(scale * x, ids, weights, **options, key=f"d{scale}")
            for scale in (1, 2, 3)
        ]
        done = [moe.dispatch_done(p) for p in reversed(pending)]
        back = [
            moe.combine_start(d.tokens, d.plan, key=f"c{i}") for i, d in enumerate(done)
        ]
        return [moe.combine_done(p) for p in reversed(back)]

    with open_fabric(implementation, mesh):
        a, b, c = (
            on_ranks(mesh, f)(x, ids, weights, w) for f in (scanned, looped, unrolled)
        )
        one, two, three = on_ranks(mesh, flight)(x, ids, weights, w)
    np.testing.assert_allclose(a, c, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(b, c, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(two, 2 * one, rtol=1e-6)
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_thread_through(implementation: str) -> None:
    """The token goes in and comes out, and its gradient is passed back."""
    x, ids, weights, _ = case()
    mesh = make_mesh(N)

    def program(x: Any, ids: Any, weights: Any) -> Any:
        token = jnp.zeros(1)

        def f(x: Any, token: Any) -> Any:
            d = moe.dispatch(
                *(x, ids, weights),
                axis_name="expert",
                num_experts=E,
                token=token,
                implementation=implementation,
            )
            y, token = moe.combine(d.tokens, d.plan, token=d.token)
            pending = moe.combine_start(d.tokens, d.plan, token=token, key="half")
            z, token = moe.combine_done(pending)
            return y + z, token

        (y, token), back = jax.vjp(f, x, token)
        dx, dtoken = back((y, token + 1))
        return y, dx, token, dtoken

    with open_fabric(implementation, mesh):
        y, _, token, dtoken = on_ranks(mesh, program)(x, ids, weights)
    want = 2 * x * (weights * (ids >= 0)).sum(-1, keepdims=True)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    assert token.shape == dtoken.shape == (N, 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_explicit_mesh(implementation: str) -> None:
    x, ids, weights, w = case()
    auto = make_mesh(N)
    mesh = jax.make_mesh(
        (N,), ("expert",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:N]
    )

    def program(x: Any, ids: Any, weights: Any, w: Any) -> jax.Array:
        return layer(x, ids, weights, w, implementation=implementation)

    want = on_ranks(auto, lambda *a: layer(*a, implementation="reference"))
    expected = want(x, ids, weights, w).reshape(-1, D)
    arrays = [a.reshape(-1, *a.shape[2:]) for a in (x, ids, weights, w)]
    mapped = jax.shard_map(program, mesh=mesh, in_specs=SPEC, out_specs=SPEC)
    with open_fabric(implementation, mesh), jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, SPEC)) for a in arrays]
        np.testing.assert_allclose(jax.jit(mapped)(*placed), expected, atol=1e-6)
        grad = np.asarray(jax.jit(jax.grad(lambda *a: mapped(*a).sum()))(*placed))
    assert np.isfinite(grad).all()


def test_vmap_of_the_reference() -> None:
    x, ids, weights, w = case()
    mesh = make_mesh(N)

    def program(x: Any, ids: Any, weights: Any, w: Any) -> Any:
        two = jnp.stack([x, 2 * x])
        batched = jax.vmap(lambda x: layer(x, ids, weights, w))(two)
        return batched, jnp.stack([layer(x, ids, weights, w) for x in two])

    batched, looped = on_ranks(mesh, program)(x, ids, weights, w)
    np.testing.assert_allclose(batched, looped, rtol=1e-6, atol=1e-7)


def test_every_argument_may_vary_over_other_axes() -> None:
    """Weights replicated over an axis over which the tokens are split."""
    mesh = make_mesh((2, 4), ("data", "expert"))
    rng = np.random.default_rng(0)
    x, weights = data(rng, 1, 8 * T, D, K)
    ids = moe_oracle.routing("random", rng, 1, 8 * T, K, E)
    w = rng.normal(size=(E, D, D)).astype(np.float32)
    both, specs = P(("data", "expert")), (P(("data", "expert")),) * 3 + (SPEC,)
    mapped = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=both)
    arrays = on_mesh(mesh, both, x[0], ids[0], weights[0])
    arrays += on_mesh(mesh, SPEC, w)

    def dense(x: Any, weights: Any, w: Any) -> jax.Array:
        rows = jnp.tanh(jnp.einsum("td,tkdf->tkf", x, w[ids[0]]))
        return ((rows * weights[..., None]).sum(1) ** 2).sum()

    got = jax.jit(jax.grad(lambda *a: (mapped(*a) ** 2).sum(), (0, 2, 3)))(*arrays)
    want = jax.grad(dense, (0, 1, 2))(x[0], weights[0], w)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * abs(b).max())
