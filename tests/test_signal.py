"""signal: a program bumps a watcher, at its place in the program."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ranks import make_mesh, on_ranks

import jaxfabric as jf

PATIENCE_S = 30


@pytest.fixture
def engine() -> Iterator[jf.TransferEngine]:
    with jf.TransferEngine() as engine:
        yield engine


def until(values: queue.Queue[int], last: int) -> list[int]:
    """What the callback saw, up to ``last``: callbacks may skip values."""
    seen = [values.get(timeout=PATIENCE_S)]
    while seen[-1] < last:
        seen.append(values.get(timeout=PATIENCE_S))
    return seen


@pytest.mark.smoke
def test_each_execution_bumps_once(engine: jf.TransferEngine) -> None:
    values: queue.Queue[int] = queue.Queue()
    watcher = engine.alloc_watcher(lambda before, after: values.put(after))
    step = jax.jit(lambda x, tok: (x * 2, jf.signal(watcher, by=3, token=tok)))
    x, token = jnp.ones(4), jf.token()
    for _ in range(5):
        x, token = step(x, token)
    assert until(values, 15)[-1] == 15
    assert watcher.value == 15
    np.testing.assert_array_equal(x, np.full(4, 32.0))


def test_it_comes_at_its_place(engine: jf.TransferEngine) -> None:
    """What the program did before it is done, and nothing that comes after."""
    values: queue.Queue[int] = queue.Queue()
    watcher = engine.alloc_watcher(lambda before, after: values.put(after))
    steps: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        def record(token: Any) -> Any:
            steps.append((name, watcher.value))
            return np.asarray(token)

        return record

    def program(token: jax.Array) -> jax.Array:
        like = jax.ShapeDtypeStruct((1,), jnp.float32)
        token = jax.pure_callback(note("before"), like, token)
        token = jf.signal(watcher, token=token)
        return jax.pure_callback(note("after"), like, token)

    jax.jit(program)(jf.token()).block_until_ready()
    assert steps == [("before", 0), ("after", 1)]
    assert until(values, 1) == [1]


def test_loops_branches_and_every_device(engine: jf.TransferEngine) -> None:
    values: queue.Queue[int] = queue.Queue()
    watcher = engine.alloc_watcher(lambda before, after: values.put(after))
    mesh = make_mesh(4)

    def program(rank: jax.Array) -> jax.Array:
        def body(_: Any, token: jax.Array) -> jax.Array:
            return jax.lax.cond(
                rank % 2 == 0,
                lambda t: jf.signal(watcher, token=t),
                lambda t: t,
                token,
            )

        token = jax.lax.pcast(jf.token(), "x", to="varying")
        return jax.lax.fori_loop(0, 10, body, token)

    on_ranks(mesh, program)(np.arange(4, dtype=np.int32))
    assert until(values, 20)[-1] == 20


def test_outside_of_jit(engine: jf.TransferEngine) -> None:
    watcher = engine.alloc_watcher(lambda before, after: None)
    jf.signal(watcher).block_until_ready()
    assert watcher.value == 1


def test_a_closed_watcher_is_named(engine: jf.TransferEngine) -> None:
    watcher = engine.alloc_watcher(lambda before, after: None)
    step = jax.jit(lambda token: jf.signal(watcher, token=token))
    step(jf.token()).block_until_ready()
    watcher.close()
    # Which of the two it is depends on jax; see docs/sharp-bits.md.
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match="there is no watcher"
    ):
        step(jf.token()).block_until_ready()


def test_refusals(engine: jf.TransferEngine) -> None:
    watcher = engine.alloc_watcher(lambda before, after: None)
    with pytest.raises(TypeError, match="alloc_watcher"):
        jf.signal(7)
    with pytest.raises(ValueError, match="by=0"):
        jf.signal(watcher, by=0)
    with pytest.raises(TypeError, match="float32"):
        jf.signal(watcher, token=jnp.zeros(2))
    with pytest.raises(NotImplementedError, match="no derivative"):
        jax.grad(lambda t: jf.signal(watcher, token=t)[0])(jf.token())
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(lambda t: jf.signal(watcher, token=t))(jnp.zeros((2, 1)))
