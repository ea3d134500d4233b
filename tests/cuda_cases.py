"""Programs for tests/test_cuda.py: python cuda_cases.py CASES PROCESSES RANK."""

from __future__ import annotations

import functools
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxfabric as jf

PORT = 29471
AXIS = "expert"


def open_mesh(processes: int, rank: int) -> jax.sharding.Mesh:
    """A mesh of two GPUs, in one process or two."""
    if processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{PORT}", processes, rank, local_device_ids=[rank]
        )
    return jax.sharding.Mesh(np.array(jax.devices()[:2]), (AXIS,))


def sharded(mesh: jax.sharding.Mesh, array: np.ndarray) -> jax.Array:
    """The array, its first axis over the ranks."""
    sharding = jax.sharding.NamedSharding(mesh, P(AXIS))
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def operands(
    mesh: jax.sharding.Mesh, tokens: int, hidden: int, k: int, experts: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random x, ids and weights of both ranks."""
    random = np.random.default_rng(tokens + hidden)
    x = random.standard_normal((2 * tokens, hidden), np.float32)
    ids = np.argsort(random.random((2 * tokens, experts)), axis=1)[:, :k]
    ids = np.where(random.random(ids.shape) < 0.1, -1, ids).astype(np.int32)
    weights = random.random(ids.shape, np.float32)
    return sharded(mesh, x), sharded(mesh, ids), sharded(mesh, weights)


def same(got: Any, want: Any, what: str) -> None:
    """Compares this process's shards bit for bit."""
    for one, other in zip(got.addressable_shards, want.addressable_shards, strict=True):
        np.testing.assert_array_equal(
            np.asarray(one.data), np.asarray(other.data), err_msg=what
        )


def layer(x, ids, weights, *, implementation, dtype, experts, **options):
    """Dispatch, something per row, combine; all that dispatch tells."""
    d = jf.moe.dispatch(
        x.astype(dtype),
        ids,
        weights,
        axis_name=AXIS,
        num_experts=experts,
        implementation=implementation,
        **options,
    )
    rows = d.tokens
    if d.row_index is not None:
        index = jnp.where(d.row_index < 0, 0, d.row_index)
        rows = jnp.where((d.row_index < 0)[:, None], 0, rows[index])
    y = jf.moe.combine(rows * 2, d.plan)
    return (
        y,
        d.tokens,
        d.group_sizes,
        d.weights,
        d.plan.slot_row,
        d.stats.sent,
        d.stats.received,
        d.stats.dropped_at_receiver[None],
    )


def moe(mesh: jax.sharding.Mesh) -> None:
    """Bits of every result, over dtypes, sizes and options."""
    cases: list[tuple[int, int, Any, dict[str, Any]]] = [
        (64, 256, jnp.bfloat16, {}),
        (64, 100, jnp.float32, {"expand": False}),
        (33, 36, jnp.float16, {"capacity": 40, "expert_alignment": 8}),
        (700, 512, jnp.bfloat16, {"expert_alignment": 4}),
        (1, 8, jnp.float32, {}),
    ]
    for tokens, hidden, dtype, options in cases:
        args = operands(mesh, tokens, hidden, 4, 16)
        results = []
        for implementation in ("fabric", "reference"):
            run = functools.partial(
                layer, implementation=implementation, dtype=dtype, experts=16, **options
            )
            mapped = jax.shard_map(run, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
            results.append(jax.jit(mapped)(*args))
        for number, (got, want) in enumerate(zip(*results, strict=True)):
            same(got, want, f"{tokens}x{hidden} {options} result {number}")


def on_ranks(mesh: jax.sharding.Mesh, step: Any, **options: Any) -> Any:
    """``step`` on each rank's part of its operands, compiled."""
    mapped = jax.shard_map(step, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
    return jax.jit(mapped, **options)


def chain(mesh: jax.sharding.Mesh) -> None:
    """1,000 steps with psum and matrix products between: the reference's bits."""
    x, ids, weights = operands(mesh, 96, 256, 4, 16)
    eye = functools.partial(
        jnp.matmul, b=jnp.eye(256), precision=jax.lax.Precision.HIGHEST
    )

    def step(x, ids, weights, *, implementation):
        for _ in range(4):
            y = layer(
                x,
                ids,
                weights,
                implementation=implementation,
                dtype=jnp.float32,
                experts=16,
            )[0]
            # What follows is compiled alike in both programs, and exact: a sum of
            # two numbers, products with one and zero.
            y = jax.lax.optimization_barrier(y)
            mean = jax.lax.psum(y[0, 0], AXIS) / 2
            x = jax.lax.optimization_barrier(jnp.tanh(eye(y) - mean * 1e-3))
        return x

    results = []
    for implementation in ("fabric", "reference"):
        run = functools.partial(step, implementation=implementation)
        jitted = on_ranks(mesh, run, donate_argnums=0)
        y = x + 0
        for _ in range(250):
            y = jitted(y, ids, weights)
        results.append(jax.block_until_ready(y))
    same(results[0], results[1], "after 1,000 steps")


def primitives(mesh: jax.sharding.Mesh) -> None:
    """put, scatter, put_pages and wait, traced targets and offsets, twice."""
    fabric = jf.Fabric(mesh, name="primitives", timeout_s=20, mailbox_bytes=1 << 20)
    with fabric:
        row = fabric.window((2, 100), jnp.bfloat16)
        both = fabric.window((2, 7), jnp.int32)
        pages = fabric.window((8, 5, 3), jnp.float32)

        def step(x, slices, kv, src, to):
            me = jax.lax.axis_index(AXIS)
            token = jf.put(row, x, 1 - me, axis_name=AXIS, offset=100 * me)
            token = jf.put(row, x, me, axis_name=AXIS, offset=100 * me, token=token)
            token = jf.put(row, x, -1, axis_name=AXIS, token=token)  # nowhere
            got_row, token = jf.wait(row, count=2, axis_name=AXIS, token=token)
            at = jnp.full(2, 7 * me)
            token = jf.scatter(both, slices, at, axis_name=AXIS, id=3, token=token)
            got_both, token = jf.wait(both, count=2, id=3, axis_name=AXIS, token=token)
            token = jf.put_pages(
                pages, kv, src, to, 1 - me, axis_name=AXIS, id=255, token=token
            )
            got_pages, token = jf.wait(pages, id=255, axis_name=AXIS, token=token)
            token = jf.barrier(AXIS, token=token)
            return got_row, got_both, got_pages, token

        random = np.random.default_rng(5)
        run = on_ranks(mesh, step)
        want_pages = np.zeros((2, 8, 5, 3), np.float32)
        for _ in range(3):
            x = random.standard_normal((2, 100)).astype(jnp.bfloat16)
            slices = random.integers(0, 99, (2, 2, 7), np.int32)
            kv = random.standard_normal((2, 6, 5, 3), np.float32)
            src = random.integers(-1, 6, (2, 4)).astype(np.int32)
            to = np.stack([random.permutation(8)[:4] for _ in range(2)])
            for rank in range(2):
                for a, b in zip(src[rank], to[rank], strict=True):
                    if a >= 0:
                        want_pages[1 - rank, b] = kv[rank, a]
            got = run(
                sharded(mesh, x.reshape(-1)),
                sharded(mesh, slices.reshape(4, 7)),
                sharded(mesh, kv.reshape(12, 5, 3)),
                sharded(mesh, src.reshape(-1)),
                sharded(mesh, to.astype(np.int32).reshape(-1)),
            )
            wants = (
                np.concatenate([x, x]),
                slices.transpose(1, 0, 2).reshape(4, 7),
                want_pages.reshape(16, 5, 3),
            )
            for number, want in enumerate(wants):
                same(got[number], sharded(mesh, want), f"result {number}")


def loss(x, ids, weights, *, implementation, halves, **options):
    """A number of each rank that depends on all that is differentiable."""

    def dispatch(*args, **kwargs):
        if halves:
            return jf.moe.dispatch_done(jf.moe.dispatch_start(*args, **kwargs))
        return jf.moe.dispatch(*args, **kwargs)

    def combine(*args):
        if halves:
            return jf.moe.combine_done(jf.moe.combine_start(*args))
        return jf.moe.combine(*args)

    d = dispatch(
        x,
        ids,
        weights,
        axis_name=AXIS,
        num_experts=16,
        implementation=implementation,
        **options,
    )
    rows = d.tokens
    if d.row_index is not None:
        index = jnp.where(d.row_index < 0, 0, d.row_index)
        rows = jnp.where((d.row_index < 0)[:, None], 0, rows[index])
    y = combine(jnp.sin(rows), d.plan)
    return (y * y).sum()[None]


def gradients(mesh: jax.sharding.Mesh) -> None:
    """jax.grad of x and weights, whole calls and halves; and of the gradient."""
    x, ids, weights = operands(mesh, 40, 64, 4, 16)
    options: list[dict[str, Any]] = [
        {},
        {"expand": False},
        {"capacity": 60, "expert_alignment": 8},
    ]
    for case in options:
        results = []
        for implementation, halves in (
            ("fabric", False),
            ("fabric", True),
            ("reference", False),
        ):

            def step(x, ids, weights, case=case, kind=implementation, halves=halves):
                def total(x, weights):
                    value = loss(
                        x,
                        ids,
                        weights,
                        implementation=kind,
                        halves=halves,
                        **case,
                    )
                    return jax.lax.psum(value[0], AXIS)

                return jax.grad(total, (0, 1))(x, weights)

            results.append(on_ranks(mesh, step)(x, ids, weights))
        for got in results[:2]:
            for one, other in zip(got, results[2], strict=True):
                for a, b in zip(
                    one.addressable_shards, other.addressable_shards, strict=True
                ):
                    np.testing.assert_allclose(
                        np.asarray(a.data), np.asarray(b.data), rtol=2e-5, atol=2e-5
                    )


def halves(mesh: jax.sharding.Mesh) -> None:
    """Two dispatches and two combines in flight, many times: the reference's bits."""
    cases = [(64, 256, {}), (700, 512, {"expert_alignment": 4})]
    for tokens, hidden, options in cases:
        args = operands(mesh, tokens, hidden, 4, 16)

        def step(x, ids, weights, *, implementation, options=options):
            def start(x):
                return jf.moe.dispatch_start(
                    x,
                    ids,
                    weights,
                    axis_name=AXIS,
                    num_experts=16,
                    implementation=implementation,
                    **options,
                )

            first, second = start(x), start(x * 3)
            a, b = jf.moe.dispatch_done(first), jf.moe.dispatch_done(second)
            back = [jf.moe.combine_start(d.tokens * 2, d.plan) for d in (a, b)]
            y, z = (jf.moe.combine_done(p) for p in back)
            return y, z, a.tokens, b.tokens, b.plan.slot_row

        results = []
        for implementation in ("fabric", "reference"):
            run = on_ranks(mesh, functools.partial(step, implementation=implementation))
            x = args[0]
            for _ in range(6):
                out = run(x, *args[1:])
                x = out[0]
            results.append(out)
        for number, (got, want) in enumerate(zip(*results, strict=True)):
            same(got, want, f"{tokens}x{hidden} result {number}")


def raises_soon(call: Any) -> str:
    """The text of the error that a call raises, within seconds."""
    began = time.monotonic()
    try:
        jax.block_until_ready(call())
    except jax.errors.JaxRuntimeError as error:
        assert time.monotonic() - began < 10
        return str(error)
    raise AssertionError("nothing was raised")


def replayed(mesh: jax.sharding.Mesh) -> None:
    """A rank that stops sending in a replayed program: the next call raises."""
    fabric = jf.Fabric(mesh, name="replayed", timeout_s=1, mailbox_bytes=1 << 20)
    with fabric:
        win = fabric.window((128,), jnp.float32)

        def step(x, count):
            me = jax.lax.axis_index(AXIS)
            silent = (count[0] == 6) & (me == 1)
            dst = jnp.where(silent, -1, 1 - me)
            token = jf.put(win, x, dst, axis_name=AXIS)
            y, token = jf.wait(win, axis_name=AXIS, token=token)
            token = jf.barrier(AXIS, token=token)
            return y + token[0], count + 1

        run = on_ranks(mesh, step, donate_argnums=(0, 1))
        x = sharded(mesh, np.arange(256, dtype=np.float32)) + 0
        count = sharded(mesh, np.zeros(2, np.int32)) + 0
        asked = []
        for _ in range(7):  # the last of them is the one in vain
            x, count = jax.block_until_ready(run(x, count))
            asked.append(fabric.require_open().calls())
        assert asked[4] == asked[5] == asked[6], f"not replayed: {asked}"
        failed = raises_soon(lambda: run(x, count))
        # Which of the two waits is named depends on whose process this is.
        late = "of which 0 have come", "the message of rank 0 did not come"
        assert any(text in failed for text in late), failed
        assert "within 1.0 s" in failed, failed
        assert fabric.failure() is not None


def lost_peer(mesh: jax.sharding.Mesh) -> None:
    """A process that ends while the other replays: that one's next call raises."""
    fabric = jf.Fabric(mesh, name="lost", timeout_s=1, mailbox_bytes=1 << 20)
    with fabric:
        run = on_ranks(
            mesh,
            lambda token: jf.barrier(AXIS, token=jf.barrier(AXIS, token=token)),
            donate_argnums=0,
        )
        token = sharded(mesh, np.zeros(2, np.float32)) + 0
        for _ in range(6):
            token = jax.block_until_ready(run(token))
        if jax.process_index() == 1:
            print("passed lost_peer", flush=True)
            os._exit(0)
        before = fabric.require_open().calls()
        token = jax.block_until_ready(run(token))
        assert fabric.require_open().calls() == before, "not replayed"
        failed = raises_soon(lambda: run(token))
        assert "barrier on rank 0: the message of rank 1 did not come" in failed
        print("passed lost_peer", flush=True)
        os._exit(0)  # JAX would wait for the other process


def untold(mesh: jax.sharding.Mesh) -> None:
    """A failure that no later call could tell is raised by the end of the block."""
    x, ids, weights = operands(mesh, 32, 64, 4, 16)
    run = functools.partial(
        layer, implementation="fabric", dtype=jnp.float32, experts=16
    )
    failed = ""
    try:
        with jf.Fabric(mesh, timeout_s=2, mailbox_bytes=1 << 20, name="untold"):
            jax.block_until_ready(on_ranks(mesh, run)(x, ids + 100, weights))
    except jf.FabricError as error:
        failed = str(error)
    assert "names no expert" in failed, failed


def bad_expert(mesh: jax.sharding.Mesh) -> None:
    """An expert that is not there: the next call raises, and names the entry."""
    x, ids, weights = operands(mesh, 32, 64, 4, 16)
    run = functools.partial(
        layer, implementation="fabric", dtype=jnp.float32, experts=16
    )
    jitted = on_ranks(mesh, run)
    jax.block_until_ready(jitted(x, ids + 100, weights))
    failed = raises_soon(lambda: jitted(x, ids, weights))
    assert "names no expert" in failed, failed


def wire(mesh: jax.sharding.Mesh) -> None:
    """e4m3 with block scales: the bits of the oracle of test_moe_wire.py."""
    import test_moe_wire

    assert mesh.size == jax.device_count()
    test_moe_wire.check_over_processes("fabric", "reference")


CASES = {
    "moe": moe,
    "chain": chain,
    "bad_expert": bad_expert,
    "gradients": gradients,
    "halves": halves,
}
# These open Fabrics of their own.
ALONE = {
    "primitives": primitives,
    "replayed": replayed,
    "lost_peer": lost_peer,
    "untold": untold,
    "wire": wire,
}


def main() -> None:
    """Runs the cases that the command line names: CASES PROCESSES RANK."""
    cases, processes, rank = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3])
    mesh = open_mesh(processes, rank)
    for case in cases:
        began = time.monotonic()
        if case in ALONE:
            ALONE[case](mesh)
        else:
            with jf.Fabric(
                mesh, timeout_s=20, mailbox_bytes=64 << 20, window_bytes=1 << 20
            ):
                CASES[case](mesh)
        print(f"passed {case} in {time.monotonic() - began:.1f} s", flush=True)


main()
