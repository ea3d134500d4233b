"""What tests of the example's router and jobs share."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="serving needs jaxfabric[serve]")
pytest.importorskip("optax", reason="the example needs jaxfabric[examples]")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "disaggregated"
sys.path.append(str(EXAMPLE))  # its scripts find each other there, too

import fleet  # noqa: E402
import load  # noqa: E402
import sizes  # noqa: E402
import weights  # noqa: E402


def questions(folder: Path) -> tuple[Path, load.Questions]:
    """A model that is not trained (that takes too long here), and its answers."""
    file = folder / "weights.npz"
    weights.save(file, weights.create(sizes.SIZES["tiny"]))
    asked = load.Questions.make("tiny", file, count=8, made=16)
    assert len({tuple(answer) for answer in asked.answers}) == 8  # they tell a mistake
    return file, asked


def all_pages_free(running: fleet.Fleet, timeout_s: float = 15) -> None:
    """Waits until no decode job has a page in use, under way or lost."""
    until = time.monotonic() + timeout_s
    while True:
        decode = [job for job in running.health()["jobs"] if job["role"] == "decode"]
        numbers = [job["numbers"] for job in decode]
        if numbers and all(n.get("kv_free") == n.get("pages", -1) for n in numbers):
            return
        assert time.monotonic() < until, f"pages in use: {numbers}"
        time.sleep(0.1)
