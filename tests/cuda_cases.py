"""Programs for tests/test_cuda.py.

python cuda_cases.py CASES DEVICES PROCESSES RANK. They also run on devices of the CPU.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxfabric as jf

PORT = 29471
AXIS = "expert"
EXPERTS_PER_RANK = 8


def open_mesh(devices: int, processes: int, rank: int) -> jax.sharding.Mesh:
    """A mesh of the first devices, as many in each process."""
    if processes > 1:
        each = devices // processes
        mine = range(rank * each, (rank + 1) * each)
        jax.distributed.initialize(
            f"127.0.0.1:{PORT}", processes, rank, local_device_ids=list(mine)
        )
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), (AXIS,))


def sharded(mesh: jax.sharding.Mesh, array: np.ndarray) -> jax.Array:
    """The array, its first axis over the ranks."""
    sharding = jax.sharding.NamedSharding(mesh, P(AXIS))
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def routed_tokens(
    total: int, hidden: int, k: int, experts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random x, ids and weights of all ranks' tokens."""
    random = np.random.default_rng(total + hidden)
    x = random.standard_normal((total, hidden), np.float32)
    ids = np.argsort(random.random((total, experts)), axis=1)[:, :k]
    ids = np.where(random.random(ids.shape) < 0.1, -1, ids).astype(np.int32)
    return x, ids, random.random(ids.shape, np.float32)


