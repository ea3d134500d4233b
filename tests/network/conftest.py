"""What the tests of networks need, each with the reason why it is not there.

They drive programs of a CMake build with -DJAXFABRIC_BUILD_TESTS=ON, which
JAXFABRIC_TEST_BUILD names; the `network` stage of CI runs them.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from network import link_pair, namespaces, softefa

BUILD_VARIABLE = "JAXFABRIC_TEST_BUILD"


@pytest.fixture(scope="session")
def build() -> Path:
    """The CMake build folder."""
    folder = os.environ.get(BUILD_VARIABLE)
    if not folder:
        pytest.skip(f"{BUILD_VARIABLE} names no build folder with the C++ tests")
    if not (Path(folder) / link_pair.PROGRAM).is_file():
        pytest.skip(f"{folder} has no {link_pair.PROGRAM.name}: build it with tests")
    return Path(folder)


@pytest.fixture(scope="session")
def libfabric() -> str:
    """A libfabric that knows EFA's RDMA writes; Debian 12's is too old."""
    try:
        files = importlib.metadata.files("mpich") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("no libfabric 2: pip install mpich")
    return next(str(f.locate()) for f in files if f.name == "libfabric.so.1")


@pytest.fixture(scope="session")
def softefa_build(build: Path) -> Path:
    """A build folder with the software EFA device in it."""
    if not (build / softefa.LIBRARY).is_file():
        pytest.skip("no software EFA device: it needs libibverbs-dev to be built")
    return build


@pytest.fixture(scope="session")
def network_namespaces() -> None:
    """Skips where there are none."""
    if why := namespaces.why_not():
        pytest.skip(why)


@pytest.fixture(scope="session")
def own_machines() -> None:
    """Skips where a network namespace cannot pass for a machine of its own."""
    if why := namespaces.why_not(own_machine=True):
        pytest.skip(why)
