"""The same programs on GPUs as on CPU: against NumPy and pure JAX.

On all GPUs of this machine, two or more: in one process, in processes with half of them
each, and in one for each. Everything runs in processes of its own, because JAX takes a
device for good.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxfabric as jf
from jaxfabric import _cuda, _ffi

FOLDER = Path(__file__).parent
DEADLINE_S = 240
REPLAYED = "--xla_gpu_graph_min_graph_size=1"
NOT_CAPTURED = "--xla_gpu_enable_command_buffer="


def gpu_count() -> int:
    """GPUs of this machine, without waking the driver."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def why_not(processes: int) -> str:
    """Why a test cannot run here on so many processes, or an empty string."""
    gpus = gpu_count()
    if gpus < 2:
        return f"needs 2 GPUs, this machine has {gpus}"
    if _cuda.library_path() is None:
        return "no libjaxfabric_cuda.so: built without nvcc"
    if gpus % processes:
        return f"{gpus} GPUs do not divide by {processes} processes"
    return ""


def run(program: str, processes: int, cases: str, xla_flags: str = "") -> None:
    """Runs cases of one of the programs beside this; 0 processes: one a GPU."""
    gpus = gpu_count()
    reason = why_not(processes or 1)
    if processes == 0 and gpus == 2:
        reason = "2 GPUs: the test with two processes is the same"
    if reason:
        pytest.skip(reason)
    processes = processes or gpus
    environment = dict(os.environ)
    if xla_flags:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {xla_flags}"
    numbers = (str(gpus), str(processes))
    started = [
        subprocess.Popen(
            [sys.executable, str(FOLDER / program), cases, *numbers, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(processes)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, output
            print(output)
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


each_layout = pytest.mark.parametrize(
    "processes", [1, 2, 0], ids=["one-process", "two-processes", "process-per-gpu"]
)


@each_layout
@pytest.mark.parametrize(
    "cases", ["moe,exchange,primitives,axes", "gradients,halves,wire"]
)
def test_same_program_as_on_cpu(processes: int, cases: str) -> None:
    run("cuda_cases.py", processes, cases)


@each_layout
@pytest.mark.parametrize(
    "flags", [REPLAYED, NOT_CAPTURED], ids=["command-buffers", "no-command-buffers"]
)
def test_a_thousand_steps(processes: int, flags: str) -> None:
    run("cuda_cases.py", processes, "chain", flags)


@each_layout
def test_failures_are_told_by_the_next_call(processes: int) -> None:
    run("cuda_failures.py", processes, "bad_expert,untold")


@each_layout
def test_failures_in_replayed_programs(processes: int) -> None:
    run("cuda_failures.py", processes, "silent_rank,bad_put", REPLAYED)


@each_layout
def test_replayed_programs_run_under_the_fabrics_successor(processes: int) -> None:
    run("cuda_failures.py", processes, "reopened,resized", REPLAYED)


@pytest.mark.parametrize("processes", [2, 0], ids=["two-processes", "process-per-gpu"])
def test_lost_peers_in_replayed_programs(processes: int) -> None:
    run("cuda_failures.py", processes, "lost_peer", REPLAYED)


@pytest.mark.parametrize("processes", [1, 2], ids=["one-process", "two-processes"])
def test_weights_travel_from_gpus_to_gpus(processes: int, tmp_path: Path) -> None:
    run("cuda_weights.py", processes, str(tmp_path))


def test_every_call_has_a_target_on_gpus() -> None:
    """But for those that wake an engine of the host."""
    of_the_host = {"jaxfabric_signal", "jaxfabric_send_layer"}
    assert set(_ffi.native().targets()) - of_the_host == set(_cuda.TARGETS)


def test_a_signal_on_gpus_is_refused() -> None:
    class Watcher:
        id = 1

    program = jax.jit(lambda token: jf.signal(Watcher(), token=token))
    export = jax.export.export(program, platforms=["cuda"])
    with pytest.raises(NotImplementedError, match=r"watcher\.bump\(\)"):
        export(jf.token())


def test_gpus_of_several_hosts_are_refused() -> None:
    _cuda.require_one_host(["a/1", "a/1"])
    with pytest.raises(jf.TransportUnavailableError, match="GPUs of 2 hosts"):
        _cuda.require_one_host(["a/1", "b/1"])
