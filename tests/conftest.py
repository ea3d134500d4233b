"""Eight virtual CPU devices for every test, and nothing left behind in /dev/shm."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

# Read when JAX starts its backend, so set before any test module imports it.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
# XLA's own collectives hang on jax 0.10 when its pool is narrower than this.
os.environ.setdefault("PJRT_NPROC", "64")

SHARED_MEMORY = Path("/dev/shm")
BEFORE = pytest.StashKey[frozenset[str]]()


def shared_memory_files() -> frozenset[str]:
    """The names in /dev/shm."""
    return frozenset(path.name for path in SHARED_MEMORY.glob("*"))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remembers what was there before the run."""
    session.stash[BEFORE] = shared_memory_files()


# Outermost, so that it looks after every fixture and worker pool has shut down.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """Fails the run if it left files in shared memory."""
    yield
    before = session.stash[BEFORE]
    leaked = shared_memory_files() - before
    if leaked:
        print(f"\nERROR: this run left files in {SHARED_MEMORY}: {sorted(leaked)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
