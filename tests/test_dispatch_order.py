"""No dead-lock, however XLA orders and queues calls: eight devices in one process.

Each case has a process of its own, so that a hang fails one test. Handlers that block
hang the first three; completing calls on the engine's worker hangs the fourth.
"""

from __future__ import annotations

import pathlib

import pytest
from ranks import run_child

CASES = pathlib.Path(__file__).with_name("dispatch_order_cases.py")


@pytest.mark.smoke
@pytest.mark.parametrize(
    "case",
    [
        "independent_exchanges",
        "independent_mix",
        "token_chain_beside_psums",
        "psum_of_each_result",
        "dependent_steps_ahead",
        "independent_steps_ahead",
        "two_threads",
        "two_threads_two_programs",
        "untaken_branches",
    ],
)
def test_case_ends(case: str) -> None:
    """It ends, its results are right, and its process comes to its end, too."""
    assert run_child(str(CASES), case, timeout_s=100).split()[0] == "right"
