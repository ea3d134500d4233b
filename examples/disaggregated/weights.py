"""Trains the model that is served, as train_moe.py does, and keeps its weights.

    python examples/disaggregated/weights.py --sizes small --output weights.npz

Training is short and deterministic. It uses windows of text at random positions, so
that all positions of a long context are learned from short sequences.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
from typing import Any

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sizes
from flax import nnx
from jax.sharding import AxisType

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from moe_transformer import Config, Transformer

WINDOW_TOKENS = 64
BATCH = 8
STEPS = {"small": 60, "tiny": 200}
LEARNING_RATE = 5e-3
BALANCE = 0.01


def one_device_mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))


def create(which: sizes.Sizes) -> Transformer:
    """The model, untrained, in this process alone."""

    config = Config(**dataclasses.asdict(which))

    @nnx.jit  # one program instead of a hundred small ones
    def init() -> Transformer:
        return Transformer(config, one_device_mesh(), "reference", None, nnx.Rngs(0))

    return init()


@nnx.jit
def train_step(
    model: Transformer, optimizer: nnx.Optimizer, tokens: jax.Array, start: jax.Array
) -> jax.Array:
    def loss_fn(model: Transformer) -> tuple[jax.Array, jax.Array]:
        logits, stats = model(tokens[:, :-1], start)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        balance = sum(layer.load_balance_loss for layer in stats)
        return losses.mean() + BALANCE * balance, losses.mean()

    (_, loss), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradients)
    return loss


def trained(config: sizes.Sizes, steps: int) -> tuple[Transformer, list[float]]:
    """A trained model, and the loss of each step in nats per byte."""
    model = create(config)
    optimizer = nnx.jit(
        lambda model: nnx.Optimizer(model, optax.adam(LEARNING_RATE), wrt=nnx.Param)
    )(model)
    data, rng = corpus.text(), np.random.default_rng(0)
    window = np.arange(WINDOW_TOKENS + 1)
    losses = []
    for _ in range(steps):
        places = rng.integers(len(data) - WINDOW_TOKENS, size=BATCH)
        start = jnp.int32(rng.integers(config.length - WINDOW_TOKENS))
        tokens = jnp.asarray(data[places[:, None] + window])
        losses.append(float(train_step(model, optimizer, tokens, start)))
    return model, losses


def named_arrays(model: Transformer) -> dict[str, np.ndarray]:
    """The parameters by their path, such as ``blocks/0/experts/w_up``."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(p[...]) for path, p in flat}


def save(path: pathlib.Path, model: Transformer) -> None:
    """Writes a file that nobody sees before it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.npz")
    arrays: dict[str, Any] = named_arrays(model)
    np.savez(partial, **arrays)
    partial.rename(path)


def restore(config: sizes.Sizes, arrays: dict[str, np.ndarray]) -> Transformer:
    """The model of train_moe.py with these parameters."""
    model = create(config)
    state = nnx.state(model, nnx.Param)
    for path, param in nnx.to_flat_state(state):
        param.set_value(jnp.asarray(arrays["/".join(map(str, path))]))
    nnx.update(model, state)
    return model


def train(which: str, path: pathlib.Path) -> str:
    """Writes the weights of a trained model; returns a line about it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model, losses = trained(sizes.SIZES[which], STEPS[which])
    save(path, model)
    return f"weights: {path}, loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", choices=sizes.SIZES, default="small")
    parser.add_argument("--output", type=pathlib.Path, default="weights.npz")
    options = parser.parse_args()
    print(train(options.sizes, options.output))


if __name__ == "__main__":
    main()
