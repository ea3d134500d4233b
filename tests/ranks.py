"""What the tests of the primitives share: programs on ranks, poison, channels."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

POISON = 0xA5  # in every byte of memory that a test expects to be written


def make_mesh(
    sizes: int | Sequence[int],
    names: Sequence[str] = ("x",),
    *,
    order: Sequence[int] | None = None,
    explicit: bool = False,
) -> Mesh:
    """A mesh over the first devices, or over those that ``order`` lists."""
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    devices = np.array(jax.devices(), object)
    devices = devices[: np.prod(sizes)] if order is None else devices[list(order)]
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return Mesh(devices.reshape(sizes), tuple(names), axis_types=(kind,) * len(sizes))


def spread(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Entry i of ``array[N, ...]`` to rank i; works over several processes."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])


def rows(mesh: Mesh, array: jax.Array) -> dict[int, np.ndarray]:
    """By rank, the entries of a spread array that this process has."""
    rank_of = {device: rank for rank, device in enumerate(mesh.devices.flat)}
    return {
        rank_of[shard.device]: np.asarray(shard.data)[0]
        for shard in array.addressable_shards
    }


def same(mesh: Mesh, got: jax.Array, want: np.ndarray) -> None:
    """Asserts that each rank has the bits of its entry of ``want[N, ...]``."""
    for rank, row in rows(mesh, got).items():
        np.testing.assert_array_equal(
            row, np.asarray(want)[rank], err_msg=f"rank {rank}", strict=True
        )


def on_ranks(
    mesh: Mesh, function: Callable[..., Any], *, jit: bool = True, **kwargs: Any
) -> Callable[..., Any]:
    """``function`` on every rank, on its entries of spread arrays.

    What it returns gets a leading dimension of ranks. Results are spread arrays, and
    ready: a Fabric that closes fails what is still under way.
    """
    spec = P(mesh.axis_names)

    def on_rank(*local: jax.Array) -> Any:
        result = function(*(a[0] for a in local))
        return jax.tree.map(lambda a: jnp.asarray(a)[None], result)

    on_rank.__name__ = on_rank.__qualname__ = function.__name__
    mapped = jax.shard_map(on_rank, mesh=mesh, in_specs=spec, out_specs=spec, **kwargs)
    program = jax.jit(mapped) if jit else mapped

    def run(*arrays: Any) -> Any:
        return jax.block_until_ready(program(*(_spread(mesh, a) for a in arrays)))

    return run


def _spread(mesh: Mesh, array: Any) -> jax.Array:
    return array if isinstance(array, jax.Array) else spread(mesh, np.asarray(array))


def poison(mesh: Mesh, like: np.ndarray, copies: int = 4) -> None:
    """Leaves freed memory of the size of ``like[N, ...]`` full of POISON.

    XLA takes new buffers from there, so a result that nobody wrote shows it.
    """
    raw = np.full(like.nbytes, POISON, np.uint8).view(like.dtype).reshape(like.shape)
    for array in [spread(mesh, raw) for _ in range(copies)]:
        array.block_until_ready()
        array.delete()


def poisoned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array whose bytes are all POISON."""
    like = np.empty(shape, dtype)
    return np.full(like.nbytes, POISON, np.uint8).view(dtype).reshape(like.shape)


def draw(rng: np.random.Generator, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Random values, exactly representable in ``dtype``."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    return rng.integers(-99, 99, shape).astype(np.float32).astype(dtype)


def channels(program: Any, *arguments: Any) -> list[int]:
    """The channels of our calls in a lowered program, those of all functions."""
    text = program.lower(*arguments).as_text()
    return [int(found) for found in re.findall(r"channel = (-?\d+) : i64", text)]


def run_child(*arguments: str, timeout_s: float = 60) -> str:
    """Runs Python with these arguments by itself; a hang or a crash fails the test.

    The child has the test's environment: eight devices, a wide pool.
    """
    command = [sys.executable, "-P", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as hang:
        raise AssertionError(
            f"hung for {timeout_s} s; it had printed {hang.stdout!r} {hang.stderr!r}"
        ) from None
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
