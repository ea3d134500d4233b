"""The commands and their help. What they do is in the modules beside this one."""

from __future__ import annotations

import importlib.metadata
import pathlib
import shlex
from typing import Annotated

import typer

from jaxfabric._cli import _bench_app, _trace_app

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One-sided communication for jax.jit programs: start and test them.",
)
app.add_typer(_bench_app.app, name="bench")
app.add_typer(_trace_app.app, name="trace")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jaxfabric {importlib.metadata.version('jaxfabric')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and stop.",
        ),
    ] = False,
) -> None:
    """One-sided communication for jax.jit programs: start and test them."""


_RUN_HELP = """Start SCRIPT on several processes of this machine.

Each process has jax.distributed ready before the script's first line, so the
script needs no set-up code and is the same on one process, here and on a
cluster. A script that calls jax.distributed.initialize() itself works too.

\b
  jaxfabric run -n 4 train.py --steps 100
  jaxfabric run -n 2 --devices-per-process 4 train.py
  jaxfabric run -n 4 --timeout-s 60 train.py   # stacks of all ranks after 60 s
  JAX_PLATFORMS=cuda jaxfabric run -n 2 train.py      # on GPUs; else on the CPU

Lines are prefixed with their rank. The first rank that fails decides the exit
code (128 + the signal's number if a signal ended it), and its traceback comes
last on the screen. JAX itself aborts the survivors of a dead process (SIGABRT):
at once when rank 0 died, after its heartbeat time-out (100 s) otherwise.

Options go before SCRIPT; everything after it goes to the script. On a cluster
start the script as any multi-host JAX program (Slurm, Kubernetes, mpirun). For
tests use the pytest plugin: @pytest.mark.jaxfabric(processes=4).
"""


@app.command(
    help=_RUN_HELP,
    context_settings={
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "ignore_unknown_options": False,
    },
)
def run(
    context: typer.Context,
    script: Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="SCRIPT [ARGS]...",
            help="The Python file to run, and its arguments.",
        ),
    ],
    processes: Annotated[
        int,
        typer.Option("-n", "--processes", min=1, max=1024, help="How many processes."),
    ],
    devices_per_process: Annotated[
        int, typer.Option(min=1, max=256, help="JAX devices of each process.")
    ] = 1,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="End all ranks after this many seconds, with their stacks; "
            "the exit code is 124. Without it there is no limit.",
        ),
    ] = None,
    grace_s: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Seconds that the other ranks get to report after the first failure.",
        ),
    ] = 10.0,
    python_args: Annotated[
        str,
        typer.Option(
            help='Arguments of the Python interpreter, as in "-X dev -W error".'
        ),
    ] = "",
) -> None:
    from jaxfabric._cli import _run

    if not script.is_file():
        raise typer.BadParameter(f"there is no file {script}", param_hint="SCRIPT")
    raise typer.Exit(
        _run.run(
            _run.Job(
                script=str(script),
                script_args=tuple(context.args),
                processes=processes,
                devices_per_process=devices_per_process,
                timeout_s=timeout_s,
                grace_s=grace_s,
                python_args=tuple(shlex.split(python_args)),
            )
        )
    )


_DOCTOR_HELP = """Look at this machine: what works, what does not, and the repair.

A table of PASS, WARN, FAIL and SKIP: versions and their FFI API, each transport
(not built, library missing, no device, usable), the limits that bite
(locked memory, /dev/shm, ptrace, XLA's threads), NICs and NUMA nodes. The exit
code is 1 if anything FAILs, which means that jaxfabric cannot work here.

\b
  jaxfabric doctor
  jaxfabric doctor --json | jq '.[] | select(.verdict != "PASS")'
"""


@app.command(help=_DOCTOR_HELP)
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of objects instead.")
    ] = False,
) -> None:
    from jaxfabric._cli import _doctor_table

    raise typer.Exit(_doctor_table.show(as_json))
