"""examples/rl/: two jobs, weights that travel at every step, and rewards that rise."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "rl" / "main.py"
STEPS = 30
KILLED_AT = 12  # so that step 5 is saved for certain
EVERY = 5  # steps between two checkpoints
TIMEOUT_S = 200

pytestmark = pytest.mark.example
pytest.importorskip("flax", reason="the example needs jaxfabric[examples]")
pytest.importorskip("optax", reason="the example needs jaxfabric[examples]")
pytest.importorskip("orbax", reason="the example needs jaxfabric[examples]")


def run(folder: Path, *more: str) -> dict[str, Any]:
    """A run that is shorter than the default one; it fails unless the reward rises."""
    numbers, picture = folder / "numbers.json", folder / "picture.png"
    options = [f"--steps={STEPS}", f"--json={numbers}", f"--picture={picture}", *more]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), f"--timeout-s={TIMEOUT_S}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S + 30,
    )
    assert result.returncode == 0, result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    print(result.stdout)
    assert "reward: " in result.stdout
    return json.loads(numbers.read_text()) | {"output": result.stdout}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run whose trainer is killed once."""
    return run(tmp_path_factory.mktemp("rl"), f"--kill-trainer-at={KILLED_AT}")


def test_a_trainer_that_is_killed_goes_on(report: dict[str, Any]) -> None:
    assert "the trainer was killed" in report["output"]
    for trainer in (report["trainer0"], report["trainer1"]):
        resumed = trainer["resumed"]
        versions = [push["version"] for push in trainer["pushes"]]
        assert resumed in range(EVERY, STEPS, EVERY)
        assert len(trainer["steps"]) == STEPS - resumed
        # Above all that were pushed before, and no lower than the step.
        assert versions[0] == 1 + resumed + 2 * EVERY
        assert versions == list(range(versions[0], versions[0] + STEPS - resumed + 1))


def test_every_step_is_pushed_and_taken(report: dict[str, Any]) -> None:
    trainers = [report["trainer0"], report["trainer1"]]
    for trainer in trainers:
        for push in trainer["pushes"][1:]:
            (receipt,) = push["receipts"].values()
            assert receipt["verify_s"] >= 0
            assert 0 < push["transfer_s"] <= push["total_s"]
    # Both ranks write: neither has gathered what the other one has.
    sent = [trainer["pushes"][-1]["nbytes"] for trainer in trainers]
    assert min(sent) > 0.3 * sum(sent)
    assert trainers[0]["pushes"][-1]["writes"] < 10


def test_the_sampler_serves_while_weights_change(report: dict[str, Any]) -> None:
    batches = report["sampler"]["batches"]
    versions = [batch["version"] for batch in batches]
    assert versions == sorted(versions)
    assert versions[0] == 1
    assert versions[-1] == report["trainer0"]["pushes"][-1]["version"]
    assert len(set(versions)) > STEPS // 3
    assert report["sampler"]["compiled"] == 1
    lags = [step["lag"] for step in report["trainer0"]["steps"]]
    assert min(lags) >= 0
    assert max(lags[4:]) <= 4  # the first answers are to the trainer of before


def test_both_ranks_learn_the_same(report: dict[str, Any]) -> None:
    ours, theirs = (report[f"trainer{rank}"]["steps"] for rank in (0, 1))
    assert [step["loss"] for step in ours] == [step["loss"] for step in theirs]
    assert np.isfinite([step["loss"] for step in ours]).all()


def of_the_run(mark: str) -> list[int]:
    """Processes that have inherited a variable with this value."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"RL_EXAMPLE={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # it is gone, or not ours
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_whoever_ends_it_ends_its_jobs(number: signal.Signals) -> None:
    mark = secrets.token_hex(8)
    run = subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "RL_EXAMPLE": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while len(of_the_run(mark)) < 5:  # main.py, the sampler, the launcher and 2 ranks
        assert time.monotonic() < until
        time.sleep(0.1)
    run.send_signal(number)
    run.wait(30)
    until = time.monotonic() + 12  # by themselves they would go on for longer
    while left := of_the_run(mark):
        assert time.monotonic() < until, left
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--seed=5",),
        ("--seed=1", "--sampler-processes=2", "--kill-trainer-at=12"),
        ("--seed=2", "--transport=ofi/tcp"),
        ("--seed=3", "--transport=ofi/tcp", "--sampler-processes=2"),
    ],
)
def test_the_reward_rises_elsewhere_too(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    assert run(tmp_path, *options)["sampler"]["compiled"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_sampler_that_is_killed_comes_back(processes: int, tmp_path: Path) -> None:
    found = run(tmp_path, "--kill-sampler-at=10", f"--sampler-processes={processes}")
    assert "the sampler was killed" in found["output"]
    versions = [batch["version"] for batch in found["sampler"]["batches"]]
    assert versions == sorted(versions)
    assert versions[-1] == STEPS + 1
    for trainer in (found["trainer0"], found["trainer1"]):
        failures = {push["failure"] for push in trainer["pushes"]}
        assert failures <= {None, "PeerLostError", "OutcomeUnknownError"}


@pytest.mark.slow
def test_a_run_that_is_started_again_goes_on(tmp_path: Path) -> None:
    saved = f"--checkpoints={tmp_path / 'saved'}"
    first = run(tmp_path, saved)
    more = run(tmp_path, saved, f"--steps={STEPS + 5}")
    assert first["trainer0"]["resumed"] == 0
    assert more["trainer0"]["resumed"] == STEPS
    last = first["trainer0"]["pushes"][-1]["version"]
    assert more["trainer0"]["pushes"][0]["version"] > last