def operands(
    mesh: jax.sharding.Mesh, tokens: int, hidden: int, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, sharded: so many tokens for each rank."""
    made = routed_tokens(mesh.size * tokens, hidden, k, EXPERTS_PER_RANK * mesh.size)
    x, ids, weights = (sharded(mesh, array) for array in made)
    return x, ids, weights


def same(got: Any, want: Any, what: str) -> None:
    """Compares this process's shards bit for bit."""
    for one, other in zip(got.addressable_shards, want.addressable_shards, strict=True):
        np.testing.assert_array_equal(
            np.asarray(one.data), np.asarray(other.data), err_msg=what
        )


def layer(x, ids, weights, *, implementation, dtype, **options):
    """Dispatch, something per row, combine; all that dispatch tells."""
    d = jf.moe.dispatch(
        x.astype(dtype),
        ids,
        weights,
        axis_name=AXIS,
        num_experts=EXPERTS_PER_RANK * jax.lax.axis_size(AXIS),
        implementation=implementation,
        **options,
    )
    rows = d.tokens
    if d.row_index is not None:
        index = jnp.where(d.row_index < 0, 0, d.row_index)
        rows = jnp.where((d.row_index < 0)[:, None], 0, rows[index])
    y = jf.moe.combine(rows * 2, d.plan)
    if d.row_index is not None:
        y += jf.moe.combine(d.tokens * 3, d.plan, expand=False, weighted=False)
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
        args = operands(mesh, tokens, hidden, 4)
        results = []
        for implementation in ("fabric", "reference"):
            run = functools.partial(
                layer, implementation=implementation, dtype=dtype, **options
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
    x, ids, weights = operands(mesh, 96, 256, 4)
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
            )[0]
            # What follows is compiled alike in both programs, and exact: a sum of
            # integers, products with one and zero.
            y = jax.lax.optimization_barrier(y)
            total = jax.lax.psum((y[0, 0] * 1024).astype(jnp.int32), AXIS)
            mean = total.astype(jnp.float32) / 1024
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
    n = mesh.size
    with fabric:
        row = fabric.window((2, 100), jnp.bfloat16)
        all_to_all = fabric.window((n, 7), jnp.int32)
        pages = fabric.window((8, 5, 3), jnp.float32)

        def step(x, slices, kv, src, to):
            me = jax.lax.axis_index(AXIS)
            right = (me + 1) % n
            token = jf.put(row, x, right, axis_name=AXIS)
            token = jf.put(row, x, me, axis_name=AXIS, offset=100 + 0 * me, token=token)
            token = jf.put(row, x, -1, axis_name=AXIS, token=token)  # nowhere
            got_row, token = jf.wait(row, count=2, axis_name=AXIS, token=token)
            at = jnp.full(n, 7 * me)
            token = jf.scatter(
                all_to_all, slices, at, axis_name=AXIS, id=3, token=token
            )
            got_all, token = jf.wait(
                all_to_all, count=n, id=3, axis_name=AXIS, token=token
            )
            token = jf.put_pages(
                pages, kv, src, to, right, axis_name=AXIS, id=255, token=token
            )
            got_pages, token = jf.wait(pages, id=255, axis_name=AXIS, token=token)
            token = jf.barrier(AXIS, token=token)
            return got_row, got_all, got_pages, token

        random = np.random.default_rng(5)
        run = on_ranks(mesh, step)
        want_pages = np.zeros((n, 8, 5, 3), np.float32)
        for _ in range(3):
            x = random.standard_normal((n, 100)).astype(jnp.bfloat16)
            slices = random.integers(0, 99, (n, n, 7), np.int32)
            kv = random.standard_normal((n, 6, 5, 3), np.float32)
            src = random.integers(-1, 6, (n, 4)).astype(np.int32)
            to = np.stack([random.permutation(8)[:4] for _ in range(n)])
            for rank in range(n):
                for a, b in zip(src[rank], to[rank], strict=True):
                    if a >= 0:
                        want_pages[(rank + 1) % n, b] = kv[rank, a]
            got = run(
                sharded(mesh, x.reshape(-1)),
                sharded(mesh, slices.reshape(n * n, 7)),
                sharded(mesh, kv.reshape(n * 6, 5, 3)),
                sharded(mesh, src.reshape(-1)),
                sharded(mesh, to.astype(np.int32).reshape(-1)),
            )
            wants = (
                np.stack([np.roll(x, 1, 0), x], 1).reshape(2 * n, 100),
                slices.transpose(1, 0, 2).reshape(n * n, 7),
                want_pages.reshape(n * 8, 5, 3),
            )
            for number, want in enumerate(wants):
                same(got[number], sharded(mesh, want), f"result {number}")


def permuted(x: np.ndarray, perm: list[tuple[int, int]]) -> np.ndarray:
    """What an exchange of x[rank] makes."""
    out = np.zeros_like(x)
    for source, target in perm:
        out[target] = x[source]
    return out


def exchange(mesh: jax.sharding.Mesh) -> None:
    """Rings, swaps, some ranks and none; its gradient; a batch."""
    n = mesh.size
    perms = [
        [(i, (i + 1) % n) for i in range(n)],
        [(0, n - 1), (n - 1, 0)],
        [(i, i) for i in range(0, n, 2)],
        [(n - 1, 0)],
        [],
    ]
    random = np.random.default_rng(3)
    kinds: list[tuple[int, Any]] = [(1, np.int8), (1001, jnp.bfloat16), (70000, "f4")]
    for size, dtype in kinds:
        x = random.integers(-9, 9, (n, size)).astype(dtype)

        def step(x):
            results, token = [], jf.token()
            for perm in perms:
                y, token = jf.exchange(x, perm, axis_name=AXIS, token=token)
                results.append(y)
            return results

        run = on_ranks(mesh, step)
        for _ in range(4):
            got = run(sharded(mesh, x.reshape(-1)))
            for perm, y in zip(perms, got, strict=True):
                want = permuted(x, perm).reshape(-1)
                same(y, sharded(mesh, want), f"{size} {dtype} {perm}")

    def gradient(x, w):
        def loss(x):
            rows, token = jf.exchange(x, perms[0], axis_name=AXIS)
            back = jax.vmap(
                lambda row: jf.exchange(row, perms[3], axis_name=AXIS, token=token)[0]
            )
            return (rows * w).sum() + (back(x) * w).sum()

        return jax.grad(loss)(x)

    x, w = random.standard_normal((2, n, 3, 50)).astype(np.float32)
    want = permuted(w, [(d, s) for s, d in perms[0]])
    want += permuted(w, [(d, s) for s, d in perms[3]])
    got = on_ranks(mesh, gradient)(*(sharded(mesh, a.reshape(-1, 50)) for a in (x, w)))
    same(got, sharded(mesh, want.reshape(-1, 50)), "gradient")


def axes(mesh: jax.sharding.Mesh) -> None:
    """Calls over some axes of a mesh, in turns with calls over others.

    Dispatch and combine among the ranks of "expert", exchanges over "data" and over
    both in either order, a put along "data".
    """
    n = mesh.size
    shape = (2, n // 2) if n % 2 == 0 else (1, n)
    names = ("data", AXIS)
    grid = jax.sharding.Mesh(mesh.devices.reshape(shape), names)
    experts = EXPERTS_PER_RANK * shape[1]
    sharding = jax.sharding.NamedSharding(grid, P(names))
    ring = [(i, (i + 1) % n) for i in range(n)]
    # jax.lax.ppermute counts ranks in the order of the mesh, whatever it is given.
    at = np.arange(n).reshape(shape).T.reshape(-1)
    in_mesh_order = (names, [(int(at[a]), int(at[b])) for a, b in ring])
    swap = (("data",), [(i, shape[0] - 1 - i) for i in range(shape[0])])
    overs = {"fabric": ((AXIS, "data"), ring), "reference": in_mesh_order}

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    fabric = jf.Fabric(grid, timeout_s=20, mailbox_bytes=8 << 20, window_bytes=1 << 20)
    with fabric:
        win = fabric.window((64,), jnp.float32)

        def step(x, ids, weights, *, implementation):
            def exchanged(x, over, token):
                if implementation == "fabric":
                    return jf.exchange(x, over[1], axis_name=over[0], token=token)
                return jax.lax.ppermute(x, over[0], over[1]), token

            token, results = jf.token(), []
            for _ in range(3):
                d = jf.moe.dispatch(
                    x,
                    ids,
                    weights,
                    axis_name=AXIS,
                    num_experts=experts,
                    token=token,
                    implementation=implementation,
                )
                y, token = exchanged(d.tokens, swap, d.token)
                y, token = exchanged(y, overs[implementation], token)
                x, token = jf.moe.combine(y, d.plan, token=token)
                if implementation == "fabric":
                    other = shape[0] - 1 - jax.lax.axis_index("data")
                    token = jf.barrier("data", token=token)
                    token = jf.put(win, x[0, :64], other, axis_name="data", token=token)
                    row, token = jf.wait(win, axis_name="data", token=token)
                    token = jf.barrier(names, token=token)
                else:
                    row = jax.lax.ppermute(x[0, :64], *swap)
                results += [x, row]
            return results

        arrays = [place(a) for a in routed_tokens(24 * n, 64, 4, experts)]
        results = []
        for implementation in ("fabric", "reference"):
            run = functools.partial(step, implementation=implementation)
            spec = P(names)
            mapped = jax.shard_map(run, mesh=grid, in_specs=spec, out_specs=spec)
            jitted = jax.jit(mapped)
            for _ in range(4):
                out = jitted(*arrays)
            results.append(out)
        for number, (got, want) in enumerate(zip(*results, strict=True)):
            same(got, want, f"result {number}")


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
        num_experts=EXPERTS_PER_RANK * jax.lax.axis_size(AXIS),
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
    x, ids, weights = operands(mesh, 40, 64, 4)
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
        args = operands(mesh, tokens, hidden, 4)

        def step(x, ids, weights, *, implementation, options=options):
            def start(x):
                return jf.moe.dispatch_start(
                    x,
                    ids,
                    weights,
                    axis_name=AXIS,
                    num_experts=EXPERTS_PER_RANK * mesh.size,
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


def wire(mesh: jax.sharding.Mesh) -> None:
    """e4m3 with block scales: the bits of the oracle of test_moe_wire.py."""
    import test_moe_wire

    assert mesh.size == jax.device_count()
    test_moe_wire.check_over_processes("fabric", "reference")


CASES = {
    "moe": moe,
    "chain": chain,
    "exchange": exchange,
    "gradients": gradients,
    "halves": halves,
}
# These open Fabrics of their own.
ALONE = {
    "primitives": primitives,
    "axes": axes,
    "wire": wire,
}


def run(cases: dict[str, Any], mesh: jax.sharding.Mesh, alone: bool) -> None:
    """Runs those of the cases that the command line names.

    A case that fails ends the process at once: JAX would wait for the other processes.
    """
    for case in sys.argv[1].split(","):
        if case not in cases:
            continue
        began = time.monotonic()
        try:
            if alone:
                cases[case](mesh)
            else:
                with jf.Fabric(
                    mesh, timeout_s=20, mailbox_bytes=64 << 20, window_bytes=1 << 20
                ):
                    cases[case](mesh)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        print(f"passed {case} in {time.monotonic() - began:.1f} s", flush=True)


def command_line(known: Iterable[str]) -> jax.sharding.Mesh:
    """The mesh that the command line asks for; the cases must be known."""
    if unknown := set(sys.argv[1].split(",")) - set(known):
        raise SystemExit(f"no case {sorted(unknown)}")
    devices, processes, rank = map(int, sys.argv[2:5])
    return open_mesh(devices, processes, rank)


if __name__ == "__main__":
    opened = command_line([*CASES, *ALONE])
    run(CASES, opened, alone=False)
    run(ALONE, opened, alone=True)
