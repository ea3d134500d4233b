"""`jaxfabric bench`: its commands and their help."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from jaxfabric._cli import _bench_weights

if TYPE_CHECKING:
    from jaxfabric._bench import put as put_benchmark

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.command(help=_bench_weights.HELP)(_bench_weights.weights)


@app.callback()
def _root() -> None:
    """Measure this machine: ours beside the floors and the peers, in one run."""


_PUT_HELP = """Writes into another process's memory: MB/s, operations/s, p50, p99.

Kinds: "single" is contiguous, "paged" goes to shuffled pages (16 KiB at most, four
at least), "scatter" has a slice for each of several peers. Beside jf.TransferEngine
over each transport stand memcpy into shared memory, plain sockets with an
acknowledgement, NIXL (UCX), Mooncake (TCP), libfabric's fi_rma_bw and perftest's
ib_write_bw, where they are installed. Bytes are verified at the target, those of
fi_rma_bw and ib_write_bw excepted.

\b
  jaxfabric bench put
  jaxfabric bench put --transport shm --sizes 4KiB,1MiB --kinds single
  jaxfabric bench put --json put.json --plot put.png
  pip install 'jaxfabric[peers]'    # NIXL and Mooncake; NIXL's wheel brings torch
  jaxfabric bench put --peer-python OTHER_VENV/bin/python

Each subject has processes of its own and takes turns with the others. Latency is
one operation alone, until its initiator knows that it is done; the rate is that of
a window of operations in flight. Cases that a peer wins are listed at the end.

A software NIC or the loopback interface proves nothing about hardware speed.
"""


def _listed(
    text: str, allowed: tuple[str, ...], option: str, separator: str = ","
) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(separator) if part.strip())
    for part in found:
        if part not in allowed:
            raise typer.BadParameter(
                f"{part!r} is none of {', '.join(allowed)}", param_hint=option
            )
    if not found:
        raise typer.BadParameter("is empty", param_hint=option)
    return found


def _chosen_transports(text: str) -> tuple[str, ...]:
    from jaxfabric._mesh import TRANSPORTS

    # The fake one joins nothing but engines of one process.
    return _listed(
        text, tuple(name for name in TRANSPORTS if name != "fake"), "--transport"
    )


_Transports = Annotated[
    str, typer.Option(help="Of jf.TransferEngine, comma-separated.")
]
_Kinds = Annotated[str, typer.Option(help="Comma-separated.")]
_Sizes = Annotated[
    str | None,
    typer.Option(help="As in 4KiB,1MiB; by default 1KiB to 64MiB by fours."),
]
_Subjects = Annotated[
    str | None,
    typer.Option(
        help="Of memcpy, sockets, jaxfabric, nixl, mooncake, fi_rma_bw, ib_write_bw; "
        "all by default."
    ),
]
_Rounds = Annotated[int, typer.Option(min=1, help="Turns of each subject.")]
_Seconds = Annotated[
    float, typer.Option(min=0.001, help="For each figure in each round.")
]
_Window = Annotated[
    int, typer.Option(min=2, max=1024, help="Operations in flight, at most.")
]
_ScatterPeers = Annotated[
    int, typer.Option(min=1, max=16, help="Targets of a scatter.")
]
_Nics = Annotated[
    int, typer.Option(min=1, max=8, help="NICs of our engine, on each side.")
]
_OnePlace = Annotated[
    bool,
    typer.Option(
        "--one-place",
        help="All writes have the same source and target, as ib_write_bw's have; "
        "by default those in flight have places of their own.",
    ),
]
_Counted = Annotated[
    bool,
    typer.Option("--counted", help="Measure ours also with writes that are counted."),
]
_PeerPython = Annotated[
    str | None,
    typer.Option(help="Interpreter that has NIXL and Mooncake; this one by default."),
]
_JsonFile = Annotated[
    pathlib.Path | None, typer.Option("--json", help="Write everything here.")
]
_PlotFile = Annotated[
    pathlib.Path | None,
    typer.Option("--plot", help="Draw here; needs matplotlib."),
]
_Quick = Annotated[
    bool, typer.Option("--quick", help="Three sizes, few operations: a trial.")
]


@app.command(help=_PUT_HELP)
def put(
    transport: _Transports = "shm,ofi/tcp",
    kinds: _Kinds = "single,paged,scatter",
    sizes: _Sizes = None,
    subjects: _Subjects = None,
    rounds: _Rounds = 3,
    seconds: _Seconds = 0.2,
    window: _Window = 16,
    one_place: _OnePlace = False,
    scatter_peers: _ScatterPeers = 4,
    nics: _Nics = 1,
    counted: _Counted = False,
    peer_python: _PeerPython = None,
    json_file: _JsonFile = None,
    plot_file: _PlotFile = None,
    quick: _Quick = False,
) -> None:
    from jaxfabric._bench import case, report
    from jaxfabric._bench import put as put_benchmark

    try:
        chosen = tuple(
            case.parse_size(part) for part in (sizes or "").split(",") if part
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sizes") from None
    families = put_benchmark.FAMILIES
    settings = put_benchmark.Settings(
        transports=_chosen_transports(transport),
        kinds=_listed(kinds, case.KINDS, "--kinds"),
        sizes=chosen or case.SIZES,
        subjects=_listed(subjects or ",".join(families), families, "--subjects"),
        rounds=rounds,
        seconds=seconds,
        window=window,
        one_place=one_place,
        peers=scatter_peers,
        nics=nics,
        counted=counted,
        peer_python=peer_python or sys.executable,
    )
    result = put_benchmark.run(
        settings.quick() if quick else settings,
        lambda line: typer.echo(line, err=True),
    )
    _reported(result, json_file)
    if plot_file is not None:
        _plotted(lambda: report.plot(result, plot_file))


def _reported(result: put_benchmark.Result, json_file: pathlib.Path | None) -> None:
    from jaxfabric._bench import report

    report.show(result)
    if json_file is not None:
        report.write_json(result, json_file)
    if all(row.figures is None for row in result.rows):
        typer.echo("nothing was measured", err=True)
        raise typer.Exit(1)


_KV_HELP = """Writes of KV pages, by page size: pages/s, MB/s, operations/s, p50, p99.

