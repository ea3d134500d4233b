"""The same programs on two GPUs: dispatch, combine and barrier against pure JAX.

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


def run(processes: int, case: str) -> None:
    """Runs a case of cuda_cases.py in one or two processes."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, str(CASES), case, str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(os.environ),
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
@pytest.mark.parametrize("case", ["moe", "chain", "bad_expert"])
def test_on_two_gpus(processes: int, case: str) -> None:
    run(processes, case)
