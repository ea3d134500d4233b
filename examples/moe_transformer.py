"""A small decoder-only transformer whose feed-forward layers are `jf.nnx.MoE`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import jaxfabric as jf
import jaxfabric.nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; the defaults train in half a minute on two cores."""

    vocab: int = 256  # a token is a byte
    length: int = 64  # tokens of a sequence
    d_model: int = 64
    d_ff: int = 128  # of each expert
    num_heads: int = 4
    num_layers: int = 2
    num_experts: int = 8
    num_experts_per_tok: int = 2


class Block(nnx.Module):
    """Attention, then a mixture of experts, each after a norm and with a residual."""

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        implementation: str,
        capacity: int | None,
        rngs: nnx.Rngs,
    ) -> None:
        d = config.d_model
        self.norm_attention = nnx.RMSNorm(d, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            config.num_heads, d, use_bias=False, decode=False, rngs=rngs
        )
        self.norm_experts = nnx.RMSNorm(d, rngs=rngs)
        self.experts = jf.nnx.MoE(
            d,
            config.d_ff,
            config.num_experts,
            config.num_experts_per_tok,
            axis_name="expert",
            implementation=implementation,
            capacity=capacity,
            mesh=mesh,
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jf.nnx.MoEStats]:
        """x [B, S, d_model] -> the same shape, and what the experts did."""
        x = x + self.attention(self.norm_attention(x), mask=mask)
        y, stats = self.experts(self.norm_experts(x), return_stats=True)
        return x + y, stats


class Transformer(nnx.Module):
    """Predicts the next byte: int32[B, S] -> logits [B, S, vocab].

    Args:
      config: sizes.
      mesh: has the axis ``"expert"``, over which batch and experts are split.
      implementation: of dispatch and combine, ``"fabric"`` or ``"reference"``.
      capacity: most expert rows that a rank keeps in a layer; ``None`` keeps all.
      rngs: stream ``params`` initialises the parameters.
    """

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        implementation: str,
        capacity: int | None,
        rngs: nnx.Rngs,
    ) -> None:
        self.embed = nnx.Embed(config.vocab, config.d_model, rngs=rngs)
        self.position = nnx.Embed(config.length, config.d_model, rngs=rngs)
        self.blocks = nnx.List(
            Block(config, mesh, implementation, capacity, rngs)
            for _ in range(config.num_layers)
        )
        self.norm = nnx.RMSNorm(config.d_model, rngs=rngs)
        self.head = nnx.Linear(config.d_model, config.vocab, use_bias=False, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, start: jax.Array | int = 0
    ) -> tuple[jax.Array, list[jf.nnx.MoEStats]]:
        """Returns logits [B, S, vocab], and stats by layer.

        ``start`` is the position of the first token, below ``length - S``.
        """
        mask = nnx.make_causal_mask(tokens)
        x = self.embed(tokens) + self.position(start + jnp.arange(tokens.shape[1]))
        stats = []
        for block in self.blocks:
            x, block_stats = block(x, mask)
            stats.append(block_stats)
        return self.head(self.norm(x)), stats
