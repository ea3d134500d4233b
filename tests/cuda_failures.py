"""Failing programs for tests/test_cuda.py.

python cuda_failures.py CASES DEVICES PROCESSES RANK. Those in replayed programs are for
GPUs, and `lost_peer` for several processes.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cuda_cases import (
    AXIS,
    EXPERTS_PER_RANK,
    command_line,
    layer,
    on_ranks,
    operands,
    run,
    sharded,
)

import jaxfabric as jf

# Long enough for the processes to compile, one before the other.
TIMEOUT_S = 4


def raises_soon(call: Any) -> str:
    """The text of the error that a call raises, within seconds."""
    began = time.monotonic()
    try:
        jax.block_until_ready(call())
    except jax.errors.JaxRuntimeError as error:
        assert time.monotonic() - began < 3 * TIMEOUT_S
        return str(error)
    raise AssertionError("nothing was raised")


def check_replayed(asked: list[int]) -> None:
    """Whether XLA stopped asking for the calls of a program."""
    assert asked[-3] == asked[-2] == asked[-1], f"not replayed: {asked}"


def in_replayed(mesh: jax.sharding.Mesh, step: Any, name: str) -> str:
    """The error after ``step(win, x, count)`` failed in its seventh execution."""
    fabric = jf.Fabric(mesh, name=name, timeout_s=TIMEOUT_S, mailbox_bytes=1 << 20)
    with fabric:
        win = fabric.window((128,), jnp.float32)
        program = on_ranks(mesh, functools.partial(step, win), donate_argnums=(0, 1))
        x = sharded(mesh, np.arange(128 * mesh.size, dtype=np.float32)) + 0
        count = sharded(mesh, np.zeros(mesh.size, np.int32)) + 0
        asked = []
        for _ in range(7):  # the last of them is the one in vain
            x, count = jax.block_until_ready(program(x, count))
            asked.append(fabric.require_open().calls())
        check_replayed(asked)
        failed = raises_soon(lambda: program(x, count))
        assert fabric.failure() is not None
    return failed


def silent_rank(mesh: jax.sharding.Mesh) -> None:
    """A rank that stops sending in a replayed program: the next call raises."""

    def step(win, x, count):
        me = jax.lax.axis_index(AXIS)
        silent = (count[0] == 6) & (me == mesh.size - 1)
        dst = jnp.where(silent, -1, (me + 1) % mesh.size)
        token = jf.put(win, x, dst, axis_name=AXIS)
        y, token = jf.wait(win, axis_name=AXIS, token=token)
        token = jf.barrier(AXIS, token=token)
        return y + token[0], count + 1

    failed = in_replayed(mesh, step, "silent")
    # Whether it is the wait or the barrier after it depends on whose process this is.
    wait = "wait on rank 0: 1 transfers into the window, of which 0 have come"
    assert wait in failed or "the message of rank 0 did not come" in failed, failed
    assert f"within {TIMEOUT_S}.0 s" in failed, failed


def bad_put(mesh: jax.sharding.Mesh) -> None:
    """An offset outside of the window in a replayed program: the next call raises."""

    def step(win, x, count):
        me = jax.lax.axis_index(AXIS)
        offset = jnp.where(count[0] == 6, 1 << 20, 0)
        token = jf.put(win, x, me, axis_name=AXIS, offset=offset)
        return x + token[0], count + 1

    failed = in_replayed(mesh, step, "bad put")
    assert "put on rank" in failed, failed
    assert "outside of the group or the window" in failed, failed


def ring_step(win: Any, x: Any) -> Any:
    """x from the rank before this one, through a window and an expert's rank."""
    me, n = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)
    token = jf.put(win, x, (me + 1) % n, axis_name=AXIS)
    y, token = jf.wait(win, axis_name=AXIS, token=token)
    d = jf.moe.dispatch(
        y[None],
        EXPERTS_PER_RANK * ((me + 1) % n).astype(jnp.int32)[None, None],
        jnp.ones((1, 1)),
        axis_name=AXIS,
        num_experts=EXPERTS_PER_RANK * n,
        token=token,
    )
    return jf.moe.combine(d.tokens, d.plan)[0]