One operation moves the pages of one layer of a request, from pages of the sender's
pool to shuffled pages of the receiver's. Beside jf.TransferEngine over each transport,
with and without a count at the receiver (jf.kv counts), stand memcpy page by page into
shared memory, plain sockets, NIXL (UCX) and Mooncake (TCP), as in `bench put`.

\b
  jaxfabric bench kv
  jaxfabric bench kv --page-sizes 16KiB --pages 256 --transport ofi/tcp
  jaxfabric bench kv --json kv.json --peer-python OTHER_VENV/bin/python
"""

_PageSizes = Annotated[str, typer.Option(help="Comma-separated.")]
_Pages = Annotated[int, typer.Option(min=1, max=4096, help="Of one operation.")]


@app.command(help=_KV_HELP)
def kv(
    transport: _Transports = "shm,ofi/tcp",
    page_sizes: _PageSizes = "1KiB,8KiB,16KiB,64KiB",
    pages: _Pages = 64,
    subjects: _Subjects = None,
    rounds: _Rounds = 3,
    seconds: _Seconds = 0.5,
    window: _Window = 16,
    nics: _Nics = 1,
    peer_python: _PeerPython = None,
    json_file: _JsonFile = None,
    quick: _Quick = False,
) -> None:
    from jaxfabric._bench import case
    from jaxfabric._bench import kv as kv_benchmark
    from jaxfabric._bench import put as put_benchmark

    try:
        lengths = tuple(case.parse_size(part) for part in page_sizes.split(","))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--page-sizes") from None
    families = put_benchmark.FAMILIES
    settings = put_benchmark.Settings(
        transports=_chosen_transports(transport),
        subjects=_listed(subjects or ",".join(families), families, "--subjects"),
        rounds=1 if quick else rounds,
        seconds=0.01 if quick else seconds,
        window=window,
        nics=nics,
        counted=True,
        peer_python=peer_python or sys.executable,
    )
    result = kv_benchmark.run(
        settings, lengths, pages, lambda line: typer.echo(line, err=True)
    )
    _reported(result, json_file)


_MOE_HELP = """Dispatch and combine inside jit: microseconds, p50 and p99, and floors.

Starts one process for each GPU, or four on CPU, and times chains of dispatch,
combine, and both, with bfloat16 and e4m3 on the wire, uniform and skewed routing.
Beside them stand lax.all_to_all, lax.ragged_all_to_all where the platform has it, and
the floor: memcpy on CPU, copies from GPU to GPU else. Every figure is of the slowest
rank in each iteration. Results are checked before they are timed.

\b
  jaxfabric bench moe
  jaxfabric bench moe --tokens 128,4096 --routing uniform --json moe.json --plot moe.png
  jaxfabric bench moe -n 1 --devices-per-process 4 --platform cpu --quick
