"""Thousands of MoE steps with fresh routes, each checked inside of the program.

All values are small whole numbers, so every sum is exact in float32 whatever its order,
and a step must equal the dense computation with all experts bit for bit.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_cases import AXIS, mesh_of_all, place
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxfabric as jf

T, D, K, E = 4, 8, 3, 16
STEPS_PER_CALL = 100
SHORT, LONG = 1_000, 10_000  # steps
CHAOS = {"seed": 7, "pieces_max": 5, "delay_max_s": 2e-4, "again_share": 0.2}


def routes(key: jax.Array, step: jax.Array) -> jax.Array:
    """ids int32[T, K]: any experts; in some steps few, one rank's, or none."""
    order, skip, few = jax.random.split(key, 3)
    ids = jnp.argsort(jax.random.uniform(order, (T, E)), axis=1)[:, :K]
    ids = jnp.where(step % 5 == 1, jnp.broadcast_to(jnp.arange(K), (T, K)), ids)
    share = jnp.where(step % 3 == 0, 0.7, 0.1)
    ids = jnp.where(jax.random.uniform(skip, (T, K)) < share, -1, ids)
    idle = (jax.random.uniform(few, ()) < 0.3) & (step % 4 == 2)
    return jnp.where(idle, -1, ids).astype(jnp.int32)


def whole_numbers(key: jax.Array, shape: tuple[int, ...], most: int) -> jax.Array:
    return jax.random.randint(key, shape, -most, most + 1).astype(jnp.float32)


def dense(x: jax.Array, ids: jax.Array, weights: jax.Array, w: jax.Array) -> jax.Array:
    """What the layer must give, with the experts of all ranks at hand."""
    rows = jnp.einsum("td,tkdf->tkf", x, w[jnp.maximum(ids, 0)])
    return (rows * jnp.where(ids < 0, 0, weights)[..., None]).sum(1)


def wander(key: jax.Array, x: jax.Array) -> jax.Array:
    """Takes a different time on each rank; returns x."""
    turns = jax.random.randint(key, (), 0, 200)
    return lax.fori_loop(0, turns, lambda _, x: jnp.abs(x) * jnp.sign(x), x)


def step(w: jax.Array, number: jax.Array, wrong_step: int) -> jax.Array:
    """One step on one rank; int32[2]: wrong elements of the result and of the tail."""
    key = jax.random.fold_in(jax.random.key(number), lax.axis_index(AXIS))
    of_x, of_ids, of_weights, of_time = jax.random.split(key, 4)
    x = whole_numbers(of_x, (T, D), 9)
    ids = routes(of_ids, number)
    weights = whole_numbers(of_weights, (T, K), 4)
    wrong = jnp.where(number == wrong_step, 1, 0) * (lax.axis_index(AXIS) == 1)
    sent = wander(of_time, x).at[0, 0].add(wrong * 2.0**-8)
    d = jf.moe.dispatch(sent, ids, weights, axis_name=AXIS, num_experts=E)
    local = E // lax.axis_size(AXIS)
    mine = lax.dynamic_slice_in_dim(w, lax.axis_index(AXIS) * local, local)
    y = jf.moe.combine(lax.ragged_dot(d.tokens, mine, d.group_sizes), d.plan)
    tail = jnp.arange(len(d.tokens)) >= d.group_sizes.sum()
    return jnp.stack(
        [
            (y != dense(x, ids, weights, w)).sum(),
            ((d.tokens != 0) & tail[:, None]).sum(),
        ]
    ).astype(jnp.int32)


def soak(steps: int, wrong_step: int = -1, **options: Any) -> np.ndarray:
    """int[2], the sum over this process's ranks of what all steps found."""
    mesh = mesh_of_all()
    rng = np.random.default_rng(0)
    w = place(mesh, rng.integers(-3, 4, (E, D, D)).astype(np.float32), P())

    def many(w: jax.Array, first: jax.Array) -> jax.Array:
        def body(i: jax.Array, found: jax.Array) -> jax.Array:
            return found + step(w, first + i, wrong_step)

        none = lax.pcast(jnp.zeros(2, jnp.int32), AXIS, to="varying")
        return lax.fori_loop(0, STEPS_PER_CALL, body, none)[None]

    specs = (P(), P())
    f = jax.jit(jax.shard_map(many, mesh=mesh, in_specs=specs, out_specs=P(AXIS)))
    begin = time.monotonic()
    with jf.Fabric(mesh, **options) as fabric:
        found = [
            f(w, place(mesh, np.array(first, np.int32), P()))
            for first in range(0, steps, STEPS_PER_CALL)
        ]
        total = sum(
            np.asarray(shard.data).sum(0)
            for each in found
            for shard in each.addressable_shards
        )
        assert fabric.failure() is None
    each_us = (time.monotonic() - begin) / steps * 1e6
    print(f"{steps} steps, {each_us:.0f} us a step: {total} wrong")
    return np.asarray(total)


def check(steps: int, **options: Any) -> None:
    assert soak(steps, **options).tolist() == [0, 0]


LENGTHS = [
    pytest.param(SHORT, id="short"),
    pytest.param(LONG, id="long", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("steps", LENGTHS)
def test_eight_devices_of_one_process(steps: int) -> None:
    check(steps)


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.jaxfabric(processes=4, devices_per_process=2, timeout_s=280)
def test_four_processes_of_two_devices(steps: int) -> None:
    check(steps)


@pytest.mark.parametrize("steps", LENGTHS)
def test_chaos(steps: int) -> None:
    check(steps, transport="fake", chaos=CHAOS)


def test_a_wrong_bit_is_found() -> None:
    """A rank sends one element that differs by 2^-8, in one of the steps."""
    wrong = soak(STEPS_PER_CALL, wrong_step=37)
    assert 1 <= wrong[0] <= D
    assert wrong[1] == 0
