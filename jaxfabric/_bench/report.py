"""What `jaxfabric bench put` prints, writes and draws."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import rich.console
import rich.table
import rich.text

from .case import Case, readable
from .figures import Figures, Row, alone_us
from .put import Result

_STYLES = {"floor": "dim", "ours": "bold", "peer": ""}
# Of a terminal it is asked; files and pipes get this.
_COLUMNS = 140

NOTES = """\
MB/s (10^6 bytes) and op/s: many in flight. p50 and p99: one operation alone, until
its initiator knows that it is done; "mean" where a tool tells no more. "of floor" is
the rate over that of memcpy into another process (shm) or of plain sockets (tcp).
A software NIC or the loopback interface proves nothing about hardware speed."""


def show(result: Result) -> None:
    """Prints the tables, every case that a peer wins, and what was not measured."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=_COLUMNS)
    console.print(rich.text.Text(machine_text(result)))
    absent = failed_throughout(result.rows)
    shown = [row for row in result.rows if row.subject not in absent]
    for case in dict.fromkeys(row.case for row in shown):
        console.print(_table(case, [row for row in shown if row.case == case]))
    if shown:
        console.print(rich.text.Text(NOTES))
    for line in (*verdict(result), *(f"{s}: {absent[s]}" for s in absent)):
        console.print(rich.text.Text(line))


def failed_throughout(rows: Sequence[Row]) -> dict[str, str]:
    """The subjects that failed for one reason in all their cases, and the reason."""
    reasons: dict[str, set[str]] = {}
    for row in rows:
        reasons.setdefault(row.subject, set()).add(row.reason)
    return {
        subject: reason
        for subject, (reason, *others) in reasons.items()
        if reason and not others
    }


def machine_text(result: Result) -> str:
    """The machine's line, and the versions'."""
    versions = {k: v for found in result.versions.values() for k, v in found.items()}
    listed = ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
    return f"{result.machine_line}; load afterwards {result.load_after}\n{listed}"


def _table(case: Case, rows: list[Row]) -> rich.table.Table:
    title = case.label
    if case.kind == "paged" and not case.page:
        pages = case.size // case.page_bytes
        title += f", {pages} pages of {readable(case.page_bytes)}"
    elif case.kind == "scatter":
        title += f" to {case.targets} peers"
    if case.one_place:
        title += ", all in one place"
    table = rich.table.Table(
        title=f"{title}, at most {case.window} in flight",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("subject", min_width=22)
    headings = ["medium", "MB/s", "of floor", "op/s", "p50 us", "p99 us"]
    if case.page:
        headings.insert(3, "pages/s")
    for heading in headings:
        table.add_column(heading, justify="right", min_width=9)
    table.add_column("", overflow="fold")
    for row in rows:
        cells = [row.subject, row.medium, *_cells(row, rows), row.reason]
        style = _STYLES[row.role]
        table.add_row(*(rich.text.Text(cell, style=style) for cell in cells))
    return table


def _cells(row: Row, rows: list[Row]) -> list[str]:
    figures = row.figures
    pages = row.case.size // row.case.page if row.case.page else 0
    if figures is None:
        return ["-"] * (6 if pages else 5)
    floors = [
        r.figures
        for r in rows
        if r.role == "floor" and r.medium == row.medium and r.figures is not None
    ]
    return [
        f"{figures.mb_s:.1f}",
        f"{figures.mb_s / floors[0].mb_s:.2f}" if floors else "-",
        *([f"{figures.op_s * pages:.0f}"] if pages else []),
        f"{figures.op_s:.0f}",
        _alone(figures),
        "-" if figures.p99_us is None else f"{figures.p99_us:.1f}",
    ]


def _alone(figures: Figures) -> str:
    if figures.p50_us is not None:
        return f"{figures.p50_us:.1f}"
    return "-" if figures.mean_us is None else f"mean {figures.mean_us:.1f}"


def verdict(result: Result) -> list[str]:
    """How often ours is at least as good as the best peer, and where it is not."""
    lines = []
    groups = dict.fromkeys((duel.ours, duel.what) for duel in result.duels)
    for ours, what in groups:
        duels = [d for d in result.duels if (d.ours, d.what) == (ours, what)]
        lost = [duel for duel in duels if duel.factor < 1]
        lines.append(
            f"{ours}, {what}: as good as the best peer or better in "
            f"{len(duels) - len(lost)} of {len(duels)} cases"
        )
        lines += [
            f"  {d.case.label}: {d.peer} is {1 / d.factor:.2f} times better"
            for d in lost
        ]
    return lines


def write_json(result: Result, path: pathlib.Path) -> None:
    """Everything, as one object."""
    text = json.dumps(result.to_json(), indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def plot(result: Result, path: pathlib.Path) -> None:
    """Rate and latency over size, one column for each kind of write.

    Raises:
      ImportError: there is no matplotlib.
    """
    import matplotlib.figure

    kinds = list(dict.fromkeys(row.case.kind for row in result.rows))
    figure = matplotlib.figure.Figure(
        figsize=(5.2 * len(kinds), 8.5), layout="constrained"
    )
    axes = figure.subplots(2, len(kinds), squeeze=False, sharex=True)
    names = list(dict.fromkeys(row.subject for row in result.rows))
    for column, kind in enumerate(kinds):
        for number, name in enumerate(names):
            rows = [
                row
                for row in result.rows
                if (row.case.kind, row.subject) == (kind, name) and row.figures
            ]
            for line, value in enumerate((lambda f: f.mb_s, alone_us)):
                points = [
                    (row.case.size, y)
                    for row in rows
                    if row.figures and (y := value(row.figures)) is not None
                ]
                if points:
                    dashes = {"floor": "--", "ours": "-", "peer": ":"}[rows[0].role]
                    axes[line][column].plot(
                        *zip(*points, strict=True),
                        dashes,
                        marker="o",
                        markersize=3,
                        color=f"C{number}",
                        label=name,
                    )
        axes[0][column].set_title(kind)
        axes[1][column].set_xlabel("bytes of one operation")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("MB/s, many in flight")
    axes[1][0].set_ylabel("us, one alone")
    lines = {str(line.get_label()): line for axis in axes.flat for line in axis.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper")
    figure.suptitle(result.machine_line, fontsize="small")
    figure.savefig(path)
