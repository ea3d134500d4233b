"""Tests that several hosts run together; one host runs them as well.

`python -P tests/hosts/run_two_hosts.py` starts them as two hosts would.
"""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

pytestmark = pytest.mark.jaxfabric(processes=4, timeout_s=60)


def _mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((jax.device_count(),), ("expert",))


def _rows(mesh: jax.sharding.Mesh) -> jax.Array:
    """[N, 3] with the rank in each of its rows."""
    n = mesh.size
    whole = np.repeat(np.arange(n, dtype=np.float32)[:, None], 3, axis=1)
    return jax.make_array_from_callback(
        whole.shape, NamedSharding(mesh, P("expert")), lambda index: whole[index]
    )


def test_psum() -> None:
    mesh = _mesh()
    total = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "expert"),
            mesh=mesh,
            in_specs=P("expert"),
            out_specs=P(),
        )
    )(_rows(mesh))
    n = mesh.size
    np.testing.assert_array_equal(
        total.addressable_data(0), np.full((1, 3), n * (n - 1) / 2)
    )


def test_exchange() -> None:
    if importlib.util.find_spec("jaxfabric._native") is None:
        pytest.skip("jaxfabric's native module is not built here")
    import jaxfabric as jf

    mesh = _mesh()
    n = mesh.size
    ring = [(rank, (rank + 1) % n) for rank in range(n)]

    def shift(x: jax.Array) -> jax.Array:
        y, _ = jf.exchange(x, ring, axis_name="expert", token=jf.token())
        return y

    with jf.Fabric(mesh):
        y = jax.jit(
            jax.shard_map(shift, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        )(_rows(mesh))
        left = jnp.float32((jax.process_index() - 1) % n)
        np.testing.assert_array_equal(y.addressable_data(0), jnp.full((1, 3), left))
