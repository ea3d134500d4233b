"""KV caches over soft-RoCE: equal under load, with cancels and a kill -9."""

from __future__ import annotations

import kv_jobs
import pytest

REQUESTS = 64


# Before anything in this process starts threads of XLA's: the jobs are forked.
@pytest.mark.usefixtures("rails")
@pytest.mark.parametrize("tp", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_requests_at_once_equal_what_was_sent(tp: tuple[int, int]) -> None:
    kv_jobs.check(kv_jobs.run("verbs", tp, REQUESTS), tp, REQUESTS)
