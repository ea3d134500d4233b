"""Flax Linen layers: those of `jaxfabric.nnx`, bridged."""

from __future__ import annotations

from typing import Any

from flax import linen
from flax.nnx import bridge

from jaxfabric import nnx

__all__ = ["MoE"]


def MoE(
    d_model: int,
    d_ff: int,
    num_experts: int,
    num_experts_per_tok: int,
    *,
    name: str | None = None,
    **kwargs: Any,
) -> linen.Module:
    """`jaxfabric.nnx.MoE` as a Linen module.

    Takes the same arguments, except ``rngs``, and has the same parameters, with the
    same names and shapes (x and y: [..., ``d_model``]), in collection ``params``.
    Parameters are boxed in Flax metadata that carries their sharding; use
    `flax.linen.unbox` for the bare arrays.

    Raises:
      ValueError: as `jaxfabric.nnx.MoE`, when the module is initialised.

    Example::

      layer = jf.linen.MoE(64, 128, 8, 2, mesh=mesh)
      variables = layer.init(jax.random.key(0), x)
      y = layer.apply(variables, x)
      y, stats = layer.apply(variables, x, return_stats=True)
    """
    return bridge.to_linen(
        nnx.MoE, d_model, d_ff, num_experts, num_experts_per_tok, name=name, **kwargs
    )
