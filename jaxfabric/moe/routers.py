"""Routers: from logits to the ids and weights that dispatch takes.

All compute in float32, whatever the dtype of the logits, and break ties towards the
lower expert. A router is any function ``(logits, num_experts_per_tok) -> (ids,
weights)`` with logits [..., E], ids int32[..., K] and weights float32[..., K].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["mixtral", "qwen3_moe"]

Router = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


def _check(name: str, logits: jax.Array, k: int) -> None:
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(
            f"jf.moe.routers.{name}: num_experts_per_tok={k} but the logits are for "
            f"{logits.shape[-1]} experts; it must be 1 to that number"
        )


def mixtral(logits: jax.Array, num_experts_per_tok: int) -> tuple[jax.Array, jax.Array]:
    """Mixtral's router: softmax over the chosen experts.

    Args:
      logits: float [..., E].
      num_experts_per_tok: K, at most E.

    Returns:
      ids int32[..., K] in descending order of logits, weights float32[..., K].

    Raises:
      ValueError: K is not between 1 and E.

    Example::

      mixtral(jnp.log(jnp.array([[1.0, 3.0, 6.0]])), 2)  # [[2, 1]], [[2/3, 1/3]]
    """
    _check("mixtral", logits, num_experts_per_tok)
    chosen, ids = lax.top_k(logits.astype(jnp.float32), num_experts_per_tok)
    return ids.astype(jnp.int32), jax.nn.softmax(chosen, axis=-1)


def qwen3_moe(
    logits: jax.Array, num_experts_per_tok: int, norm_topk_prob: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Qwen3-MoE's router: softmax over all experts, of which the largest are chosen.

    Args:
      logits: float [..., E].
      num_experts_per_tok: K, at most E.
      norm_topk_prob: scale the chosen weights to a sum of 1, as the released models
        do; then it equals `mixtral` up to rounding.

    Returns:
      ids int32[..., K] in descending order of logits, weights float32[..., K].

    Raises:
      ValueError: K is not between 1 and E.

    Example::

      logits = jnp.log(jnp.array([[1.0, 3.0, 6.0]]))
      qwen3_moe(logits, 2)                         # [[2, 1]], [[2/3, 1/3]]
      qwen3_moe(logits, 2, norm_topk_prob=False)   # [[2, 1]], [[0.6, 0.3]]
    """
    _check("qwen3_moe", logits, num_experts_per_tok)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, ids = lax.top_k(probabilities, num_experts_per_tok)
    if norm_topk_prob:
        weights = weights / weights.sum(-1, keepdims=True)
    return ids.astype(jnp.int32), weights
