"""Tests that several hosts run together; one host runs them as well.

`python -P tests/hosts/run_two_hosts.py` starts them as two hosts would, and
tests/network/test_two_hosts.py on two hosts that share nothing but a network.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from ranks import draw, make_mesh, on_ranks, same, spread

LATE_S = 0.5  # how much later one process comes to a barrier
STEPS = 3  # of each program

needs_native = pytest.mark.skipif(
    importlib.util.find_spec("jaxfabric._native") is None,
    reason="jaxfabric's native module is not built here",
)
pytestmark = pytest.mark.jaxfabric(processes=4, timeout_s=90)


def test_psum() -> None:
    mesh = make_mesh(jax.device_count())
    n = mesh.size
    total = jax.jit(
        jax.shard_map(
            lambda x: lax.psum(x, "x"), mesh=mesh, in_specs=P("x"), out_specs=P()
        )
    )(spread(mesh, np.arange(n, dtype=np.float32)))
    np.testing.assert_array_equal(total.addressable_data(0), [n * (n - 1) / 2])


@needs_native
def test_exchange() -> None:
    import jaxfabric as jf

    mesh = make_mesh(jax.device_count())
    n = mesh.size
    x = draw(np.random.default_rng(1), (n, 3), np.float32)
    ring = [(rank, (rank + 1) % n) for rank in range(n)]
    with jf.Fabric(mesh):
        y = on_ranks(mesh, lambda x: jf.exchange(x, ring, axis_name="x")[0])(x)
        same(mesh, y, np.roll(x, 1, axis=0))


@needs_native
def test_put_and_wait() -> None:
    """Each rank puts to its right neighbour, then to whom the operand names."""
    import jaxfabric as jf

    mesh = make_mesh(jax.device_count())
    n = mesh.size
    rng = np.random.default_rng(2)
    dst = rng.permutation(n).astype(np.int32)
    with jf.Fabric(mesh) as fabric:
        win = fabric.window((2, 1001), jnp.bfloat16)  # not whole words

        def program(x: Any, dst: Any) -> Any:
            right = (lax.axis_index("x") + 1) % n
            token = jf.put(win, x[0], right, axis_name="x", id=1)
            token = jf.put(
                win, x[1], dst, axis_name="x", offset=1001, id=2, token=token
            )
            _, token = jf.wait(win, axis_name="x", id=1, token=token)
            y, token = jf.wait(win, axis_name="x", id=2, token=token)
            return y, jf.barrier("x", token=token)

        run = on_ranks(mesh, program)
        for _ in range(STEPS):
            x = draw(rng, (n, 2, 1001), jnp.bfloat16)
            want = np.stack([np.roll(x[:, 0], 1, axis=0), np.empty_like(x[:, 1])], 1)
            want[dst, 1] = x[:, 1]
            same(mesh, run(x, dst)[0], want)


@needs_native
def test_put_pages() -> None:
    """Each rank writes pages to its right neighbour; some are padding."""
    import jaxfabric as jf

    pages, page = 7, (3, 5)
    mesh = make_mesh(jax.device_count())
    n = mesh.size
    rng = np.random.default_rng(3)
    x = draw(rng, (n, pages, *page), np.float32)
    src = rng.integers(0, pages, (n, pages)).astype(np.int32)
    dst = np.stack([rng.permutation(pages) for _ in range(n)]).astype(np.int32)
    src[:, 2] = -1
    want = np.zeros_like(x)  # as a window begins
    for rank in range(n):
        for a, b in zip(src[rank], dst[rank], strict=True):
            if a >= 0:
                want[(rank + 1) % n, b] = x[rank, a]
    with jf.Fabric(mesh) as fabric:
        win = fabric.window((pages, *page), jnp.float32)

        def program(x: Any, src: Any, dst: Any) -> jax.Array:
            right = (lax.axis_index("x") + 1) % n
            token = jf.put_pages(win, x, src, dst, right, axis_name="x", id=4)
            return jf.wait(win, axis_name="x", id=4, count=1, token=token)[0]

        same(mesh, on_ranks(mesh, program)(x, src, dst), want)


@needs_native
def test_barrier() -> None:
    """Nobody passes before the process that comes late."""
    import jaxfabric as jf

    mesh = make_mesh(jax.device_count())
    token = np.zeros((mesh.size, 1), np.float32)
    with jf.Fabric(mesh):
        run = on_ranks(mesh, lambda token: jf.barrier("x", token=token))
        run(token)
        begin = time.monotonic()
        if jax.process_index() == 0:
            time.sleep(LATE_S)
        run(token)
        assert time.monotonic() - begin > 0.8 * LATE_S


@needs_native
def test_scatter() -> None:
    """Rank s sends slice i to rank i, which puts it at place s."""
    import jaxfabric as jf

    mesh = make_mesh(jax.device_count())
    n = mesh.size
    x = draw(np.random.default_rng(4), (n, n, 3), np.uint8)
    with jf.Fabric(mesh) as fabric:
        win = fabric.window((n, 3), jnp.uint8)

        def program(x: Any) -> Any:
            offsets = jnp.full(n, 3 * lax.axis_index("x"), jnp.int32)
            token = jf.scatter(win, x, offsets, axis_name="x")
            y, token = jf.wait(win, axis_name="x", count=n, token=token)
            return y, jf.barrier("x", token=token)

        run = on_ranks(mesh, program)
        for _ in range(STEPS):
            same(mesh, run(x)[0], x.transpose(1, 0, 2))


@needs_native
@pytest.mark.parametrize("kind", ["skips", "empty_ranks"])
def test_dispatch_combine_and_gradients(kind: str) -> None:
    """Small whole numbers, so that every sum is exact in any order."""
    import jaxfabric as jf

    t, d, k = 6, 4, 3
    mesh = make_mesh(jax.device_count())
    n = mesh.size
    experts = 2 * n
    rng = np.random.default_rng(5)
    x, dy = (rng.integers(-9, 9, (n, t, d)).astype(np.float32) for _ in range(2))
    ids = moe_oracle.routing(kind, rng, n, t, k, experts)
    weights = rng.integers(1, 5, (n, t, k)).astype(np.float32)

    def program(x: Any, ids: Any, weights: Any, dy: Any) -> Any:
        def layer(x: Any, weights: Any) -> Any:
            sent = jf.moe.dispatch(x, ids, weights, axis_name="x", num_experts=experts)
            return jf.moe.combine(2 * sent.tokens, sent.plan), sent.tokens

        y, gradients, rows = jax.vjp(layer, x, weights, has_aux=True)
        return rows, y, *gradients(dy)

    factor = 2 * np.where(ids < 0, 0, weights).sum(-1, keepdims=True)
    want = (
        np.stack([o.tokens for o in moe_oracle.dispatch(x, ids, weights, experts)]),
        factor * x,
        factor * dy,
        np.where(ids < 0, 0, 2 * (x * dy).sum(-1, keepdims=True)),
    )
    with jf.Fabric(mesh):
        run = on_ranks(mesh, program)
        for _ in range(STEPS):
            got = run(x, ids, weights, dy)
            for mine, expected in zip(got, want, strict=True):
                same(mesh, mine, expected.astype(np.float32))
