"""Trains a byte-level mixture-of-experts transformer on CPython's documentation.

    jaxfabric run -n 4 examples/train_moe.py           # 4 processes, 2 experts on each
    jaxfabric run -n 2 --devices-per-process 2 examples/train_moe.py
    python examples/train_moe.py                       # 1 process, all its devices
    jaxfabric run -n 4 examples/train_moe.py --implementation reference

Each rank (a device of the mesh axis "expert") holds its part of the batch and of the
experts. What makes this an expert-parallel program is four lines: the mesh, the Fabric,
the sharding of the batch, and `jf.nnx.MoE` in moe_transformer.py. The rest is Flax as
on one device: `jax.jit` sums the gradients of what all ranks share, while tokens travel
to their experts and back by one-sided writes. `--implementation reference` computes
the same losses in pure JAX, without a Fabric.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import pydoc_data.topics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import moe_report
import numpy as np
import optax
import rich.console
import rich.progress
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_transformer import Config, Transformer

import jaxfabric as jf

LEARNING_RATE = 5e-3
WARMUP_STEPS = 10
BALANCE = 0.01  # weight of the loss that evens out the experts' loads


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=40, help="training steps")
    add("--batch", type=int, default=16, help="sequences per step, over all ranks")
    add("--seed", type=int, default=0, help="of parameters and batches")
    add("--implementation", choices=("fabric", "reference"), default="fabric")
    add("--capacity", type=int, help="most expert rows a rank keeps; None drops none")
    add("--every", type=int, default=10, help="steps between two reports")
    add("--picture", type=pathlib.Path, default="train_moe.png", help="PNG or SVG")
    add("--trace", type=pathlib.Path, help="where to record what the ranks do")
    add("--json", type=pathlib.Path, help="where to write all numbers")
    return parser.parse_args()


def batches(
    config: Config, batch: int, seed: int, sharding: NamedSharding
) -> Iterator[jax.Array]:
    """Random pieces of the text, int32[batch, length + 1], split over the ranks."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    data = np.frombuffer(text.encode(), np.uint8)
    rng = np.random.default_rng(seed)  # all processes draw the same
    window = np.arange(config.length + 1)
    while True:
        starts = rng.integers(len(data) - config.length, size=batch)
        piece = data[starts[:, None] + window].astype(np.int32)
        # Of the whole batch, a process copies the rows of its own devices.
        yield jax.make_array_from_callback(piece.shape, sharding, piece.__getitem__)


def create(
    config: Config, mesh: jax.sharding.Mesh, options: argparse.Namespace
) -> tuple[Transformer, nnx.Optimizer]:
    """The model and its optimizer, on the mesh: experts split, all else replicated."""

    @nnx.jit
    def init() -> tuple[Transformer, nnx.Optimizer]:
        rngs = nnx.Rngs(options.seed)
        model = Transformer(
            config, mesh, options.implementation, options.capacity, rngs
        )
        rate = optax.linear_schedule(0.0, LEARNING_RATE, WARMUP_STEPS)
        optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)
        state = nnx.state((model, optimizer))
        shardings = nnx.get_named_sharding(state, mesh)
        placed = jax.lax.with_sharding_constraint(state, shardings)
        nnx.update((model, optimizer), placed)
        return model, optimizer

    return init()


@nnx.jit
def train_step(
    model: Transformer, optimizer: nnx.Optimizer, text: jax.Array
) -> dict[str, jax.Array]:
    """One step; returns the loss in nats per byte and what the experts did."""

    def loss_fn(model: Transformer) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, stats = model(text[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
        loss = losses.mean()
        balance = sum(layer.load_balance_loss for layer in stats)
        dropped = [layer.dispatch.dropped_at_receiver.sum() for layer in stats]
        return loss + BALANCE * balance, {
            "loss": loss,
            "loads": jnp.stack([layer.expert_load for layer in stats]),
            "dropped": jnp.stack(dropped).sum(),
        }

    (_, metrics), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradients)
    return metrics


def traffic(fabric: jf.Fabric | None) -> tuple[float, float]:
    """MiB that all ranks sent to others, and in how many messages."""
    counters = {} if fabric is None else fabric.snapshot()
    links = [
        link
        for rank, peers in counters.items()
        for peer, link in peers.items()
        if peer != rank
    ]
    sent = sum(link["message_bytes_sent"] for link in links) / 2**20
    messages = sum(link["messages_sent"] for link in links)
    mine = np.array([[sent, messages]], np.float32)
    total = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 2).sum(0)
    return float(total[0]), float(total[1])


def train(options: argparse.Namespace, console: rich.console.Console) -> dict[str, Any]:
    """Trains and reports; returns metrics by step (arrays with a leading [steps])."""
    config = Config()
    mesh = jax.make_mesh(
        (jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,)
    )
    use_fabric = options.implementation == "fabric"
    progress = rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.MofNCompleteColumn(),
        console=console,
    )
    with jf.Fabric(mesh) if use_fabric else contextlib.nullcontext() as fabric:
        model, optimizer = create(config, mesh, options)
        data = batches(
            config, options.batch, options.seed, NamedSharding(mesh, P("expert"))
        )
        console.print(
            f"ranks: {mesh.size}, processes: {jax.process_count()}, experts: "
            f"{config.num_experts}, implementation: {options.implementation}\n"
            + moe_report.HEADER
        )
        if fabric is not None and options.trace is not None:
            fabric.trace(options.trace)  # until the Fabric closes
        history: list[dict[str, Any]] = []
        pending = []
        with progress:
            task = progress.add_task("training", total=options.steps)
            for step in range(options.steps):
                # Returns at once; ranks run ahead until somebody looks at a result.
                pending.append(train_step(model, optimizer, next(data)))
                if step % options.every == 0 or step == options.steps - 1:
                    history += jax.device_get(pending)
                    pending.clear()
                    progress.console.print(moe_report.line(step, history[-1]))
                    progress.update(task, completed=step + 1)
        sent_mib, messages = traffic(fabric)
    metrics = {key: np.stack([m[key] for m in history]) for key in history[0]}
    return metrics | {"sent_mib": sent_mib, "messages": messages}


def main() -> None:
    options = parse_arguments()
    first = jax.process_index() == 0
    console = rich.console.Console(quiet=not first, highlight=False)
    metrics = train(options, console)
    if not first:
        return
    console.print(moe_report.summary(metrics, options.batch * Config().length))
    moe_report.draw(metrics, jax.device_count(), options.picture)
    console.print(f"picture: {options.picture}")
    if options.json:
        lists = {key: np.asarray(value).tolist() for key, value in metrics.items()}
        options.json.write_text(json.dumps(lists))


if __name__ == "__main__":
    main()
