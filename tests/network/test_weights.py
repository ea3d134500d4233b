"""jf.weights over software EFA devices, which deliver in any order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import weights_pairs

from network.softefa import SoftEfa

TIMEOUT_S = 120


def test_any_sharding_becomes_any_other_over_efa(
    softefa_build: Path, libfabric: str
) -> None:
    with SoftEfa(softefa_build, nics=2) as network:
        run = subprocess.run(
            [sys.executable, weights_pairs.__file__, "ofi/efa"],
            env=os.environ | network.environment() | {"JAXFABRIC_LIBFABRIC": libfabric},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert run.returncode == 0, run.stdout
    assert run.stdout.endswith("all equal\n"), run.stdout
