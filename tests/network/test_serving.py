"""The example of disaggregated serving, with its pages over networks of software."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from serving_cases import EXAMPLE, sizes, weights

from network.namespaces import two_hosts
from network.softefa import SoftEfa

TIMEOUT_S = 280
ALL_RIGHT = "of 64 requests 56 answers equal to one-process decoding, 8 cancelled"

pytestmark = pytest.mark.slow


def serve(
    folder: Path,
    *options: str,
    model: str = "tiny",
    before: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> str:
    """Runs the example's one command, with a model that is not trained."""
    weights.save(folder / f"{model}.npz", weights.create(sizes.SIZES[model]))
    command = [sys.executable, str(EXAMPLE / "serve.py"), f"--output={folder}"]
    process = subprocess.Popen(
        [*before, *command, f"--sizes={model}", *options],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all can be ended that it has started
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    logs = [f"{log.name}:\n{log.read_text()[-2000:]}" for log in folder.glob("*.log")]
    assert process.returncode == 0, "\n".join([output, *logs])
    print(output)
    return output


def test_answers_over_efa(softefa_build: Path, libfabric: str, tmp_path: Path) -> None:
    with SoftEfa(softefa_build, nics=2) as network:
        output = serve(
            tmp_path,
            *("--transport=ofi/efa", "--ranks=2-1,2-2,1-2", "--runs=0"),
            environment=network.environment(),
        )
    assert output.count(ALL_RIGHT) == 3, output


@pytest.mark.usefixtures("libfabric", "network_namespaces")
def test_between_hosts_streaming_hides_a_slow_link(tmp_path: Path) -> None:
    """4 MiB of pages take 170 ms on this link, about as long as their prompt."""
    with two_hosts(["200mbit"]) as hosts:
        there = hosts.command(0, [])
        output = serve(
            tmp_path,
            *("--transport=ofi/tcp", "--ranks=1-1", "--lengths=1024", "--runs=30"),
            f"--host={hosts.address(1, 0)}",
            f"--nics={hosts.address(1, 0)}",
            f"--prefill-nics={hosts.address(0, 0)}",
            f"--prefill-command={shlex.join(there)}",
            model="small",
            before=hosts.command(1, []),
        )
    assert ALL_RIGHT in output
    (measured,) = json.loads((tmp_path / "ttft.json").read_text())
    times = {k: statistics.median(v) for k, v in measured["seconds"].items()}
    assert times["off"] < times["stream"] < times["end"] - 0.05, times
