"""The picture of a run: reward, phases of each push, and who did what when."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("agg")

import matplotlib.pyplot as plt

PHASES = ("wait", "pack", "seal", "transfer")
RECEIPTS = ("verify", "unpack")
SHOWN_S = 1.0  # of the time line


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
    """Draws three panels.

    Args:
      report: of main.py: what sampler and trainers wrote.
    """
    figure, (above, middle, below) = plt.subplots(
        3, 1, figsize=(8, 9), layout="constrained", height_ratios=(3, 3, 2)
    )
    _reward(above, report["sampler"]["batches"])
    _phases(middle, report["trainer0"]["pushes"])
    _timeline(below, report)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _reward(axes: Any, batches: list[dict[str, Any]]) -> None:
    axes.plot([batch["version"] for batch in batches], "C1", lw=0.8)
    axes.set_ylabel("version that answered", color="C1")
    left = axes.twinx()
    left.plot([batch["reward"] for batch in batches], "C0")
    left.set_ylabel("mean reward", color="C0")
    left.set_ylim(0, 1)
    axes.set_xlabel("batch")
    axes.set_title("Share of right answers, and how new the weights were")


def _phases(axes: Any, pushes: list[dict[str, Any]]) -> None:
    versions = [push["version"] for push in pushes]
    for name in PHASES:
        axes.plot(versions, [push[f"{name}_s"] * 1e3 for push in pushes], label=name)
    for name in RECEIPTS:
        most = [
            max((r[f"{name}_s"] for r in push["receipts"].values()), default=np.nan)
            for push in pushes
        ]
        axes.plot(versions, np.asarray(most) * 1e3, "--", label=f"{name} (sampler)")
    total = [push["total_s"] * 1e3 for push in pushes]
    axes.plot(versions, total, "k", lw=0.8, label="total")
    axes.set_yscale("log")
    axes.set_xlabel("version")
    axes.set_ylabel("ms")
    axes.set_title("Phases of each push (rank 0; transfer overlaps with the others)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")


def _timeline(axes: Any, report: dict[str, Any]) -> None:
    """Half-way through the run."""
    trainer = report["trainer0"]
    middle = trainer["steps"] or trainer["pushes"]  # all steps may be done already
    begin = middle[len(middle) // 2]["begin"]
    pushes = [p | {"end": p["begin"] + p["total_s"]} for p in trainer["pushes"]]
    lanes = (
        ("sampler answers", report["sampler"]["batches"], "C0"),
        ("a push travels", pushes, "C1"),
        ("trainer learns", trainer["steps"], "C2"),
    )
    for lane, (_, spans, colour) in enumerate(lanes):
        shown = [s for s in spans if begin - SHOWN_S < s["begin"] < begin + SHOWN_S]
        axes.broken_barh(
            [(s["begin"] - begin, s["end"] - s["begin"]) for s in shown],
            (lane - 0.35, 0.7),
            color=colour,
            edgecolor="white",
        )
    axes.set_xlim(0, SHOWN_S)
    axes.set_yticks(range(len(lanes)), [name for name, _, _ in lanes])
    axes.set_xlabel("s, from the middle of the run")
    axes.set_title("Who does what, in the middle of the run")
