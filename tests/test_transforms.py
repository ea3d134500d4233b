"""The primitives under grad, vmap, loops, branches, checkpoint and kinds of meshes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from ranks import channels, make_mesh, on_ranks, same, spread

import jaxfabric as jf

N = 4
RING = [(i, (i + 1) % N) for i in range(N)]
PARTIAL = [(0, 2), (1, 1), (2, 3)]  # rank 3 sends nothing, rank 0 gets nothing


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, *shape)).astype(np.float32)


def ours(x: Any, perm: Any) -> jax.Array:
    return jf.exchange(x, perm, axis_name="x")[0]


def jaxs(x: Any, perm: Any) -> jax.Array:
    return lax.ppermute(x, "x", perm)


def compare(program: Callable[..., Any], *arrays: np.ndarray, **kwargs: Any) -> None:
    """``program(move, ...)`` has the same bits with our exchange and lax.ppermute."""
    mesh = make_mesh(N)
    with jf.Fabric(mesh):
        got, want = (
            on_ranks(mesh, lambda *a, move=move: program(move, *a), **kwargs)(*arrays)
            for move in (ours, jaxs)
        )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def layer(move: Any, x: Any) -> jax.Array:
    return jnp.sin(move(x, RING)) + jnp.cos(2 * move(x * x, PARTIAL))


def forward_and_gradient(move: Any, x: Any) -> Any:
    return jax.value_and_grad(lambda x: layer(move, x).sum())(x)


@pytest.mark.smoke
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradient_of_exchange(check_vma: bool) -> None:
    compare(forward_and_gradient, data(5), check_vma=check_vma)


def test_second_derivative_of_exchange() -> None:
    def program(move: Any, x: Any) -> jax.Array:
        once = jax.grad(lambda x: layer(move, x).sum())
        return jax.grad(lambda x: (once(x) ** 2).sum())(x)

    compare(program, data(5))


def test_gradient_through_shard_map_of_a_replicated_weight() -> None:
    mesh = make_mesh(N)
    x, w = data(6), np.float32(0.7)

    def loss(move: Any, w: Any, x: Any) -> jax.Array:
        def on_rank(w: Any, x: Any) -> jax.Array:
            return lax.psum(jnp.sin(move(w * x, RING)).sum(), "x")

        mapped = jax.shard_map(
            on_rank, mesh=mesh, in_specs=(P(), P("x")), out_specs=P()
        )
        return mapped(w, x)

    with jf.Fabric(mesh):
        got, want = (
            jax.jit(jax.grad(lambda w, x, move=move: loss(move, w, x)))(
                w, spread(mesh, x)
            )
            for move in (ours, jaxs)
        )
    np.testing.assert_allclose(got, want, rtol=1e-6)


def scanned(move: Any, x: Any) -> jax.Array:
    return lax.scan(lambda x, _: (layer(move, x), None), x, None, length=3)[0]


def looped(move: Any, x: Any) -> jax.Array:
    def body(carry: Any) -> Any:
        i, x = carry
        return i + 1, layer(move, x)

    return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]


def branched(move: Any, x: Any) -> jax.Array:
    """Calls in taken and in untaken branches, and a branch within a scan."""

    def step(x: Any, i: Any) -> Any:
        branches = [
            lambda x: layer(move, x),
            lambda x: 2 * x,
            lambda x: move(x, PARTIAL),
        ]
        return lax.switch(i % 3, branches, x), None

    x = lax.cond(lax.psum(1, "x") > N, lambda x: layer(move, x), lambda x: x, x)
    return lax.scan(step, x, jnp.arange(5))[0]


def rematerialized(move: Any, x: Any) -> jax.Array:
    f = jax.checkpoint(lambda x: layer(move, x))
    return f(f(x))


@pytest.mark.parametrize("body", [scanned, branched, rematerialized])
def test_loops_and_branches_with_gradients(body: Callable[..., Any]) -> None:
    def program(move: Any, x: Any) -> Any:
        return body(move, x), jax.grad(lambda x: body(move, x).sum())(x)

    compare(program, data(5))


def test_while_loop_and_a_trip_count_of_zero() -> None:
    compare(looped, data(5))

    def never(move: Any, x: Any) -> jax.Array:
        return lax.fori_loop(0, jnp.int32(0), lambda _, x: move(x, RING), x)

    compare(never, data(5))


@pytest.mark.parametrize("explicit", [False, True])
def test_auto_and_explicit_meshes(explicit: bool) -> None:
    mesh = make_mesh(N, explicit=explicit)
    x = data(5)
    with jf.Fabric(mesh), jax.set_mesh(mesh):

        def program(x: Any) -> Any:
            return forward_and_gradient(ours, x)

        got = on_ranks(mesh, program)(x)
    auto = make_mesh(N)
    want = on_ranks(auto, lambda x: forward_and_gradient(jaxs, x))(x)
    for a, b in zip(got, want, strict=True):
        same(mesh, a, np.asarray(b))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_vmap_of_exchange_is_one_exchange(axis: int) -> None:
    x = data(3, 4, 5)

    def program(move: Any, x: Any) -> jax.Array:
        return jax.vmap(lambda x: layer(move, x), in_axes=axis, out_axes=axis)(x)

    compare(program, x)

    def gradients(move: Any, x: Any) -> jax.Array:
        return jax.vmap(jax.grad(lambda x: layer(move, x).sum()), in_axes=axis)(x)

    compare(gradients, x)
    mesh = make_mesh(N)
    with jf.Fabric(mesh):

        def batched(x: Any) -> jax.Array:
            return jax.vmap(lambda x: ours(x, RING), in_axes=axis)(x)

        mapped = jax.shard_map(
            batched, mesh=mesh, in_specs=P(None, "x"), out_specs=P(None, "x")
        )
        assert len(channels(jax.jit(mapped), np.zeros((8, 8, 8), np.float32))) == 1


def test_eager_shard_map() -> None:
    """Without jit each call is a program of its own."""
    compare(layer, data(5), jit=False)


@pytest.mark.parametrize("check_vma", [True, False])
def test_results_vary_over_the_axis(check_vma: bool) -> None:
    """So that a carry and a result that claims to be replicated are typed right."""
    mesh = make_mesh(N)
    with jf.Fabric(mesh):

        def program(x: Any) -> jax.Array:
            y, token = jf.exchange(jnp.zeros(3), RING, axis_name="x")
            token = jf.barrier("x", token=token)
            if check_vma:
                for result in (y, token):
                    assert jax.typeof(result).manual_axis_type.varying == {"x"}
            carry, _ = lax.scan(
                lambda t, _: (jf.barrier("x", token=t), None), token, None, length=2
            )
            return x + y.sum() + carry

        x = data(1)
        same(mesh, on_ranks(mesh, program, check_vma=check_vma)(x), x)


def test_cotangents_of_tokens_run_in_reverse() -> None:
    """A barrier's backward is a barrier, and the exchanges come in reversed order."""
    mesh = make_mesh(N)

    def chain(x: Any, token: Any) -> Any:
        for i in range(3):
            x, token = jf.exchange(x, RING, axis_name="x", token=token, key=f"step {i}")
            token = jf.barrier("x", token=token, key=f"meet {i}")
        return x, token

    with jf.Fabric(mesh):

        def program(x: Any) -> Any:
            # Varying, or the cotangent would be summed over the ranks.
            token = lax.pcast(jf.token(), "x", to="varying")
            (y, token), back = jax.vjp(chain, x, token)
            return back((2 * y, token + 3))

        run = on_ranks(mesh, program)
        dx, dtoken = run(data(2))
        text = jax.jit(
            jax.shard_map(program, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        )
        labels = re.findall(
            r'label = "(\w+) [^"]*key \W*(\w+ \d)',
            text.lower(np.zeros(8, np.float32)).as_text(),
        )
    np.testing.assert_array_equal(np.asarray(dx), 2 * np.asarray(data(2)))
    np.testing.assert_array_equal(np.asarray(dtoken), np.full((N, 1), 3))
    forward = [
        (op, f"{what} {i}")
        for i in range(3)
        for op, what in (("exchange", "step"), ("barrier", "meet"))
    ]
    assert labels == [*forward, *reversed(forward)]


def test_put_scatter_and_wait_refuse_derivatives() -> None:
    mesh = make_mesh(N)
    with jf.Fabric(mesh) as fabric:
        win = fabric.window(N, np.float32)
        zeros = jnp.zeros(N, jnp.int32)
        calls: dict[str, Callable[[Any], Any]] = {
            "put": lambda x: jf.put(win, x, 0, axis_name="x"),
            "scatter": lambda x: jf.scatter(win, x, zeros, axis_name="x"),
            "wait": lambda x: jf.wait(win, axis_name="x", token=x[:1])[0],
        }
        for name, call in calls.items():

            def program(x: Any, call: Any = call) -> jax.Array:
                return jax.grad(lambda x: call(x).sum())(x)

            with pytest.raises(NotImplementedError, match=rf"jf.{name} .*jf.exchange"):
                on_ranks(mesh, program)(data(N))

        # stop_gradient, as the message says, makes it work.
        def around(x: Any) -> jax.Array:
            def loss(x: Any) -> jax.Array:
                held = lax.stop_gradient(x)
                token = jf.put(win, held, lax.axis_index("x"), axis_name="x")
                y, _ = jf.wait(win, axis_name="x", token=token)
                return (x * y).sum()

            return jax.grad(loss)(x)

        same(mesh, on_ranks(mesh, around)(data(N)), data(N))


def test_vmap_is_refused_where_it_would_multiply_calls() -> None:
    mesh = make_mesh(N)
    with jf.Fabric(mesh) as fabric:
        win = fabric.window(2, np.float32)

        calls: list[tuple[str, Callable[[Any], Any]]] = [
            ("jf.put", lambda x: jf.put(win, x, 0, axis_name="x")),
            (
                "jf.scatter",
                lambda x: jf.scatter(*(win, x, jnp.zeros(N, jnp.int32)), axis_name="x"),
            ),
            ("jf.wait", lambda x: jf.wait(win, axis_name="x", token=x[0, :1])[0]),
            ("jf.barrier", lambda x: jf.barrier("x", token=x[0, :1])),
            (
                "token cannot be batched",
                lambda x: jf.exchange(x, RING, axis_name="x", token=x[0, :1])[0],
            ),
        ]
        for message, call in calls:

            def program(x: Any, call: Any = call) -> jax.Array:
                return jax.vmap(call)(x)

            x = data(3, 2) if message == "jf.put" else data(3, N, 2)
            with pytest.raises(NotImplementedError, match=message):
                on_ranks(mesh, program)(x)


def test_only_inside_a_fully_manual_shard_map() -> None:
    mesh = make_mesh((2, 2), ("d", "x"))
    x = np.zeros((4, 3), np.float32)
    with jf.Fabric(mesh):

        def call(x: Any) -> jax.Array:
            return jf.exchange(x, [(0, 1), (1, 0)], axis_name="x")[0]

        with pytest.raises(ValueError, match=r"'x' is not bound.*jax.shard_map"):
            jax.jit(call)(x)
        partial = jax.shard_map(
            call, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names={"x"}
        )
        with pytest.raises(ValueError, match=r"'d',\) are not manual.*nest a jax.shar"):
            jax.jit(partial)(x)

        # The way out that the message names.
        def outer(x: Any) -> jax.Array:
            return jax.shard_map(
                call, in_specs=P("d"), out_specs=P("d"), axis_names={"d"}
            )(x)

        nested = jax.shard_map(
            outer, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names={"x"}
        )
        x = np.arange(12, dtype=np.float32).reshape(4, 3)
        # Rank (d, x) holds row 2 x + d.
        np.testing.assert_array_equal(jax.jit(nested)(x), x[[2, 3, 0, 1]])
