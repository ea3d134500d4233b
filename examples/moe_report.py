"""What train_moe.py prints and draws.

``metrics`` hold, with a leading dimension [steps]: ``loss``, ``loads`` [layers,
experts] (assignments to each expert) and ``dropped``; and ``sent_mib``, ``messages``.
"""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib.colors
import matplotlib.figure
import numpy as np

HEADER = " step   loss  dropped  % of the tokens to each expert, layer by layer"
SMOOTHED_STEPS = 10


def line(step: int, metrics: dict[str, Any]) -> str:
    """One step in a line under HEADER."""
    layers = [100 * load / load.sum() for load in metrics["loads"]]
    shares = "  ".join(" ".join(f"{share:2.0f}" for share in s) for s in layers)
    return f"{step:5} {metrics['loss']:6.3f} {metrics['dropped']:8}  {shares}"


def summary(metrics: dict[str, Any], tokens: int) -> str:
    """The whole run, with ``tokens`` in each step."""
    loss, loads = metrics["loss"], metrics["loads"]
    change = loss[-1] / loss[0] - 1
    lines = [f"loss: {loss[0]:.3f} -> {loss[-1]:.3f} nats per byte ({change:+.0%})"]
    for layer, load in enumerate(loads.sum(0)):
        share = load / load.sum()
        lines.append(
            f"experts of layer {layer}: {share.min():.1%} to {share.max():.1%} of the "
            f"assignments (even: {1 / len(share):.1%})"
        )
    lines.append(f"dropped: {metrics['dropped'].sum()} of {loads.sum()} assignments")
    if metrics["messages"]:
        per_token = metrics["sent_mib"] * 2**20 / tokens / len(loss)
        lines.append(
            f"moved between ranks: {metrics['sent_mib']:.1f} MiB in "
            f"{metrics['messages']:.0f} messages, {per_token:.0f} bytes per token"
        )
    return "\n".join(lines)


def draw(metrics: dict[str, Any], ranks: int, path: pathlib.Path) -> None:
    """Draws the loss, and the share of each expert over time, one map per layer."""
    loss, loads = metrics["loss"], metrics["loads"]
    steps, layers, experts = loads.shape
    figure = matplotlib.figure.Figure(figsize=(11, 4.5), layout="constrained", dpi=130)
    figure.suptitle(f"Training a mixture of {experts} experts over {ranks} ranks")
    grid = figure.add_gridspec(layers, 2, width_ratios=(1, 1.3))

    curve = figure.add_subplot(grid[:, 0])
    curve.axhline(np.log(256), color="gray", ls=":", label="a guess among 256 bytes")
    curve.plot(loss, color="tab:blue", alpha=0.35, lw=1, label="each step")
    if steps >= SMOOTHED_STEPS:
        mean = np.convolve(loss, np.ones(SMOOTHED_STEPS) / SMOOTHED_STEPS, "valid")
        at = np.arange(len(mean)) + (SMOOTHED_STEPS - 1) / 2
        label = f"mean of {SMOOTHED_STEPS} steps"
        curve.plot(at, mean, color="tab:blue", lw=2, label=label)
    curve.set(xlabel="step", ylabel="loss, nats per byte")
    curve.set(xlim=(0, max(steps - 1, 1)), ylim=(0, None))
    curve.grid(alpha=0.3)
    curve.spines[["top", "right"]].set_visible(False)
    curve.legend(frameon=False, loc="lower left")

    even = 100 / experts
    norm = matplotlib.colors.TwoSlopeNorm(vcenter=even, vmin=0, vmax=3 * even)
    maps = []
    for layer in range(layers):
        shares = 100 * loads[:, layer] / loads[:, layer].sum(1, keepdims=True)
        axes = figure.add_subplot(grid[layer, 1])
        image = axes.imshow(
            shares.T, norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest"
        )
        axes.set(ylabel=f"expert of layer {layer}", yticks=range(experts))
        for rank in range(1, ranks):
            axes.axhline(rank * experts / ranks - 0.5, color="black", lw=0.8)
        axes.tick_params(labelbottom=layer == layers - 1)
        maps.append(axes)
    maps[0].set_title("load of each expert; lines part the ranks", fontsize="medium")
    maps[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=maps, extend="max", ticks=np.arange(4) * even)
    bar.set_label(f"% of assignments (white: even, {even:g})")
    bar.ax.set_yticklabels([f"{tick:g}" for tick in bar.get_ticks()])
    figure.savefig(path)
