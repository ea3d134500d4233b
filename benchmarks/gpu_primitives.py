"""Barrier and put on GPUs inside jitted programs, beside bare kernels.

    python benchmarks/gpu_primitives.py

on a machine with two GPUs or more: one process with all of them. Bare kernels (see
cuda/probe_kernels.h) go the same way through XLA, in chains of the same length, in
command buffers: what is left between the two is ours. A time is what one more call
costs in a chain: that of a long one less that of a short one, over the difference in
length. "queued" programs follow each other without the host in between; after "alone"
ones the host waits, so that its own work for each call shows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxfabric as jf
from jaxfabric import _cuda

AXIS = "x"
SHORT, LONG = 100, 400
ROW = 7168
PROBES = {"empty": 0, "barrier": 1, "put": 2}
_Step = Callable[[Any, Any], Any]


def probe(fabric: jf.Fabric, window: jf.Window, kind: str) -> _Step:
    """A bare kernel as a step of a chain."""
    call = jax.ffi.ffi_call(
        "jaxfabric_probe", jax.ShapeDtypeStruct((1,), jnp.float32), has_side_effect=True
    )
    return lambda x, token: call(
        x,
        token,
        fabric=np.int64(fabric.key),
        window=np.int64(window.index),
        probe=np.int64(PROBES[kind]),
        axes=np.zeros(1, np.int64),
    )


def steps(fabric: jf.Fabric) -> dict[str, _Step]:
    """What is measured, each from a token to the next."""
    window = fabric.window((ROW,), jnp.bfloat16)
    waited = fabric.window((ROW,), jnp.bfloat16)
    bare = fabric.window((2 * ROW,), jnp.bfloat16)

    def right() -> Any:
        return (jax.lax.axis_index(AXIS) + 1) % fabric.mesh.size

    def put(x: Any, token: Any) -> Any:
        return jf.put(window, x, right(), axis_name=AXIS, token=token)

    def put_and_wait(x: Any, token: Any) -> Any:
        token = jf.put(waited, x, right(), axis_name=AXIS, token=token)
        return jf.wait(waited, axis_name=AXIS, token=token)[1]

    return {
        "bare empty kernel": probe(fabric, bare, "empty"),
        "bare barrier": probe(fabric, bare, "barrier"),
        "barrier": lambda x, token: jf.barrier(AXIS, token=token),
        "bare put of a row": probe(fabric, bare, "put"),
        "put of a row": put,
        "put of a row, wait": put_and_wait,
    }


def chain(fabric: jf.Fabric, step: _Step, length: int) -> Any:
    """A jitted program of ``length`` steps; its token is donated."""

    def program(token: Any, x: Any) -> Any:
        for _ in range(length):
            token = step(x, token)
        return token

    mapped = jax.shard_map(
        program,
        mesh=fabric.mesh,
        in_specs=(P(AXIS), P(AXIS)),
        out_specs=P(AXIS),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0)


def microseconds(program: Any, token: Any, x: Any, rounds: int) -> tuple[float, float]:
    """Of one execution: queued, and alone."""
    queued, alone = [], []
    for _ in range(5):
        token = jax.block_until_ready(program(token, x))
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(10):
            token = program(token, x)
        jax.block_until_ready(token)
        queued.append((time.perf_counter() - began) / 10)
        began = time.perf_counter()
        token = jax.block_until_ready(program(token, x))
        alone.append(time.perf_counter() - began)
    return statistics.median(queued) * 1e6, statistics.median(alone) * 1e6


def main() -> None:
    """Prints one line for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--hlo", action="store_true", help="print a compiled chain")
    options = parser.parse_args()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), (AXIS,))
    handler = jax.ffi.pycapsule(_cuda.library().JaxfabricCudaProbe)
    jax.ffi.register_ffi_target("jaxfabric_probe", handler, platform="CUDA")
    with jf.Fabric(mesh, timeout_s=20, mailbox_bytes=1 << 20) as fabric:
        sharding = jax.sharding.NamedSharding(mesh, P(AXIS))
        x = jax.device_put(jnp.ones(mesh.size * ROW, jnp.bfloat16), sharding)

        def fresh() -> Any:
            return jax.device_put(jnp.zeros(mesh.size), sharding)

        for name, step in steps(fabric).items():
            programs = [chain(fabric, step, length) for length in (SHORT, LONG)]
            if options.hlo:
                print(chain(fabric, step, 2).lower(fresh(), x).compile().as_text())
            short, long = (
                microseconds(program, fresh(), x, options.rounds)
                for program in programs
            )
            before = fabric.require_open().calls()
            jax.block_until_ready(programs[1](fresh(), x))
            asked = fabric.require_open().calls() - before
            each = [(b - a) / (LONG - SHORT) for a, b in zip(short, long, strict=True)]
            print(
                f"{name:20s} queued {each[0]:6.2f} us, alone {each[1]:6.2f} us; "
                f"chains of {SHORT} {short[0]:7.1f} {short[1]:7.1f}, "
                f"of {LONG} {long[0]:7.1f} {long[1]:7.1f} us; "
                f"{asked} calls asked for",
                flush=True,
            )


if __name__ == "__main__":
    main()
