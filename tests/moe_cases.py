"""What the MoE tests share: implementations, meshes, and one program over them."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfabric import moe


def has_native() -> bool:
    """Whether the compiled half of the package is there."""
    names = ("jaxfabric._native", "jaxfabric.moe._fabric")
    return all(importlib.util.find_spec(name) is not None for name in names)


NEEDS_NATIVE = pytest.mark.skipif(
    not has_native(), reason="jaxfabric._native is not built"
)
IMPLEMENTATIONS = ["reference", pytest.param("fabric", marks=NEEDS_NATIVE)]


@contextlib.contextmanager
def open_fabric(implementation: str, mesh: Mesh) -> Iterator[None]:
    """An open Fabric where the implementation needs one.

    JAX runs programs behind the caller's back: wait for results before this ends.
    """
    if implementation != "fabric":
        yield
        return
    import jaxfabric

    with jaxfabric.Fabric(mesh):
        yield


def make_mesh(sizes: int | tuple[int, ...], names: tuple[str, ...] = ("expert",)):
    """A mesh with Auto axes over the first virtual devices."""
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    count = int(np.prod(sizes))
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh(sizes, names, axis_types=auto, devices=jax.devices()[:count])


def on_mesh(mesh: Mesh, spec: P, *arrays: np.ndarray) -> list[jax.Array]:
    """Host arrays of all ranks to sharded arrays."""
    return [jax.device_put(a, NamedSharding(mesh, spec)) for a in arrays]


def on_ranks(
    mesh: Mesh, function: Callable[..., Any], **kwargs: Any
) -> Callable[..., Any]:
    """Compiles function to run on every rank, on its entry of arrays [N, ...].

    All that the function returns gets a leading dimension of ranks.
    """
    spec = P(mesh.axis_names)

    def on_rank(*local: jax.Array) -> Any:
        result = function(*(a[0] for a in local))
        return jax.tree.map(lambda a: jnp.asarray(a)[None], result)

    mapped = jax.shard_map(on_rank, mesh=mesh, in_specs=spec, out_specs=spec, **kwargs)
    compiled = jax.jit(mapped)

    def run(*arrays: np.ndarray) -> Any:
        return jax.tree.map(np.asarray, compiled(*on_mesh(mesh, spec, *arrays)))

    return run


def data(
    rng: np.random.Generator, n: int, t: int, d: int, k: int, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """x[N, T, D] and weights float32[N, T, K]."""
    x = rng.normal(size=(n, t, d)).astype(np.float32).astype(jnp.dtype(dtype))
    return x, rng.random((n, t, k)).astype(np.float32)


def experts(d: moe.Dispatched, w: jax.Array) -> jax.Array:
    """A nonlinear expert, w[L, D, D], over the rows of either form of dispatch."""
    rows = d.tokens
    if d.row_index is not None:
        rows = jnp.where(d.row_index[:, None] < 0, 0, rows[d.row_index])
    # Not ragged_dot, which has no second derivatives.
    each = jnp.arange(len(w))
    expert = jnp.repeat(each, d.group_sizes, total_repeat_length=len(rows))
    return jnp.tanh(jnp.einsum("rd,rdf->rf", rows, w[expert]))
