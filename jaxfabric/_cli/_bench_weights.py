"""`jaxfabric bench weights`: its options and their help."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

HELP = """A push of parameters from trainer to sampler: seconds, phases, and floors.

Starts the processes of both jobs, with a model in bfloat16 that each shards its own
way. Every round measures what memory and wire can do, then a push by jf.weights until
the sampler's ranks have arrays; beside it, on the same bytes, one rank that gathers
and broadcasts, and jax.experimental.transfer. Bits are verified in a round before.

\b
  jaxfabric bench weights
  jaxfabric bench weights --bytes 64MiB --transport shm,ofi/tcp --json weights.json
  jaxfabric bench weights --plan-only     # a model of 10**12 parameters, on paper

--plan-only starts nothing: it plans 256 -> 128 ranks, and says what the plan would
take at the rates of a cluster.
"""

_Bytes = Annotated[str, typer.Option("--bytes", help="Of all parameters.")]
_Sources = Annotated[int, typer.Option(min=1, max=8, help="Trainer's processes.")]
_Targets = Annotated[int, typer.Option(min=1, max=8, help="Sampler's processes.")]
_Transports = Annotated[
    str, typer.Option(help="Of jf.TransferEngine, comma-separated.")
]
_Subjects = Annotated[
    str | None,
    typer.Option(
        help="Semicolon-separated, of push; gather and broadcast; "
        "jax.experimental.transfer. All by default."
    ),
]
_Rounds = Annotated[int, typer.Option(min=1, help="That are timed.")]
_Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="That each Sender packs with, and each Receiver unpacks with. By the "
        "number of cores by default.",
    ),
]
_Quantise = Annotated[
    bool, typer.Option("--quantise", help="To e4m3 in blocks; the push alone.")
]
_PlanOnly = Annotated[bool, typer.Option("--plan-only", help="The cost model alone.")]
_JsonFile = Annotated[
    pathlib.Path | None, typer.Option("--json", help="Write everything here.")
]


def weights(
    nbytes: _Bytes = "1GiB",
    sources: _Sources = 4,
    targets: _Targets = 2,
    transport: _Transports = "shm",
    subjects: _Subjects = None,
    rounds: _Rounds = 5,
    threads: _Threads = None,
    quantise: _Quantise = False,
    plan_only: _PlanOnly = False,
    json_file: _JsonFile = None,
) -> None:
    """Measures, or plans only."""
    from jaxfabric._bench import weights as weights_benchmark
    from jaxfabric._bench import weights_report

    if plan_only:
        typer.echo(weights_report.plan_only())
        return
    every = weights_benchmark.SUBJECTS[:1] if quantise else weights_benchmark.SUBJECTS
    listed = subjects.split(";") if subjects else every
    try:
        settings = weights_benchmark.Settings(
            nbytes=weights_benchmark.parse_bytes(nbytes),
            sources=sources,
            targets=targets,
            transports=tuple(t.strip() for t in transport.split(",") if t.strip()),
            subjects=tuple(name.strip() for name in listed),
            rounds=rounds,
            threads=threads,
            quantise=quantise,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        result = weights_benchmark.run(
            settings, lambda line: typer.echo(line, err=True)
        )
    except weights_benchmark.RankFailed as failure:
        typer.echo(f"bench weights: {failure}", err=True)
        raise typer.Exit(1) from None
    weights_report.show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
