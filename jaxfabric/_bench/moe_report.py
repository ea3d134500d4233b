"""What `jaxfabric bench moe` prints and draws."""

from __future__ import annotations

import pathlib
from typing import Any

import rich.console
import rich.table
import rich.text

from .moe import rows_of
from .moe_case import Row

_STYLES = {"ours": "bold", "peer": ""}
# Of a terminal it is asked; files and pipes get this.
_COLUMNS = 120

NOTES = """\
Microseconds of one call in a jitted chain with donated buffers, of the slowest rank
in each iteration (a chain); p99 of 100 iterations or more. On GPUs chains are queued
behind each other, as the steps of a model are. Of floor: over the time that the bytes
of the rows alone take. "dispatch" and "pair" (dispatch and combine) group rows by
expert, and repeat them unless expand=False; zero_tail=False unless said.
"combine" sums the rows of a rank's experts; with expand=False the program has done so.
"exchange" moves rows one way and does nothing else: lax.all_to_all as many as there
are tokens from each rank to each, lax.ragged_all_to_all those that are routed. "by
hand" is the pair written with lax.all_to_all."""


def show(result: dict[str, Any]) -> None:
    """Prints a table for each size and routing."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=_COLUMNS)
    for line in heading(result):
        console.print(rich.text.Text(line))
    rows = rows_of(result)
    for case in dict.fromkeys(row.case for row in rows):
        busy = result["imbalance"][case.label]
        title = (
            f"{case.label}: {case.hidden} wide, {case.experts} experts, "
            f"top-{case.top_k}; the busiest expert has {busy} times the mean"
        )
        console.print(_table(title, [row for row in rows if row.case == case]))
    console.print(rich.text.Text(NOTES))


def heading(result: dict[str, Any]) -> list[str]:
    """The machine's lines."""
    return [
        f"{result['machine_line']}; load afterwards {result['machine']['load_after']}",
        f"{result['devices']}; transport {result['transport']}; "
        f"barrier {result['barrier_us']:.1f} us",
        f"floor: {result['floor']}",
    ]


def _table(title: str, rows: list[Row]) -> rich.table.Table:
    table = rich.table.Table(
        title=title, title_justify="left", box=None, pad_edge=False
    )
    table.add_column("subject", min_width=30)
    table.add_column("what", min_width=8)
    for name in ("p50 us", "p99 us", "floor us", "of floor"):
        table.add_column(name, justify="right", min_width=9)
    table.add_column("", overflow="fold")
    for row in rows:
        numbers = (row.p50_us, row.p99_us, row.floor_us)
        cells = [
            row.subject,
            row.what,
            *map(_number, numbers),
            of_floor(row),
            row.reason,
        ]
        style = _STYLES[row.role]
        table.add_row(*(rich.text.Text(cell, style=style) for cell in cells))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def of_floor(row: Row) -> str:
    """As in "2.9": the figure over the floor."""
    if row.p50_us is None or not row.floor_us:
        return "-"
    return f"{row.p50_us / row.floor_us:.1f}"


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Medians over tokens, a column for each part and a line for each subject.

    Raises:
      ImportError: there is no matplotlib.
    """
    import matplotlib.figure

    rows = [row for row in rows_of(result) if row.p50_us is not None]
    parts = ("dispatch", "combine", "pair")
    routings = list(dict.fromkeys(row.case.routing for row in rows))
    figure = matplotlib.figure.Figure(
        figsize=(5.2 * len(parts), 4.2 * len(routings)), layout="constrained"
    )
    axes = figure.subplots(len(routings), len(parts), squeeze=False, sharex=True)
    subjects = list(dict.fromkeys(row.subject for row in rows))
    for line, routing in enumerate(routings):
        for column, part in enumerate(parts):
            axis = axes[line][column]
            # One way of rows alone stands beside both of our ways.
            shown = (part,) if part == "pair" else (part, "exchange")
            here = [r for r in rows if r.case.routing == routing and r.what in shown]
            for number, subject in enumerate(subjects):
                _draw(axis, [r for r in here if r.subject == subject], f"C{number}")
            floors = {
                r.case.tokens: r.floor_us
                for r in here
                if r.floor_us and r.what == part and r.wire == "bf16"
            }
            if floors:
                axis.plot(
                    *zip(*floors.items(), strict=True), "k--", label="floor, bf16"
                )
            axis.set_title(f"{part}, {routing}")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("tokens of each rank")
    for column in axes:
        column[0].set_ylabel("us, median of the slowest rank")
    lines = {str(line.get_label()): line for axis in axes.flat for line in axis.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
    figure.suptitle("\n".join(heading(result)), fontsize="small")
    figure.savefig(path)


def _draw(axis: Any, rows: list[Row], color: str) -> None:
    if rows:
        axis.plot(
            [row.case.tokens for row in rows],
            [row.p50_us for row in rows],
            "-" if rows[0].role == "ours" else ":",
            marker="o",
            markersize=3,
            color=color,
            label=rows[0].subject,
        )
