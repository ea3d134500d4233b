"""`jaxfabric trace`: what to do with the files of `fabric.trace`."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Work on the files that Fabric.trace and TransferEngine.trace write."""


_MERGE_HELP = """Make one file of several, on one time line.

For the files of the processes of a Fabric, or of both sides of a transfer. Processes
of one host share a clock; files of other hosts are moved by the difference of the
hosts' wall clocks. Open the result in https://ui.perfetto.dev.

\b
  jaxfabric trace merge step.0.json step.1.json -o step.json
"""


@app.command(help=_MERGE_HELP)
def merge(
    files: Annotated[
        list[pathlib.Path],
        typer.Argument(metavar="FILE", help="What was recorded."),
    ],
    output: Annotated[
        pathlib.Path, typer.Option("-o", "--output", help="Where to write it.")
    ],
) -> None:
    from jaxfabric._trace_file import merge_traces, write_trace

    contents = []
    for file in files:
        try:
            content = json.loads(file.read_text())
            content["otherData"]["boot_id"], content["traceEvents"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise typer.BadParameter(
                f"{file} is not a trace of jaxfabric ({error})", param_hint="FILE"
            ) from None
        contents.append(content)
    write_trace(output, merge_traces(contents))
