"""Our writes beside those of perftest's `ib_write_bw`, on the same device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SIZES = "64KiB,1MiB"
SHARE_MIN = 0.9  # of ib_write_bw's rate
TIMEOUT_S = 120


@pytest.mark.slow
def test_writes_are_nearly_as_fast_as_perftests(
    rails: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "put.json"
    command = [sys.executable, "-P", "-m", "jaxfabric._cli", "bench", "put"]
    command += ["--transport", "verbs", "--subjects", "jaxfabric,ib_write_bw"]
    command += ["--kinds", "single", "--sizes", SIZES]
    command += ["--rounds", "1", "--seconds", "0.3", "--json", str(file)]
    run = subprocess.run(
        command,
        env=os.environ | {"JAXFABRIC_NICS": rails[0]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert run.returncode == 0, run.stdout
    duels = json.loads(file.read_text())["against_best_peer"]
    rates = {duel["size"]: duel for duel in duels if duel["what"] == "rate"}
    assert len(rates) == len(SIZES.split(",")), run.stdout
    for size, duel in rates.items():
        share = duel["ours"] / duel["peer"]
        print(f"{size} bytes: {share:.2f} of ib_write_bw")
        assert share >= SHARE_MIN, run.stdout
