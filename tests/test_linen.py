"""jf.linen.MoE is jf.nnx.MoE behind Linen's interface."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P
from moe_cases import make_mesh

import jaxfabric.linen
import jaxfabric.nnx

D, F, E, K = 8, 12, 8, 2


class Block(linen.Module):
    """The layer as a part of a Linen model."""

    mesh: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + jaxfabric.linen.MoE(D, F, E, K, mesh=self.mesh, name="moe")(x)
        return linen.Dense(1)(x)


@pytest.mark.smoke
def test_init_apply_grad() -> None:
    mesh = make_mesh(4)
    layer: Any = jaxfabric.linen.MoE(D, F, E, K, mesh=mesh, router="mixtral")
    x = np.random.default_rng(0).normal(size=(8, D)).astype(np.float32)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    params = linen.unbox(variables)["params"]
    assert set(params) == {"gate", "w_gate", "w_up", "w_down"}
    assert params["w_down"].shape == (E, F, D)
    spec = linen.get_partition_spec(variables)["params"]["w_down"]
    assert spec == P("expert", None, None)

    twin = jaxfabric.nnx.MoE(D, F, E, K, mesh=mesh, router="mixtral", rngs=nnx.Rngs(0))
    for name, value in params.items():
        getattr(twin, name).set_value(value)
    y = jax.jit(layer.apply)(variables, x)
    np.testing.assert_allclose(y, twin(x), rtol=1e-6, atol=1e-7)
    with_stats = jax.jit(lambda *a: layer.apply(*a, return_stats=True))
    same, stats = with_stats(variables, x)
    np.testing.assert_allclose(same, y, rtol=1e-6, atol=1e-7)
    assert int(stats.expert_load.sum()) == 8 * K

    def loss(params: Any) -> jax.Array:
        return (layer.apply({"params": params}, x) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(params)
    wanted = nnx.jit(nnx.grad(lambda twin: (twin(x) ** 2).sum()))(twin)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, wanted[name][...], rtol=1e-5, atol=1e-6)


def test_inside_of_a_model() -> None:
    model: Any = Block(make_mesh(4))
    x = np.random.default_rng(0).normal(size=(8, D)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params = linen.unbox(variables)["params"]
    assert params["moe"]["w_gate"].shape == (E, D, F)

    def loss(params: Any) -> jax.Array:
        return (model.apply({"params": params}, x) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    losses = []
    for _ in range(20):
        value, grads = step(params)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
