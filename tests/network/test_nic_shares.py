"""Processes of one host share its software EFA devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from network.softefa import SoftEfa

PROGRAM = """
import jax, jaxfabric as jf
mesh = jax.make_mesh((jax.device_count(),), ("x",))
with jf.Fabric(mesh, transport="ofi/efa") as fabric:
    print("nics", *fabric.nics)
"""


def test_each_process_has_its_own(
    softefa_build: Path, libfabric: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    launcher = [sys.executable, "-P", "-m", "jaxfabric._cli", "run", "-n2"]
    with SoftEfa(softefa_build, nics=4) as network:
        run = subprocess.run(
            [*launcher, "--timeout-s=60", str(script)],
            env=os.environ | network.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
        )
    assert run.returncode == 0, run.stdout
    shares = [
        line.split("nics ", 1)[1].split()
        for line in run.stdout.splitlines()
        if "nics " in line
    ]
    assert [len(share) for share in shares] == [2, 2], run.stdout
    assert sorted(shares[0] + shares[1]) == network.nic_names
