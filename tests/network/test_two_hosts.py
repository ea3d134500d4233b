"""The joint tests of tests/hosts, on two hosts that share nothing but a link."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from network.namespaces import HOSTS, two_hosts

JOINT_TESTS = Path(__file__).parents[1] / "hosts/test_joint.py"
COORDINATOR_PORT = 9911  # nobody else is in the namespace
TIMEOUT_S = 180.0


def _plugin() -> list[str]:
    """Loads the plugin where jaxfabric is not installed but on PYTHONPATH."""
    installed = importlib.metadata.entry_points(group="pytest11", name="jaxfabric")
    return [] if installed else ["-p", "jaxfabric.testing.plugin"]


@pytest.mark.usefixtures("build", "libfabric", "own_machines")
def test_hosts_without_common_memory_run_the_joint_tests_over_tcp() -> None:
    command = [*(sys.executable, "-P", "-m", "pytest", str(JOINT_TESTS)), *_plugin()]
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(two_hosts(["1gbit"]))
        processes = []
        for host in range(HOSTS):
            options = [
                f"--jaxfabric-coordinator={hosts.address(0, 0)}:{COORDINATOR_PORT}",
                f"--jaxfabric-num-processes={HOSTS}",
                f"--jaxfabric-process-id={host}",
            ]
            process = subprocess.Popen(
                hosts.command(host, [*command, *options], own_machine=True),
                env=os.environ | {"JAXFABRIC_TRANSPORT": "ofi/tcp"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            processes.append(process)
        for host, process in enumerate(processes):
            output, _ = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, f"host {host}:\n{output}"
            # Skipped is not passed.
            passed = re.search(r"\b(\d+) passed\b", output)
            assert passed is not None, output
            assert int(passed[1]) >= JOINT_TESTS.read_text().count("def test_"), output
            assert "skipped" not in output, output
