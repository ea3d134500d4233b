"""KV caches between real jobs: equal under load, with cancels and a kill -9."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transfer_cases import skip_unless_usable

JOBS = Path(__file__).parent / "kv_jobs.py"
CASES = ("2-1", "1-2", "2-2")  # tensor-parallel degrees of prefill and decode
TIMEOUT_S = 120


@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_64_requests_at_once_equal_what_was_sent(transport: str) -> None:
    skip_unless_usable(transport)
    run = subprocess.run(
        [sys.executable, str(JOBS), transport, *CASES],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert run.returncode == 0, run.stdout
    assert run.stdout.endswith("3 passed\n"), run.stdout
