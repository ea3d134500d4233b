"""Which call meets which: section 6 of the architecture, "order is data".

Calls are matched by what they are, so ranks may run and trace them in any order.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from ranks import channels, make_mesh, on_ranks, run_child, same, spread

import jaxfabric as jf
from jaxfabric import _sites

N = 4
RING = [(i, (i + 1) % N) for i in range(N)]

# Exchanges as our primitive and as JAX's, so that each program is its own oracle.
MOVES: dict[str, Callable[[Any], Any]] = {
    "ours": lambda x: jf.exchange(x, RING, axis_name="x")[0],
    "jax": lambda x: lax.ppermute(x, "x", RING),
}


def layer(move: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: jnp.sin(move(x)) + x


def jit_twice(move: Any, x: Any) -> Any:
    f = jax.jit(layer(move))
    return f(x) + 2 * f(3 * x)


def jit_in_jit(move: Any, x: Any) -> Any:
    inner = jax.jit(layer(move))
    outer = jax.jit(lambda x: inner(x) - inner(2 * x))
    return outer(x) + 3 * outer(x + 1)


def checkpoint_twice(move: Any, x: Any) -> Any:
    f = jax.checkpoint(layer(move))
    return f(x) + 2 * f(3 * x)


def scan_twice(move: Any, x: Any) -> Any:
    f = jax.jit(layer(move))

    def body(x: Any, _: None) -> Any:
        return f(x) - f(2 * x), None

    return sum(lax.scan(body, k * x, None, length=3)[0] for k in (1, 2))


def loop_twice(move: Any, x: Any) -> Any:
    f = jax.jit(layer(move))
    return sum(lax.fori_loop(0, 2, lambda _, x: f(x), k * x) for k in (1, 2))


def branch_twice(move: Any, x: Any) -> Any:
    f = jax.jit(layer(move))

    def choose(x: Any) -> Any:
        return lax.cond(lax.psum(1, "x") == N, f, lambda x: f(-x), x)

    return choose(x) + choose(2 * x)


def custom_vjp_twice(move: Any, x: Any) -> Any:
    f = jax.custom_vjp(layer(move))
    f.defvjp(lambda x: (f(x), x), lambda x, ct: (move(ct) * x,))
    return f(x) + 2 * f(3 * x)


def four_layers_one_checkpoint(move: Any, x: Any) -> Any:
    f = jax.checkpoint(layer(move))
    return f(f(f(f(x))))


BODIES = [
    jit_twice,
    jit_in_jit,
    checkpoint_twice,
    scan_twice,
    loop_twice,
    branch_twice,
    custom_vjp_twice,
    four_layers_one_checkpoint,
]


def program(body: Any, move: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def forward_and_gradient(x: Any) -> Any:
        if body is loop_twice:  # fori_loop of a static trip count is a scan
            return body(move, x)
        return body(move, x), jax.grad(lambda x: body(move, x).sum())(x)

    return forward_and_gradient


@pytest.mark.smoke
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_calls_of_one_body_have_channels_of_their_own(body: Any) -> None:
    mesh = make_mesh(N)
    x = np.random.default_rng(0).normal(size=(N, 2000)).astype(np.float32)
    with jf.Fabric(mesh):
        run = on_ranks(mesh, program(body, MOVES["ours"]))
        want = on_ranks(mesh, program(body, MOVES["jax"]))(x)
        for _ in range(10):
            got = run(x)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        mapped = jax.jit(
            jax.shard_map(
                program(body, MOVES["ours"]),
                mesh=mesh,
                in_specs=P("x"),
                out_specs=P("x"),
            )
        )
        found = channels(mapped, spread(mesh, x))
    assert len(found) >= 2
    assert len(set(found)) == len(found)


def test_one_shard_map_called_twice_in_a_program() -> None:
    mesh = make_mesh(N)
    x = np.arange(N * 3, dtype=np.float32).reshape(N, 3)
    with jf.Fabric(mesh):
        mapped = jax.shard_map(
            MOVES["ours"], mesh=mesh, in_specs=P("x"), out_specs=P("x")
        )
        for f in (mapped, jax.jit(mapped)):
            twice = jax.jit(lambda x, f=f: f(x) + 10 * f(-x))
            found = channels(twice, spread(mesh, x))
            assert len(set(found)) == len(found) == 2
            same(mesh, twice(spread(mesh, x)), -9 * np.roll(x, 1, axis=0))


def test_channels_do_not_depend_on_what_was_lowered_before() -> None:
    mesh = make_mesh(N)
    x = np.zeros((N, 3), np.float32)

    def lowered(body: Any) -> list[int]:
        mapped = jax.shard_map(
            program(body, MOVES["ours"]), mesh=mesh, in_specs=P("x"), out_specs=P("x")
        )
        return channels(jax.jit(mapped), spread(mesh, x))

    with jf.Fabric(mesh):
        before = {body: lowered(body) for body in BODIES}
        jax.clear_caches()
        after = {body: lowered(body) for body in reversed(BODIES)}
    assert before == after


def test_names_keys_and_shapes_make_channels() -> None:
    mesh = make_mesh(N)
    seen = set()
    with jf.Fabric(mesh):
        for name in ("f", "g"):
            for key in (None, "a", 1):
                for width in (2, 3):

                    def call(x: Any, key: Any = key) -> Any:
                        return jf.exchange(x, RING, axis_name="x", key=key)[0]

                    call.__name__ = name
                    mapped = jax.shard_map(
                        call, mesh=mesh, in_specs=P("x"), out_specs=P("x")
                    )
                    x = np.zeros((N, width), np.float32)
                    seen.update(channels(jax.jit(mapped), spread(mesh, x)))
    assert len(seen) == 12


def test_what_cannot_be_told_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With JAX's caches in place the calls of one body share a channel.

    This is what a jax would do whose lowering `_sites` does not know. Calls are kept
    apart by a late operand, and by results that are all used: XLA gives unused tokens
    one buffer, which orders their calls.
    """
    monkeypatch.setattr(_sites, "_keep_out_of_caches", lambda *_: None)
    mesh = make_mesh(N)
    x = np.random.default_rng(0).normal(size=(N, 1 << 12)).astype(np.float32)

    def late(rank: Any, x: Any) -> Any:
        time.sleep(0.1 * (int(rank) == 0))
        return np.asarray(x)

    def program(keyed: bool) -> Any:
        shared = jax.jit(lambda x: jf.exchange(x, RING, axis_name="x"))

        def f(x: Any, i: int) -> Any:
            if keyed:
                return jf.exchange(x, RING, axis_name="x", key=i)
            return shared(x)

        def body(x: Any) -> Any:
            first = jax.pure_callback(late, jax.typeof(x), lax.axis_index("x"), x)
            return [f(first if i == 0 else x + i, i) for i in range(12)]

        return on_ranks(mesh, body)

    with jf.Fabric(mesh, timeout_s=20):
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=r"token=.*key="
        ) as refusal:
            program(keyed=False)(x)
        assert "nothing orders them" in str(refusal.value)
    with jf.Fabric(mesh) as fabric:
        for i, (y, _) in enumerate(program(keyed=True)(x)):
            same(mesh, y, np.roll(x + np.float32(i), 1, axis=0))
        assert fabric.failure() is None


