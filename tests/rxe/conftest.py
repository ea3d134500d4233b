"""What the tests of soft-RoCE need, each with the reason why it is not there.

Most run inside of a guest: `python -m tests.rxe -- pytest tests/rxe`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rxe import devices

BUILD_VARIABLE = "JAXFABRIC_TEST_BUILD"


@pytest.fixture(scope="session")
def rails() -> list[str]:
    """The devices of a guest that runs alone, each of which reaches itself."""
    if devices.hosts() != 1:
        pytest.skip(devices.NO_GUEST)
    return devices.rails()


@pytest.fixture(scope="session")
def two_hosts() -> list[str]:
    """The devices of a guest beside which another one runs."""
    if devices.hosts() != 2:
        pytest.skip("no second guest: python -m tests.rxe --hosts 2 -- pytest ...")
    return devices.rails()


@pytest.fixture
def cable(rails: list[str]) -> Iterator[devices.Cable]:
    """Two devices, joined."""
    with devices.cable() as made:
        yield made


@pytest.fixture(scope="session")
def build() -> Path:
    """The CMake build folder."""
    folder = os.environ.get(BUILD_VARIABLE)
    if not folder:
        pytest.skip(f"{BUILD_VARIABLE} names no build folder with the C++ tests")
    return Path(folder)
