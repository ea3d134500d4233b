"""The example's losses are the same bits over every transport."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from test_example import train

from network.softefa import SoftEfa

STEPS = 5


def _losses(
    folder: Path, transport: str, environment: dict[str, str] | None = None
) -> np.ndarray:
    folder.mkdir()
    variables = (environment or {}) | {"JAXFABRIC_TRANSPORT": transport}
    steps = f"--steps={STEPS}"
    return train(folder, steps, processes=2, environment=variables)["loss"]


def test_losses_over_tcp_and_efa_are_those_over_shm(
    softefa_build: Path, libfabric: str, tmp_path: Path
) -> None:
    expected = _losses(tmp_path / "shm", "shm")
    assert len(expected) == STEPS
    over_tcp = _losses(tmp_path / "tcp", "ofi/tcp")
    np.testing.assert_array_equal(over_tcp, expected)
    with SoftEfa(softefa_build, nics=4, chaos=5) as network:
        over_efa = _losses(tmp_path / "efa", "ofi/efa", network.environment())
    np.testing.assert_array_equal(over_efa, expected)
