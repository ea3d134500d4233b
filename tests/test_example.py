"""examples/train_moe.py: it learns, and its losses do not depend on the transport."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "train_moe.py"
TIMEOUT_S = 240
COMPARED_STEPS = 50
SHORT_STEPS = 20

pytestmark = pytest.mark.example
pytest.importorskip("flax", reason="the example needs jaxfabric[examples]")
pytest.importorskip("optax", reason="the example needs jaxfabric[examples]")


def train(
    folder: Path,
    *options: str,
    processes: int = 4,
    devices: int = 1,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Runs the example; returns its numbers, and its output as ``output``."""
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    launcher = ["-m", "jaxfabric._cli", "run", f"--processes={processes}"]
    launcher += [f"--devices-per-process={devices}", f"--timeout-s={TIMEOUT_S}"]
    numbers, picture = folder / "numbers.json", folder / "picture.png"
    result = subprocess.run(
        [
            *(sys.executable, "-P", *launcher, str(SCRIPT)),
            *(f"--json={numbers}", f"--picture={picture}", *options),
        ],
        env=inherited | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S + 30,
    )
    assert result.returncode == 0, result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    metrics = {k: np.array(v) for k, v in json.loads(numbers.read_text()).items()}
    return metrics | {"output": result.stdout}


def assert_close(loss: np.ndarray, expected: np.ndarray, bound: float) -> None:
    worst = float(np.max(np.abs(loss / expected - 1)))
    assert worst <= bound, f"losses differ by {worst:.2e} of themselves"


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run as in the README, as long as the losses are compared."""
    return train(tmp_path_factory.mktemp("fabric"), f"--steps={COMPARED_STEPS}")


def test_learns(fabric: dict[str, Any]) -> None:
    loss = fabric["loss"]
    assert loss[0] == pytest.approx(np.log(256), rel=0.1)  # knows nothing yet
    assert loss[-1] <= 0.7 * loss[0]


def test_reports(fabric: dict[str, Any]) -> None:
    """What it prints agrees with what it measured; nothing is lost on the way."""
    steps, layers, experts = fabric["loads"].shape
    assert (layers, experts) == (2, 8)
    # 16 sequences of 64 tokens, 2 experts each.
    np.testing.assert_array_equal(fabric["loads"].sum(-1), 16 * 64 * 2)
    assert fabric["dropped"].sum() == 0
    # Each message is rows of 64 floats; a token visits at most 2 ranks, 4 times a
    # layer: dispatch, combine, and their backward passes.
    most = steps * layers * 4 * 16 * 64 * 2 * (64 * 4 + 32)
    assert 0.2 * most < fabric["sent_mib"] * 2**20 < most
    output = fabric["output"]
    for text in (
        "training",
        f"{COMPARED_STEPS}/{COMPARED_STEPS}",
        "experts of layer 1",
        "dropped: 0 of",
    ):
        assert text in output
    assert f"{fabric['loss'][0]:.3f} -> {fabric['loss'][-1]:.3f}" in output


# One process takes half the time of four, and the losses must not depend on that.
@pytest.mark.parametrize(
    "processes", [1, pytest.param(4, marks=pytest.mark.slow)], ids="{}process".format
)
def test_reference_has_the_same_losses(
    fabric: dict[str, Any], tmp_path: Path, processes: int
) -> None:
    reference = train(
        tmp_path,
        "--implementation=reference",
        f"--steps={COMPARED_STEPS}",
        processes=processes,
        devices=4 // processes,
    )
    loss, expected = fabric["loss"], reference["loss"]
    assert_close(loss[:COMPARED_STEPS], expected[:COMPARED_STEPS], 1e-5)
    assert_close(loss[-1:], expected[-1:], 5e-3)
    assert reference["sent_mib"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(4, 1), (2, 2), (1, 4)])
def test_same_losses_on_all_topologies(
    fabric: dict[str, Any], tmp_path: Path, processes: int, devices: int
) -> None:
    """To the bit, with ranks in one process or in several; and when run again."""
    run = train(
        tmp_path, f"--steps={SHORT_STEPS}", processes=processes, devices=devices
    )
    np.testing.assert_array_equal(run["loss"], fabric["loss"][:SHORT_STEPS])


@pytest.mark.slow
def test_capacity_drops_and_counts(tmp_path: Path) -> None:
    """A rank keeps 100 rows of about 512 in each layer."""
    run = train(tmp_path, "--steps=2", "--capacity=100")
    assert run["dropped"].tolist() == [2 * 4 * (16 * 64 * 2 // 4 - 100)] * 2
