"""dispatch and combine over a Fabric on several processes: bits, errors, programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from fabric_cases import AXIS, SPEC, Meeting, local_rows, mapped, mesh_of_all, place
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxfabric as jf

N, T, D, K, E = 4, 6, 4, 3, 8
NAMES = ("jaxfabric_dispatch", "jaxfabric_combine")


def case(kind: str = "skips", seed: int = 0, dtype: Any = np.float32) -> Any:
    """x, ids, weights, w; the first three by rank, all equal on all processes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, T, D)).astype(np.float32).astype(dtype)
    ids = moe_oracle.routing(kind, rng, N, T, K, E)
    weights = rng.random((N, T, K)).astype(np.float32)
    w = (rng.normal(size=(E, D, D)) / 2).astype(np.float32).astype(dtype)
    return x, ids, weights, w


def flat(mesh: Any, *arrays: np.ndarray) -> list[jax.Array]:
    """Arrays by rank to sharded ones."""
    return [place(mesh, a.reshape(-1, *a.shape[2:])) for a in arrays]


def dispatch(x: Any, ids: Any, weights: Any, **options: Any) -> jf.moe.Dispatched:
    return jf.moe.dispatch(x, ids, weights, axis_name=AXIS, num_experts=E, **options)


def layer(x: Any, ids: Any, weights: Any, w: Any, **options: Any) -> jax.Array:
    d = dispatch(x, ids, weights, **options)
    rows = lax.ragged_dot(d.tokens, w, d.group_sizes).astype(x.dtype)
    return jf.moe.combine(jnp.tanh(rows), d.plan)


def combine_bits(rows: np.ndarray, outs: list[Any], shape: Any) -> np.ndarray:
    """combine in the order of the contract, in numpy's float32."""
    y = np.zeros(shape, np.float32)
    for out, mine in zip(outs, rows, strict=True):
        for j, (s, i) in enumerate(out.unique):
            partial = np.zeros(shape[-1], np.float32)
            for row in out.slot_row[j][out.slot_row[j] >= 0]:
                partial += out.weights[row] * mine[row].astype(np.float32)
            y[s, i] += partial.astype(rows.dtype).astype(np.float32)
    return y.astype(rows.dtype)


def same_bits(got: jax.Array, want: np.ndarray) -> None:
    """Compares this process's part of an array by rank, [N, ...]."""
    want = want.reshape(-1, *want.shape[2:])
    for first, part in local_rows(got).items():
        assert part.dtype == want.dtype
        assert part.tobytes() == want[first : first + len(part)].tobytes()


def check_bits() -> None:
    """Each rank has the bits that the contract says, on whatever processes.

    They come from plain numpy and the same inputs, so all forms have the same bits.
    """
    mesh = mesh_of_all(jax.devices()[:N])

    def program(x: Any, ids: Any, weights: Any) -> Any:
        d = dispatch(x, ids, weights)
        once = dispatch(x, ids, weights, expand=False, key="once")
        y = jf.moe.combine(d.tokens, d.plan)
        return (d.tokens, d.group_sizes, d.weights, d.plan.slot_row, once.tokens, y)

    f = mapped(mesh, program)
    with jf.Fabric(mesh):
        for seed, kind in enumerate(moe_oracle.ROUTINGS):
            for dtype in (np.float32, jnp.bfloat16, np.float16):
                x, ids, weights, _ = case(kind, seed, dtype)
                outs = moe_oracle.dispatch(x, ids, weights, E)
                once = moe_oracle.dispatch(x, ids, weights, E, expand=False)
                tokens = np.stack([o.tokens for o in outs])
                want = (
                    tokens,
                    np.stack([o.group_sizes for o in outs]),
                    np.stack([o.weights for o in outs]),
                    np.stack([o.slot_row for o in outs]),
                    np.stack([o.tokens for o in once]),
                    combine_bits(tokens, outs, x.shape),
                )
                for got, expected in zip(
                    f(*flat(mesh, x, ids, weights)), want, strict=True
                ):
                    same_bits(got, expected)


@pytest.mark.jaxfabric(processes=4)
def test_bits_on_4_processes() -> None:
    check_bits()


@pytest.mark.jaxfabric(processes=2, devices_per_process=2)
def test_bits_on_2_processes_of_2_devices() -> None:
    check_bits()


def test_bits_on_4_devices_of_a_process() -> None:
    check_bits()


def scanned(
    x: Any, ids: Any, weights: Any, w: Any, remat: bool, **options: Any
) -> jax.Array:
    """Three layers of their own routes."""

    def body(x: Any, operands: Any) -> Any:
        return x + layer(x, *operands, **options), None

    if remat:
        body = jax.checkpoint(body)
    return lax.scan(body, x, (ids, weights, w))[0]


