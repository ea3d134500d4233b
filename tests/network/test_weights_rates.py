"""A push of parameters over paced NICs is about as fast as the NICs are.

JAXFABRIC_WEIGHTS_MIB=1024 pytest -m slow tests/network/test_weights_rates.py -s
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from network.softefa import SoftEfa

MIB, ROUNDS = int(os.environ.get("JAXFABRIC_WEIGHTS_MIB", "128")), 3
GBPS = 0.5  # of each of six NICs: 128 MiB take half a second
TIMEOUT_S = 120 + 0.15 * MIB


@pytest.mark.slow
def test_the_transfer_takes_what_the_wire_takes(
    softefa_build: Path, libfabric: str, tmp_path: Path
) -> None:
    """From four processes to two, each with a NIC; beside the same bare writes."""
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, "-P", "-m", "jaxfabric._cli", "bench", "weights"]
    with SoftEfa(softefa_build, gbps=GBPS) as network:
        run = subprocess.run(
            [
                *(*command, f"--bytes={MIB}MiB", f"--rounds={ROUNDS}"),
                *("--transport=ofi/efa", "--subjects=push", f"--json={numbers}"),
            ],
            env=os.environ | network.environment() | {"JAXFABRIC_LIBFABRIC": libfabric},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
    print(run.stdout)
    assert run.returncode == 0, run.stdout
    measured = json.loads(numbers.read_text())
    (found,) = measured["results"]
    wire = [floors["wire_s"] for floors in found["floors"]]
    writes = [floors["wire_transfer_s"] for floors in found["floors"]]
    # The NICs are paced: no more comes through than they let.
    assert min(wire) > 0.9 * measured["nbytes"] * 8 / (4 * GBPS * 1e9)
    # Nor does a process need more memory than is said; 64 MiB are for all else.
    for peak in found["peaks"]:
        bound = peak["own"] + peak.get("taken", 0)
        assert peak["grew"] <= bound + (64 << 20), peak
    pushes = found["rounds"]["push"]
    for phase, floor in (("transfer_s", writes), ("span_s", wire), ("total_s", wire)):
        ratios = [w / push[phase] for w, push in zip(floor, pushes, strict=True)]
        print(f"{phase}: {statistics.median(ratios):.3f} of the wire's rate {ratios}")
        if phase != "total_s":
            assert statistics.median(ratios) >= 0.8, ratios