def reopened(mesh: jax.sharding.Mesh) -> None:
    """A program that XLA replays runs under its Fabric's successor, too."""
    n = mesh.size
    want = np.arange(128 * n, dtype=np.float32).reshape(n, 128)
    x = sharded(mesh, want.reshape(-1)) + 0
    program, junk = None, []
    for generation in range(3):
        junk.append(sharded(mesh, np.ones(n << 22, np.float32)) + generation)
        with jf.Fabric(
            mesh, name="reopened", timeout_s=TIMEOUT_S, mailbox_bytes=1 << 20
        ) as fabric:
            win = fabric.window((128,), jnp.float32)
            if program is None:
                step = functools.partial(ring_step, win)
                program = on_ranks(mesh, step, donate_argnums=0)
            asked = []
            for _ in range(7):
                x = jax.block_until_ready(program(x))
                asked.append(fabric.require_open().calls())
                want = np.roll(want, 1, axis=0)
            check_replayed(asked)
            print(f"generation {generation}: {asked=}", flush=True)
        for shard in x.addressable_shards:
            begin = shard.index[0].start or 0
            np.testing.assert_array_equal(np.asarray(shard.data), want[begin // 128])


def resized(mesh: jax.sharding.Mesh) -> None:
    """A Fabric of other sizes refuses programs that XLA replays from before.

    Compiled anew they run; so do those that have nothing of what is another.
    """
    n = mesh.size
    expected = np.roll(np.arange(128 * n, dtype=np.float32).reshape(n, 128), 7, axis=0)

    def put_step(win: Any, x: Any) -> Any:
        me = jax.lax.axis_index(AXIS)
        token = jf.put(win, x, (me + 1) % n, axis_name=AXIS)
        y, token = jf.wait(win, axis_name=AXIS, token=token)
        return y + jf.barrier(AXIS, token=token)[0]

    def meet_step(x: Any) -> Any:
        return x + jf.barrier(AXIS, token=x[:1] * 0)[0]

    def new(step: Any) -> Any:
        return on_ranks(mesh, step, donate_argnums=0)

    def run_it(program: Any, want: np.ndarray) -> None:
        x = sharded(mesh, np.arange(128 * n, dtype=np.float32)) + 0
        for _ in range(7):
            x = jax.block_until_ready(program(x))
        for shard in x.addressable_shards:
            begin = shard.index[0].start or 0
            np.testing.assert_array_equal(np.asarray(shard.data), want[begin // 128])

    def refused(program: Any, why: str) -> None:
        x = sharded(mesh, np.arange(128 * n, dtype=np.float32)) + 0
        text = raises_soon(lambda: program(x))
        assert why in text, text
        assert "jax.clear_caches()" in text, text

    def opened(mailbox_bytes: int) -> jf.Fabric:
        return jf.Fabric(
            mesh, name="resized", timeout_s=TIMEOUT_S, mailbox_bytes=mailbox_bytes
        )

    same = np.arange(128 * n, dtype=np.float32).reshape(n, 128)
    with opened(1 << 20) as fabric:
        ring = new(functools.partial(put_step, fabric.window((128,), jnp.float32)))
        meet = new(meet_step)
        run_it(ring, expected)
        run_it(meet, same)
    with opened(1 << 20) as fabric:
        fabric.window((96,), jnp.float32)  # in the place of the one before
        refused(ring, "window 0 had another size or place")
        run_it(meet, same)
    with opened(1 << 20) as fabric:
        fabric.window((128,), jnp.float32)
        run_it(ring, expected)
    with opened(1 << 21) as fabric:
        win = fabric.window((128,), jnp.float32)
        refused(ring, "window_bytes or mailbox_bytes was another")
        refused(meet, "window_bytes or mailbox_bytes was another")
        run_it(new(functools.partial(put_step, win)), expected)
        jax.clear_caches()
        run_it(meet, same)


def waiting_call(mesh: jax.sharding.Mesh, name: str, fabric: jf.Fabric) -> Any:
    """A program of one operation that waits for others, from x to x.

    Ranks put into, or exchange with, the rank before them.
    """
    n = mesh.size
    win = fabric.window((4,), jnp.float32)

    def dispatched(token: Any) -> jf.moe.Dispatched:
        ids = EXPERTS_PER_RANK * jnp.arange(n, dtype=jnp.int32)[:, None]
        return jf.moe.dispatch(
            *(jnp.ones((n, 16)), ids, jnp.ones((n, 1))),
            axis_name=AXIS,
            num_experts=EXPERTS_PER_RANK * n,
            token=token,
            fabric=fabric,
        )

    def plan(token: Any) -> Any:
        d = dispatched(token)
        return d.tokens, d.plan

    def step(x: Any, *routed: Any) -> Any:
        token = x[:1] * 0
        if name == "barrier":
            token = jf.barrier(AXIS, token=token, fabric=fabric)
        elif name == "exchange":
            ring = [(i, (i - 1) % n) for i in range(n)]
            return jf.exchange(x, ring, axis_name=AXIS, fabric=fabric)[0]
        elif name == "wait":
            left = (jax.lax.axis_index(AXIS) - 1) % n
            token = jf.put(win, x, left, axis_name=AXIS, fabric=fabric)
            return jf.wait(win, axis_name=AXIS, token=token, fabric=fabric)[0]
        elif name == "dispatch":
            token = dispatched(token).token
        elif name == "combine":
            token = jf.moe.combine(*routed, token=token)[1]
        return x + token

    program = on_ranks(mesh, step, donate_argnums=0)
    if name != "combine":
        return program
    routed = on_ranks(mesh, plan)(sharded(mesh, np.zeros(n, np.float32)))
    return lambda x: program(x, *routed)


def lost_peer(mesh: jax.sharding.Mesh) -> None:
    """A process that ends while the others replay: their next call raises.

    One Fabric for each operation, since the first failure ends a Fabric. XLA may
    capture a program again after others have run, because its buffers have moved: only
    the last one is sure to be replayed, and comes first.
    """
    last = jax.process_count() - 1
    lost = [r for r, d in enumerate(mesh.devices.flat) if d.process_index == last]
    fabrics, programs, carries = {}, {}, {}
    for name in ("exchange", "wait", "dispatch", "combine", "barrier"):
        fabric = jf.Fabric(mesh, name=name, timeout_s=TIMEOUT_S, mailbox_bytes=1 << 20)
        program = waiting_call(mesh, name, fabric)
        x = sharded(mesh, np.zeros(4 * mesh.size, np.float32)) + 0
        asked = []
        for _ in range(7):
            x = jax.block_until_ready(program(x))
            asked.append(fabric.require_open().calls())
        check_replayed(asked)
        fabrics[name], programs[name], carries[name] = fabric, program, x
    if jax.process_index() == last:
        print("passed lost_peer", flush=True)
        os._exit(0)
    last_program = program
    beside = mesh.devices.flat[lost[0] - 1].process_index
    for name, program in reversed(programs.items()):
        if name == "wait" and jax.process_index() != beside:
            continue  # it waits for nobody who is lost
        asked = fabrics[name].require_open().calls()
        x = jax.block_until_ready(program(carries[name]))
        replayed = fabrics[name].require_open().calls() == asked
        assert replayed or program is not last_program, "not replayed"
        failed = raises_soon(functools.partial(program, x))
        texts = [f"the message of rank {rank} did not come" for rank in lost]
        if name == "wait":
            texts = ["1 transfers into the window, of which 0 have come"]
        assert f"{name} on rank" in failed, failed
        assert any(text in failed for text in texts), failed
        print(f"{name}, {replayed=}: {failed.splitlines()[0]}", flush=True)
    print("passed lost_peer", flush=True)
    os._exit(0)  # JAX would wait for the other process


def untold(mesh: jax.sharding.Mesh) -> None:
    """A failure that no later call could tell is raised by the end of the block."""
    x, ids, weights = operands(mesh, 32, 64, 4)
    program = functools.partial(layer, implementation="fabric", dtype=jnp.float32)
    failed = ""
    try:
        with jf.Fabric(mesh, timeout_s=2, mailbox_bytes=1 << 20, name="untold"):
            jax.block_until_ready(on_ranks(mesh, program)(x, ids + 1000, weights))
    except jf.FabricError as error:
        failed = str(error)
    assert "names no expert" in failed, failed


def bad_expert(mesh: jax.sharding.Mesh) -> None:
    """An expert that is not there: the next call raises, and names the entry."""
    x, ids, weights = operands(mesh, 32, 64, 4)
    program = functools.partial(layer, implementation="fabric", dtype=jnp.float32)
    with jf.Fabric(mesh, timeout_s=20, mailbox_bytes=1 << 20):
        jitted = on_ranks(mesh, program)
        jax.block_until_ready(jitted(x, ids + 1000, weights))
        failed = raises_soon(lambda: jitted(x, ids, weights))
    assert "names no expert" in failed, failed


CASES = {
    "silent_rank": silent_rank,
    "bad_put": bad_put,
    "reopened": reopened,
    "resized": resized,
    "untold": untold,
    "bad_expert": bad_expert,
    "lost_peer": lost_peer,
}

if __name__ == "__main__":
    run(CASES, command_line(CASES), alone=True)