@pytest.mark.jaxfabric(processes=4)
@pytest.mark.parametrize(
    ("dtype", "remat"),
    [(np.float32, True), pytest.param(jnp.bfloat16, False, marks=pytest.mark.slow)],
)
def test_scanned_layers_with_gradients(dtype: Any, remat: bool) -> None:
    """Forward and all gradients equal the reference's, over three layers."""
    mesh = mesh_of_all()
    x = flat(mesh, case(dtype=dtype)[0])[0]
    layers = [
        case(kind, seed, dtype)[1:]
        for seed, kind in enumerate(("skips", "uneven", "random"))
    ]
    of_layer = P(None, AXIS)
    ids, weights, w = (
        place(
            mesh,
            np.stack([a.reshape(-1, *a.shape[a.ndim - n :]) for a in arrays]),
            of_layer,
        )
        for arrays, n in zip(zip(*layers, strict=True), (1, 1, 2), strict=True)
    )
    specs = (SPEC, of_layer, of_layer, of_layer)

    def results(implementation: str) -> Any:
        def loss(x: Any, weights: Any, w: Any, ids: Any) -> Any:
            y = jax.shard_map(
                functools.partial(scanned, remat=remat, implementation=implementation),
                mesh=mesh,
                in_specs=specs,
                out_specs=SPEC,
            )(x, ids, weights, w)
            return (y.astype(jnp.float32) ** 2).sum(), y

        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        return grad(x, weights, w, ids)

    with jf.Fabric(mesh):
        got = jax.block_until_ready(results("fabric"))
    want = results("reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        for mine, theirs in zip(
            a.addressable_shards, b.addressable_shards, strict=True
        ):
            u, v = (np.asarray(s.data, np.float32) for s in (mine, theirs))
            eps = float(jnp.finfo(dtype).eps)
            assert np.linalg.norm(u - v) <= 16 * eps * np.linalg.norm(v)


