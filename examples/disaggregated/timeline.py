"""A picture of one prompt: layers that are computed, pages that flow meanwhile.

Drawn from the traces of the jobs (docs/tracing.md): a layer ends with its `combine`;
an engine's `paged write` lasts from its submission until no NIC reads the pages.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import matplotlib.figure
import matplotlib.patches

_COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
_WIDTH_MIN_MS = 0.6  # so that short writes can be seen


def spans(file: pathlib.Path) -> list[tuple[str, float, float]]:
    """(name, begin, end) in milliseconds of the host's clock, by their begin."""
    events = json.loads(file.read_text())["traceEvents"]
    found = [
        (event["name"], event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3)
        for event in events
        if event["ph"] == "X"
    ]
    return sorted(found, key=lambda span: span[1])


def layers(folder: pathlib.Path, rank_name: str) -> list[tuple[float, float, float]]:
    """Of each layer: begin, begin of its experts, end."""
    # A Fabric of several processes puts the process' index before the suffix.
    (file,) = folder.glob(f"{rank_name}.fabric*.json")
    calls = spans(file)
    dispatches = [begin for name, begin, _ in calls if name == "dispatch"]
    ends = [end for name, _, end in calls if name == "combine"]
    begins = [own_spans(folder, rank_name)[0][0], *ends[:-1]]
    return list(zip(begins, dispatches, ends, strict=True))


def own_spans(folder: pathlib.Path, name: str) -> list[tuple[float, float]]:
    """What a job itself has noted, in milliseconds: (begin, end)."""
    noted = json.loads((folder / f"{name}.spans.json").read_text())
    return [(begin / 1e6, end / 1e6) for begin, end in noted.values()]


def writes(folder: pathlib.Path, rank_name: str) -> list[tuple[str, float, float]]:
    """The writes of a rank's engine: one for each layer, and one for the tail."""
    found = spans(folder / f"{rank_name}.engine.json")
    return [span for span in found if span[0] in ("paged write", "single write")]


def draw(
    folders: dict[str, pathlib.Path],
    prefill_ranks: list[str],
    decode: str,
    title: str,
    output: pathlib.Path,
) -> None:
    """One panel for each folder of traces, on the same scale."""
    figure = matplotlib.figure.Figure(
        figsize=(11, 1.6 + 1.7 * len(folders)), layout="constrained", dpi=130
    )
    figure.suptitle(title)
    panels = figure.subplots(len(folders), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, folder) in zip(panels, folders.items(), strict=True):
        _draw_panel(axes, folder, prefill_ranks, decode)
        axes.set_title(name, fontsize="medium", loc="left")
    panels[-1].set_xlabel("ms since the first rank began")
    count = len(layers(next(iter(folders.values())), prefill_ranks[0]))
    handles: list[Any] = [
        matplotlib.patches.Patch(color=_COLORS[i % len(_COLORS)], label=f"layer {i}")
        for i in range(count)
    ]
    handles.append(matplotlib.patches.Patch(color="black", label="tail"))
    handles.append(matplotlib.patches.Patch(color="gray", label="first token"))
    figure.legend(handles=handles, ncols=len(handles), loc="outside lower center")
    figure.savefig(output)


def _draw_panel(
    axes: Any, folder: pathlib.Path, prefill_ranks: list[str], decode: str
) -> None:
    rows: list[str] = []
    zero = min(begin for rank in prefill_ranks for begin, *_ in layers(folder, rank))

    def bar(row: int, begin: float, end: float, color: str, alpha: float = 1.0) -> None:
        width = max(end - begin, _WIDTH_MIN_MS)
        axes.barh(row, width, left=begin - zero, height=0.7, color=color, alpha=alpha)

    for rank in prefill_ranks:
        row = len(rows)
        rows += [f"{rank} computes", f"{rank} writes"]
        for number, (begin, experts, end) in enumerate(layers(folder, rank)):
            color = _COLORS[number % len(_COLORS)]
            bar(row, begin, experts, color, 0.55)  # attention
            bar(row, experts, end, color)
        for number, (what, begin, end) in enumerate(writes(folder, rank)):
            tail = what == "single write"
            bar(
                row + 1, begin, end, "black" if tail else _COLORS[number % len(_COLORS)]
            )
    for begin, end in own_spans(folder, decode):
        bar(len(rows), begin, end, "gray")
    rows.append(decode)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
