"""jf.kv over software EFA devices, and between two hosts that share only a link."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import kv_jobs
import pytest

from network.namespaces import two_hosts
from network.softefa import SoftEfa

TIMEOUT_S = 120
SCRIPT = Path(kv_jobs.__file__)
COMMAND = [sys.executable, str(SCRIPT)]
HOST = {"decode": 1, "prefill": 0, "doomed": 0}


def test_64_requests_at_once_over_efa(softefa_build: Path, libfabric: str) -> None:
    with SoftEfa(softefa_build, nics=2) as network:
        run = subprocess.run(
            [*COMMAND, "ofi/efa", "2-1", "1-2", "2-2"],
            env=os.environ | network.environment() | {"JAXFABRIC_LIBFABRIC": libfabric},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert run.returncode == 0, run.stdout
    assert run.stdout.endswith("3 passed\n"), run.stdout


@pytest.mark.usefixtures("build", "own_machines")
def test_64_requests_at_once_between_two_hosts(libfabric: str) -> None:
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(two_hosts(["1gbit"]))
        processes, links = {}, {}
        for job, host in HOST.items():
            process = subprocess.Popen(
                hosts.command(
                    host, [*COMMAND, "ofi/tcp", "2-1", job], own_machine=True
                ),
                env=os.environ
                | {
                    "JAXFABRIC_LIBFABRIC": libfabric,
                    "JAXFABRIC_NICS": hosts.device(host, 0),
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            assert process.stdin is not None
            assert process.stdout is not None
            processes[job] = process
            links[job] = kv_jobs.Channel(process.stdout, process.stdin)
        report = kv_jobs.meet(links, processes["doomed"].kill)
        kv_jobs.check(report, (2, 1))