@pytest.mark.parametrize(
    ("policy", "messages"),
    [
        ("no remat", 4),  # route, reduce; replay, reduce
        ("save names", 4),
        ("recompute all", 5),  # the route again
    ],
)
def test_checkpoint_saves_messages(policy: str, messages: int) -> None:
    """What jax.checkpoint repeats is what goes over the wire again."""
    mesh = mesh_of_all(jax.devices()[:N])
    x, ids, weights, w = case()
    f: Callable[..., Any] = layer
    if policy != "no remat":
        names = jax.checkpoint_policies.save_only_these_names(*NAMES)
        f = jax.checkpoint(layer, policy=names if policy == "save names" else None)

    def loss(x: Any, weights: Any, w: Any, ids: Any) -> Any:
        return (mapped(mesh, f)(x, ids, weights, w) ** 2).sum()

    operands = flat(mesh, x, weights, w.reshape(N, E // N, D, D), ids)
    with jf.Fabric(mesh) as fabric:
        jax.block_until_ready(jax.jit(jax.grad(loss, (0, 1, 2)))(*operands))
        for by_peer in fabric.snapshot().values():
            for row in by_peer.values():
                assert row["messages_sent"] == messages


@pytest.mark.jaxfabric(processes=4)
def test_plans_and_halves_out_of_order() -> None:
    """Four dispatches and eight combines in flight, finished in other orders."""
    mesh = mesh_of_all()
    cases = [
        case(kind, i)[:3]
        for i, kind in enumerate(("skips", "random", "uneven", "one_rank"))
    ]
    operands = [flat(mesh, *c) for c in cases]
    finish = (2, 0, 3, 1)

    def program(*operands: Any) -> Any:
        pending = [
            jf.moe.dispatch_start(*o, axis_name=AXIS, num_experts=E, key=i)
            for i, o in enumerate(operands)
        ]
        done = {i: jf.moe.dispatch_done(pending[i]) for i in finish}
        back = {
            (i, turn): jf.moe.combine_start(
                (1 + turn) * done[i].tokens, done[i].plan, key=(i, turn)
            )
            for turn in range(2)
            for i in reversed(finish)
        }
        y = {name: jf.moe.combine_done(back[name]) for name in sorted(back)}
        again = jf.moe.combine(done[0].tokens, done[0].plan, key="late")
        return [(y[i, 0], y[i, 1]) for i in range(4)], again

    with jf.Fabric(mesh):
        ys, again = mapped(mesh, program)(*operands)
    for (once, twice), (x, ids, weights) in zip(ys, cases, strict=True):
        outs = moe_oracle.dispatch(x, ids, weights, E)
        tokens = np.stack([o.tokens for o in outs])
        same_bits(once, combine_bits(tokens, outs, x.shape))
        same_bits(twice, combine_bits(2 * tokens, outs, x.shape))
    for first, part in local_rows(again).items():
        assert part.tobytes() == local_rows(ys[0][0])[first].tobytes()


@pytest.mark.jaxfabric(processes=4)
def test_an_axis_beside_the_experts() -> None:
    """Two independent groups of two ranks; drops are counted in each."""
    devices = np.array(jax.devices()).reshape(2, 2)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.Mesh(devices, (AXIS, "data"), axis_types=auto)
    both = P(("data", AXIS))
    x, ids, weights, _ = case("random")
    capacity = 7

    def program(x: Any, ids: Any, weights: Any) -> Any:
        d = dispatch(x, ids, weights, capacity=capacity)
        return d.tokens, d.stats.dropped_at_receiver[None]

    arrays = [a.reshape(-1, *a.shape[2:]) for a in (x, ids, weights)]
    with jf.Fabric(mesh):
        tokens, dropped = mapped(mesh, program, both)(
            *(place(mesh, a, both) for a in arrays)
        )
    outs = []
    for group in (slice(0, 2), slice(2, 4)):
        outs += moe_oracle.dispatch(
            x[group], ids[group], weights[group], E, capacity=capacity
        )
    assert sum(o.dropped for o in outs) > 0
    same_bits(tokens, np.stack([o.tokens for o in outs]))
    same_bits(dropped, np.array([[o.dropped] for o in outs], np.int32))


@pytest.mark.jaxfabric(processes=4)
def test_tokens_keep_the_order() -> None:
    """One site in a loop, ordered by its token alone, in two Fabrics at once."""
    mesh = mesh_of_all()
    x, ids, weights, _ = case("random")
    scale = 2.0 / weights.sum(-1).max()

    def program(x: Any, ids: Any, weights: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            total, one, two = carry
            d = dispatch(x * i, ids, weights, token=one, fabric=first)
            y, one = jf.moe.combine(d.tokens, d.plan, token=d.token)
            d = dispatch(x * -i, ids, weights, token=two, fabric=second)
            z, two = jf.moe.combine(d.tokens, d.plan, token=d.token)
            return total + y * scale + z * scale, one, two

        start = jax.tree.map(
            lambda a: lax.pcast(a, AXIS, to="varying"), (jf.token(), jf.token())
        )
        return lax.fori_loop(0, 20, body, (x, *start))[0]

    with jf.Fabric(mesh, name="one") as first, jf.Fabric(mesh, name="two") as second:
        got = mapped(mesh, program)(*flat(mesh, x, ids, weights))
        jax.block_until_ready(got)
        counts = [
            row["messages_sent"]
            for fabric in (first, second)
            for by_peer in fabric.snapshot().values()
            for row in by_peer.values()
        ]
    assert counts == [40] * 6
    for row, part in local_rows(got).items():
        np.testing.assert_allclose(part, x.reshape(-1, D)[row : row + T], atol=1e-4)


def bad_routes(kind: str) -> tuple[np.ndarray, str]:
    """Routes that only rank 2 has wrong, and what the error says."""
    ids = case("random")[1]
    if kind == "too large":
        ids[2, 1, 0] = E
        return ids, rf"\b{E}\b"
    if kind == "negative":
        ids[2, 1, 0] = -2
        return ids, r"-2\b"
    ids[2, 1] = [5, 4, 5]
    return ids, r"ids\[1, 2\] = 5 names this expert a second time"


@pytest.mark.jaxfabric(processes=4)
@pytest.mark.parametrize("kind", ["too large", "negative", "twice"])
def test_bad_routes_of_one_rank(kind: str) -> None:
    """A clear error there and, at once, on the others; the next Fabric works."""
    mesh = mesh_of_all()
    x, good, weights, _ = case("random")
    bad, message = bad_routes(kind)
    f = mapped(mesh, lambda *a: dispatch(*a).tokens)
    meeting = Meeting()
    with jf.Fabric(mesh) as fabric:
        jax.block_until_ready(f(*flat(mesh, x, good, weights)))
        meeting.gather("good")  # an error ends what slower ranks still do
        with pytest.raises((RuntimeError, ValueError), match=message) as raised:
            jax.block_until_ready(f(*flat(mesh, x, bad, weights)))
        print(raised.value)
        assert "dispatch (jit__lambda" in str(raised.value)
        if jax.process_index() != 2:
            assert "rank 2 gave up" in str(raised.value)
        assert fabric.failure() is not None
        meeting.gather("raised")
    with jf.Fabric(mesh):
        jax.block_until_ready(f(*flat(mesh, x, good, weights)))


def test_combine_bits_by_hand() -> None:
    """The expectation itself, on the example of dispatch's docstring."""
    x = np.array([[[1.0]], [[2.0]]], np.float32)
    ids = np.array([[[0, 3]], [[0, 1]]], np.int32)
    weights = np.array([[[0.5, 0.25]], [[0.125, 2.0]]], np.float32)
    outs = moe_oracle.dispatch(x, ids, weights, 4)
    rows = np.stack([o.tokens for o in outs])
    assert combine_bits(rows, outs, x.shape).ravel().tolist() == [0.75, 4.25]
