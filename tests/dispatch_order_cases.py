"""Programs that dead-lock a simpler library; test_dispatch_order.py runs each.

Usage: python dispatch_order_cases.py CASE

Programs return the tokens of their independent calls: XLA would put those that nobody
uses into one buffer, and so run the calls one after the other.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfabric as jf

N = 8
HANG_S = 80
RING = [(i, (i + 1) % N) for i in range(N)]
# More than 512 bytes a rank: smaller programs run their calls one after the other.
X = (np.arange(N * 1024) % 97).reshape(N, 1024).astype(np.float32)
LEFT = np.roll(X, 1, axis=0)
SECOND = np.roll(X, 2, axis=0)

MESH = jax.make_mesh((N,), ("x",), axis_types=(AxisType.Auto,))


def spread(x: np.ndarray) -> jax.Array:
    return jax.device_put(x, NamedSharding(MESH, P("x")))


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(jax.shard_map(f, mesh=MESH, in_specs=P("x"), out_specs=P("x")))


def exchange(x: jax.Array, token: jax.Array | None = None) -> tuple[Any, Any]:
    return jf.exchange(x, RING, axis_name="x", token=token)


def equal(got: jax.Array, want: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(got), want)


def independent_exchanges() -> None:
    """48 calls that nothing orders; devices start them in different orders."""
    run = compiled(lambda x: [exchange(x + i) for i in range(48)])
    x = spread(X)
    for _ in range(15):
        for i, (y, _) in enumerate(run(x)):
            equal(y, LEFT + i)


def independent_mix() -> None:
    """48 barriers, exchanges, dispatches with combines, and puts with waits."""
    win = OPEN.window(1024, np.float32)

    def program(x: jax.Array) -> Any:
        outs, tokens = [], []
        ids = jnp.arange(8, dtype=jnp.int32)[:, None]
        ones = jnp.ones((8, 1), jnp.float32)
        right = (lax.axis_index("x") + 1) % N
        for i in range(12):
            y, token = exchange(x + i)
            outs.append(y)
            outs.append(x + jf.barrier("x")[:, None])
            tokens.append(token)
            d = jf.moe.dispatch(
                *((x + i).reshape(8, 128), ids, ones),
                axis_name="x",
                num_experts=N,
            )
            y, token = jf.moe.combine(d.tokens, d.plan, token=jf.token())
            outs.append(y.reshape(1, 1024))
            tokens.append(token)
        token = jf.token()
        for i in range(12):
            token = jf.put(win, x[0] + i, right, axis_name="x", id=i, token=token)
            y, token = jf.wait(win, axis_name="x", id=i, token=token)
            token = jf.barrier("x", token=token)
            outs.append(y[None])
        return outs, tokens

    run = compiled(program)
    x = spread(X)
    for _ in range(10):
        got, _ = run(x)
        for i in range(12):
            for y, want in zip(
                got[3 * i : 3 * i + 3], (LEFT + i, X, X + i), strict=True
            ):
                equal(y, want)
            equal(got[36 + i], LEFT + i)


def token_chain_beside_psums() -> None:
    """A chain of ours and collectives of XLA's, with no order between the two."""

    def program(x: jax.Array) -> Any:
        outs, sums = [], []
        token = jf.token()
        for i in range(16):
            y, token = exchange(x + i, token)
            token = jf.barrier("x", token=token)
            outs.append(y)
            total = lax.psum(x * (i + 2), "x")
            sums.append(lax.pcast(total, "x", to="varying"))
        return outs, sums

    run = compiled(program)
    x = spread(X)
    for _ in range(20):
        outs, sums = run(x)
        for i in range(16):
            equal(outs[i], LEFT + i)
            equal(sums[i], np.tile(X.sum(0) * (i + 2), (N, 1)))


def psum_of_each_result() -> None:
    """XLA's collective runs on the thread that completes our call."""

    def program(x: jax.Array) -> Any:
        calls = [exchange(x + i) for i in range(16)]
        sums = [lax.psum(y, "x") for y, _ in calls]
        tokens = [token for _, token in calls]
        return [lax.pcast(s, "x", to="varying") for s in sums], tokens

    run = compiled(program)
    x = spread(X)
    for _ in range(20):
        for i, y in enumerate(run(x)[0]):
            equal(y, np.tile(X.sum(0) + N * i, (N, 1)))


def slow_step(x: jax.Array) -> jax.Array:
    """Two exchanges and some milliseconds of work between them."""
    y, token = exchange(x)

    def work(_: Any, m: jax.Array) -> jax.Array:
        return jnp.tanh(m @ m)

    m = lax.fori_loop(0, 40, work, y.reshape(32, 32))
    y = y + 0 * m.reshape(1, 1024)
    return exchange(y, token)[0]


def dependent_steps_ahead() -> None:
    run = compiled(slow_step)
    for _ in range(2):
        y = spread(X)
        kept = []
        for _ in range(100):
            y = run(y)
            kept.append(y)
        for i, y in enumerate(kept, start=1):
            equal(y, np.roll(X, 2 * i, axis=0))


def independent_steps_ahead() -> None:
    run = compiled(slow_step)
    inputs = [spread(X + i) for i in range(100)]
    for _ in range(2):
        kept = [run(x) for x in inputs]
        for i, y in enumerate(kept):
            equal(y, SECOND + i)


def in_threads(work: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def two_threads() -> None:
    """Both dispatch the same program, with different data."""
    run = compiled(slow_step)
    run(spread(X)).block_until_ready()

    def work(index: int) -> None:
        for _ in range(3):
            inputs = [spread(X + 100 * index + i) for i in range(16)]
            for i, y in enumerate([run(x) for x in inputs]):
                equal(y, SECOND + 100 * index + i)

    in_threads(work)


def two_threads_two_programs() -> None:
    """Each dispatches steps of its own, one on the result of the other."""

    def work(index: int) -> None:
        def step(x: jax.Array) -> jax.Array:
            return slow_step(x) + index

        run = compiled(step)
        y = spread(X)
        for _ in range(50):
            y = run(y)
        equal(y, np.roll(X, 100, axis=0) + 50 * index)

    in_threads(work)


def untaken_branches() -> None:
    """Calls in branches, some of which no device takes, beside calls that all make."""

    def program(x: jax.Array, i: jax.Array) -> Any:
        def both(x: jax.Array) -> jax.Array:
            a, _ = exchange(x)
            b, _ = exchange(2 * x)
            return a + b

        outs = [exchange(x)[0]]
        for k in range(8):
            outs.append(lax.cond(i[0] == k, both, lambda x: x, x))
        outs.append(lax.switch(i[0] % 3, [both, lambda x: -x, both], x))
        return outs

    run = compiled(program)
    x = spread(X)
    for i in range(20):
        got = run(x, spread(np.full(N, i, np.int32)))
        equal(got[0], LEFT)
        for k in range(8):
            equal(got[1 + k], 3 * LEFT if i == k else X)
        equal(got[9], -X if i % 3 == 1 else 3 * LEFT)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    assert jax.device_count() == N, "run it with eight virtual devices"
    start = time.monotonic()
    with jf.Fabric(MESH) as OPEN:
        globals()[sys.argv[1]]()
    print(f"right in {time.monotonic() - start:.1f} s")
