"""doctor on a machine with EFA devices: with RDMA writes, and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from network.softefa import SoftEfa


def examine(network: SoftEfa) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-P", "-m", "jaxfabric._cli", "doctor", "--json"]
    done = subprocess.run(
        command,
        env=os.environ | network.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {check["name"]: check for check in json.loads(done.stdout)}


def test_devices_with_rdma_writes(softefa_build: Path, libfabric: str) -> None:
    with SoftEfa(softefa_build, nics=2) as network:
        checks = examine(network)
    for name in ("transport ofi/efa", "transport ofi/efa-direct"):
        assert checks[name]["verdict"] == "PASS"
        assert "softefa0-rdm, softefa1-rdm" in checks[name]["found"]
        assert "writes at a time" in checks[name]["found"]


def test_emulated_writes_are_shown(softefa_build: Path, libfabric: str) -> None:
    with SoftEfa(softefa_build, nics=1, rdma=0) as network:
        checks = examine(network)
    check = checks["transport ofi/efa"]
    assert check["verdict"] == "WARN"
    assert "emulates" in check["found"]
    assert check["fix"]
    assert checks["transport ofi/efa-direct"]["verdict"] == "SKIP"


PROGRAM = """
import jaxfabric as jf
for nics in (None, 2, ["softefa1-rdm"]):
    with jf.TransferEngine("ofi/efa", nics=nics) as engine:
        print(len(engine.stats()["nics"]), *engine.nics)
"""


@pytest.mark.parametrize("chosen", [None, "softefa2-rdm,softefa0-rdm"])
def test_an_engine_takes_the_nics_near_it(
    softefa_build: Path, libfabric: str, chosen: str | None
) -> None:
    """Where nothing tells them apart, all of them; `nics=` and the setting rule."""
    with SoftEfa(softefa_build, nics=4) as network:
        names = network.nic_names
        setting = {} if chosen is None else {"JAXFABRIC_NICS": chosen}
        printed = subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM],
            env=os.environ | network.environment() | setting,
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    first = names if chosen is None else chosen.split(",")
    lines = [line.split() for line in printed.splitlines()]
    assert lines == [
        [str(len(first)), *first],
        ["2", *first],
        ["1", "softefa1-rdm"],
    ]
