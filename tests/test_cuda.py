"""The same programs on two GPUs as on CPU: against NumPy and pure JAX.

Everything runs in processes of its own, because JAX takes a device for good.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxfabric import _cuda

CASES = Path(__file__).parent / "cuda_cases.py"
DEADLINE_S = 240


def why_not() -> str:
    """Why the tests cannot run here, or an empty string."""
    if _cuda.library_path() is None:
        return "no libjaxfabric_cuda.so: built without nvcc"
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return "" if gpus >= 2 else f"needs 2 GPUs, this machine has {gpus}"


def run(processes: int, cases: str, xla_flags: str = "") -> None:
    """Runs cases of cuda_cases.py in one or two processes."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    environment = dict(os.environ)
    if xla_flags:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {xla_flags}"
    started = [
        subprocess.Popen(
            [sys.executable, str(CASES), cases, str(processes), str(rank)],
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
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "cases",
    ["moe", "primitives", "gradients", "halves", "wire", "bad_expert,untold"],
)
def test_on_two_gpus(processes: int, cases: str) -> None:
    run(processes, cases)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "flags",
    [
        "--xla_gpu_graph_min_graph_size=1",
        "--xla_gpu_enable_command_buffer=",
    ],
    ids=["command-buffers", "no-command-buffers"],
)
def test_a_thousand_steps(processes: int, flags: str) -> None:
    run(processes, "chain", flags)


@pytest.mark.parametrize(
    ("processes", "case"), [(1, "replayed"), (2, "replayed"), (2, "lost_peer")]
)
def test_a_failure_in_a_replayed_program(processes: int, case: str) -> None:
    run(processes, case, "--xla_gpu_graph_min_graph_size=1")
