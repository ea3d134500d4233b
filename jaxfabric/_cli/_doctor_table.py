"""`jaxfabric doctor`: prints what jaxfabric._doctor found."""

from __future__ import annotations

import json
import sys

import rich.console
import rich.table
import rich.text

from jaxfabric import _doctor

_PIPED_WIDTH = 160  # wide enough that few lines are folded
_STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red", "SKIP": "dim"}


def show(as_json: bool) -> int:
    """Prints the table; returns the exit code, 1 if a check failed."""
    checks = _doctor.examine()
    if as_json:
        print(json.dumps(_doctor.to_json(checks), indent=1))
    else:
        width = None if sys.stdout.isatty() else _PIPED_WIDTH
        rich.console.Console(width=width).print(_table(checks))
    return int(any(check.verdict == _doctor.Verdict.FAIL for check in checks))


def _table(checks: list[_doctor.Check]) -> rich.table.Table:
    table = rich.table.Table(box=None, pad_edge=False)
    for heading in ("check", "verdict", "found", "fix"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row(
            rich.text.Text(check.name),
            rich.text.Text(check.verdict, style=_STYLES[check.verdict]),
            rich.text.Text(check.found),
            rich.text.Text(check.fix),
        )
    return table
