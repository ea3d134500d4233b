"""jf.weights over soft-RoCE."""

from __future__ import annotations

import pytest
import weights_pairs


@pytest.mark.usefixtures("rails")
def test_any_sharding_becomes_any_other() -> None:
    assert weights_pairs.check_pairs("verbs", most=1) == 1