def make_program(index: int) -> Callable[[Any], Any]:
    def body(x: Any) -> Any:
        y, token = jf.exchange(x * (index + 1), RING, axis_name="x")
        z, _ = jf.exchange(y + index, RING, axis_name="x", token=token)
        return jf.exchange(x, RING, axis_name="x")[0] + z

    body.__name__ = f"program_{index}"
    return body


def expected(index: int, x: np.ndarray) -> np.ndarray:
    y = np.roll(x * np.float32(index + 1), 1, axis=0)
    return np.roll(x, 1, axis=0) + np.roll(y + np.float32(index), 1, axis=0)


@pytest.mark.smoke
@pytest.mark.jaxfabric(processes=4)
def test_ranks_that_trace_in_different_order() -> None:
    """Rank r compiles program r first; then all run them in one order."""
    mesh = make_mesh(4)
    x = np.random.default_rng(0).integers(-9, 9, (4, 5)).astype(np.float32)
    sharded = spread(mesh, x)
    me = jax.process_index()
    with jf.Fabric(mesh) as fabric:
        compiled: dict[int, Any] = {}
        for shift in range(4):
            index = (shift + me) % 4
            mapped = jax.shard_map(
                make_program(index), mesh=mesh, in_specs=P("x"), out_specs=P("x")
            )
            compiled[index] = jax.jit(mapped).lower(sharded).compile()
        for _ in range(3):
            for index in range(4):
                same(mesh, compiled[index](sharded), expected(index, x))
        meet(mesh)
        assert fabric.failure() is None


def meet(mesh: Any) -> None:
    """All ranks are done before one of them closes its Fabric."""
    on_ranks(mesh, lambda x: x + jf.barrier("x"))(np.zeros((N, 1), np.float32))


@pytest.mark.jaxfabric(processes=4)
def test_steps_queued_ahead_without_dependency() -> None:
    """Executions of one program on one device do not overlap, or are refused.

    60 steps of different data, not ordered by anything, on ranks of different speed.
    """
    mesh = make_mesh(4)
    rng = np.random.default_rng(0)
    steps = [rng.integers(-9, 9, (4, 300)).astype(np.float32) for _ in range(60)]
    with jf.Fabric(mesh):

        def step(x: Any) -> Any:
            def slow(i: Any, x: Any) -> Any:
                return x + 0 * jnp.sin(x * i)

            x = lax.fori_loop(0, lax.axis_index("x") * 20, slow, x)
            a = jf.exchange(x, RING, axis_name="x")[0]
            b = jf.exchange(2 * x, RING, axis_name="x")[0]
            return jnp.stack([a, b])

        mapped = jax.jit(
            jax.shard_map(
                lambda x: step(x[0])[None], mesh=mesh, in_specs=P("x"), out_specs=P("x")
            )
        )
        queued = [mapped(spread(mesh, x)) for x in steps]
        for x, y in zip(steps, queued, strict=True):
            left = np.roll(x, 1, axis=0)
            same(mesh, y, np.stack([left, 2 * left], axis=1))
        meet(mesh)


CACHED = """
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
import jaxfabric as jf
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
mesh = jax.make_mesh((8,), ("x",))
ring = [(i, (i + 1) % 8) for i in range(8)]
def step(x):
    f = jax.jit(lambda x: jf.exchange(x, ring, axis_name="x")[0])
    return f(x) + 10 * f(-x)
x = jax.device_put(np.arange(8, dtype=np.float32), jax.NamedSharding(mesh, P("x")))
with jf.Fabric(mesh):
    f = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
    y = np.asarray(f(x))
print(sum("cache_hits" in h for h in hits), *y.astype(int).tolist())
"""


def test_a_warm_compile_cache(tmp_path: pathlib.Path) -> None:
    """The second process takes the program from the cache; targets go by name."""
    cold = run_child("-c", CACHED, str(tmp_path)).split()
    warm = run_child("-c", CACHED, str(tmp_path)).split()
    want = [str(-9 * ((i - 1) % 8)) for i in range(8)]
    assert cold[1:] == warm[1:] == want
    assert int(cold[0]) == 0
    assert int(warm[0]) >= 1
