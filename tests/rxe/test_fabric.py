"""Programs in `jit` over soft-RoCE have the bits of shared memory."""

from __future__ import annotations

import jax
import pytest
from fabric_cases import mesh_of_all
from primitive_cases import N, every_primitive

import jaxfabric as jf

# Each rank's memory is registered, and thereby taken from the guest's at once.
SMALL = {"window_bytes": 4 << 20, "mailbox_bytes": 1 << 20}


@pytest.mark.usefixtures("rails")
def test_the_primitives_give_the_bits_of_shm() -> None:
    mesh = mesh_of_all(jax.devices()[:N])
    with jf.config(**SMALL):
        joint, alone = (every_primitive(mesh, name) for name in ("verbs", "shm"))
    for ours, theirs in zip(joint, alone, strict=True):
        assert ours.tobytes() == theirs.tobytes()
