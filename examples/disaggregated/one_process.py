"""What answers must be: the trained model itself, in one process, without caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import served_model
import weights
from flax import nnx
from sizes import SIZES

_ROUND = 64  # lengths of programs


def decode(
    sizes: str,
    arrays: Mapping[str, np.ndarray],
    prompts: Sequence[Sequence[int]],
    count: int,
) -> list[list[int]]:
    """``count`` tokens after each prompt, each time from the whole text."""
    config = SIZES[sizes]
    model = weights.restore(config, dict(arrays))
    lengths = np.array([len(prompt) for prompt in prompts])
    longest = min(-(-(max(lengths) + count) // _ROUND) * _ROUND, config.length)
    whole = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(whole, prompts, strict=True):
        row[: len(prompt)] = prompt

    @nnx.jit
    def next_tokens(
        model: weights.Transformer, whole: jax.Array, last: jax.Array
    ) -> jax.Array:
        logits, _ = model(whole)
        logits = logits[jnp.arange(len(last)), last]
        return jax.vmap(served_model.choose)(logits, last + 1)

    answers = []
    for made in range(count):
        last = lengths - 1 + made
        new = np.asarray(next_tokens(model, jnp.asarray(whole), jnp.asarray(last)))
        answers.append(new)
        inside = last + 1 < longest
        whole[np.flatnonzero(inside), last[inside] + 1] = new[inside]
    return np.array(answers).T.tolist()