"""

_Tokens = Annotated[
    str | None,
    typer.Option(help="Of each rank, comma-separated; as the platform can by default."),
]
_MoeSubjects = Annotated[
    str | None,
    typer.Option(
        help="Semicolon-separated, as in 'dispatch;pair, e4m3'; all by default."
    ),
]
_Routing = Annotated[str, typer.Option(help="Comma-separated.")]
_Platform = Annotated[
    str | None,
    typer.Option(help="cpu or cuda; by default cuda where there are NVIDIA GPUs."),
]
_Processes = Annotated[
    int | None,
    typer.Option("-n", "--processes", min=1, help="One for each GPU by default, or 4."),
]
_Devices = Annotated[int, typer.Option(min=1, help="JAX devices of each process.")]
_Positive = Annotated[int, typer.Option(min=1)]
_Chain = Annotated[
    int | None,
    typer.Option(min=1, help="Calls in the chain that one iteration is."),
]
_Skew = Annotated[
    float, typer.Option(min=0.0, help="Exponent of Zipf's law, for skewed routing.")
]
_MoeSeconds = Annotated[float, typer.Option(min=0.01, help="For each figure.")]
_Iterations = Annotated[int, typer.Option(min=5, help="For each figure, at most.")]
_MoeTransport = Annotated[str | None, typer.Option(help="Of jf.Fabric.")]
_MoeQuick = Annotated[bool, typer.Option("--quick", help="Tiny sizes: a trial.")]


@app.command(help=_MOE_HELP)
def moe(
    tokens: _Tokens = None,
    routing: _Routing = "uniform,skewed",
    subjects: _MoeSubjects = None,
    hidden: _Positive = 7168,
    experts: _Positive = 256,
    top_k: _Positive = 8,
    skew: _Skew = 1.0,
    seconds: _MoeSeconds = 2.0,
    iterations: _Iterations = 200,
    decode_chain: _Chain = None,
    prefill_chain: _Chain = None,
    platform: _Platform = None,
    processes: _Processes = None,
    devices_per_process: _Devices = 1,
    transport: _MoeTransport = None,
    json_file: _JsonFile = None,
    plot_file: _PlotFile = None,
    quick: _MoeQuick = False,
) -> None:
    from jaxfabric._bench import moe as moe_benchmark
    from jaxfabric._bench import moe_case, moe_report
    from jaxfabric._mesh import TRANSPORTS

    if transport is not None and transport not in TRANSPORTS:
        raise typer.BadParameter(
            f"{transport!r} is none of {', '.join(TRANSPORTS)}",
            param_hint="--transport",
        )
    gpus = moe_benchmark.gpu_count()
    platform = platform or ("cuda" if gpus else "cpu")
    on_cpu = platform == "cpu"
    count = processes or (4 if on_cpu else max(1, gpus // devices_per_process))
    names = moe_benchmark.SUBJECTS
    settings = moe_benchmark.Settings(
        tokens=_numbers(tokens) or moe_benchmark.default_tokens(on_cpu),
        routings=_listed(routing, moe_case.ROUTINGS, "--routing"),
        subjects=_listed(subjects or ";".join(names), names, "--subjects", ";"),
        hidden=hidden,
        experts=experts,
        top_k=top_k,
        skew=skew,
        seconds=seconds,
        iterations=iterations,
        decode_length=decode_chain or (20 if on_cpu else 100),
        prefill_length=prefill_chain or (4 if on_cpu else 20),
        queued=not on_cpu,
        transport=transport,
    )
    if quick:
        settings = settings.quick()
    try:
        settings.check(count * devices_per_process)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    os.environ["JAX_PLATFORMS"] = platform  # of the processes that it starts
    code, result = moe_benchmark.run(
        settings,
        processes=count,
        devices_per_process=devices_per_process,
        json_file=json_file,
    )
    if result is None:
        raise typer.Exit(code or 1)
    moe_report.show(result)
    if plot_file is not None:
        _plotted(lambda: moe_report.plot(result, plot_file))
    raise typer.Exit(code)


def _numbers(text: str | None) -> tuple[int, ...]:
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(
            f"{text!r} is no list of numbers of tokens", param_hint="--tokens"
        )
    return tuple(sorted(map(int, parts)))


def _plotted(draw: Callable[[], None]) -> None:
    try:
        draw()
    except ImportError:
        raise typer.BadParameter(
            "needs matplotlib: pip install matplotlib", param_hint="--plot"
        ) from None
