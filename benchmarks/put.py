"""One-sided puts into the right neighbour's window, 8 B to 64 MiB, against memcpy.

    jaxfabric run -n 2 benchmarks/put.py

Each rank puts at the same time. "put" is the time of one of a chain of puts in a
jitted loop; "wait" is the call that counts them and copies the window out, apart. The
floor is the same copy with memcpy (numpy.copyto) into shared memory, in all processes
at once. lax.ppermute of the same bytes stands beside: it is put and copy-out in one.
"""

from __future__ import annotations

import argparse
import json
import mmap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from measure import machine, multihost_sync, table, time_call

import jaxfabric as jf
from jaxfabric._bench.rank_times import Times, seconds_of, slowest_rank

AXIS = "x"
SIZES = [8, 64, 1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26]
BYTES_PER_ROUND = 1 << 28  # how many puts make one round


def shared_memcpy(source: np.ndarray, count: int) -> Callable[[], None]:
    """Copies the operand's bytes ``count`` times into shared memory."""
    target = np.frombuffer(mmap.mmap(-1, source.nbytes), np.uint8)

    def copies() -> None:
        for _ in range(count):
            np.copyto(target, source)

    return copies


def programs(fabric: jf.Fabric, window: jf.Window, count: int) -> tuple[Any, Any, Any]:
    """Jitted: ``count`` puts to the right; the wait for them; ppermute."""
    mesh = fabric.mesh
    ranks = mesh.size

    def puts(x: Any, token: Any) -> Any:
        right = (jax.lax.axis_index(AXIS) + 1) % ranks

        def one(_: int, token: Any) -> Any:
            return jf.put(window, x, right, axis_name=AXIS, token=token)

        return jax.lax.fori_loop(0, count, one, token)

    def wait(token: Any) -> Any:
        return jf.wait(window, count=count, axis_name=AXIS, token=token)

    def permute(x: Any) -> Any:
        return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % ranks) for i in range(ranks)])

    def on_mesh(function: Any) -> Any:
        return jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
        )

    return on_mesh(puts), on_mesh(wait), on_mesh(permute)


def run(fabric: jf.Fabric, size: int, rounds: int) -> dict[str, Times]:
    """Times one size."""
    ranks = fabric.mesh.size
    count = max(4, min(256, BYTES_PER_ROUND // (8 * size)))
    window = fabric.window(size, jnp.uint8)
    sharding = NamedSharding(fabric.mesh, P(AXIS))
    bytes_ = np.arange(ranks * size, dtype=np.uint32).astype(np.uint8)
    x = jax.make_array_from_callback(bytes_.shape, sharding, lambda i: bytes_[i])
    zeros = np.zeros(ranks, np.float32)
    token = jax.make_array_from_callback(zeros.shape, sharding, lambda i: zeros[i])
    puts, wait, permute = programs(fabric, window, count)
    copies = shared_memcpy(np.asarray(x.addressable_shards[0].data), count)
    put_seconds, wait_seconds, copy_seconds = [], [], []
    for _ in range(rounds + 2):  # in turns, so that all see the same machine
        multihost_sync()
        copy_seconds.append(seconds_of(copies))
        multihost_sync()
        put_seconds.append(seconds_of(lambda: puts(x, token)))
        multihost_sync()
        wait_seconds.append(seconds_of(lambda: wait(token)))
    permuted = permute(x)
    copied, _ = wait(puts(x, token))
    for got, want in zip(
        copied.addressable_shards, permuted.addressable_shards, strict=True
    ):
        assert np.array_equal(np.asarray(got.data), np.asarray(want.data))
    return {
        "memcpy": Times(slowest_rank(copy_seconds[2:]).seconds / count),
        "put": Times(slowest_rank(put_seconds[2:]).seconds / count),
        "wait": slowest_rank(wait_seconds[2:]),
        "ppermute": time_call(lambda: permute(x), max(3, rounds // 4)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    first = jax.process_index() == 0
    figures: dict[str, Any] = {"machine": machine()}
    if first:
        print(figures["machine"])
    rows = []
    with jf.Fabric(mesh) as fabric:
        for size in SIZES:
            times = run(fabric, size, options.rounds)
            floor, put = times["memcpy"].p50, times["put"].p50
            figures[str(size)] = {
                name: {"p50_us": t.p50 * 1e6, "p99_us": t.p99 * 1e6}
                for name, t in times.items()
            }
            rows.append(
                [
                    f"{size}",
                    f"{put * 1e6:.1f}",
                    f"{times['put'].p99 * 1e6:.1f}",
                    f"{size / put / 1e9:.2f}",
                    f"{floor * 1e6:.1f}",
                    f"{size / floor / 1e9:.2f}",
                    f"{floor / put:.2f}",
                    f"{times['wait'].p50 * 1e6:.1f}",
                    f"{times['ppermute'].p50 * 1e6:.1f}",
                ]
            )
    if first:
        header = ["bytes", "put us", "p99 us", "GB/s", "memcpy us", "GB/s"]
        header += ["of memcpy", "wait us", "ppermute us"]
        print(table(header, rows), flush=True)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
