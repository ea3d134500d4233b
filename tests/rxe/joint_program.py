"""One of two processes, on a host each, that run a program of all primitives.

    python -P joint_program.py TRANSPORT COORDINATOR PROCESS

Each has N local devices: N ranks over both processes use half of them. What comes
out must be what N ranks of this process alone get over shared memory.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PROCESSES = 2
# Each rank's memory is registered, and thereby taken from the guest's at once.
SMALL = {"window_bytes": 4 << 20, "mailbox_bytes": 1 << 20}
sys.path.append(str(Path(__file__).resolve().parents[1]))


def main(transport: str, coordinator: str, process: int) -> None:
    """Raises AssertionError if a bit is different."""
    import jax

    jax.distributed.initialize(coordinator, PROCESSES, process)
    from fabric_cases import mesh_of_all
    from primitive_cases import N, every_primitive

    import jaxfabric as jf

    half = N // PROCESSES
    both = [
        device
        for index in range(PROCESSES)
        for device in jax.devices()
        if device.process_index == index and device.id % N < half
    ]
    # By result, then by rank; of the joint ones, this process has its half.
    with jf.config(**SMALL):
        joint = every_primitive(mesh_of_all(both), transport)
        alone = every_primitive(mesh_of_all(jax.local_devices()), "shm")
    assert len(alone) == PROCESSES * len(joint)
    for number, ours in enumerate(joint):
        result, rank = divmod(number, half)
        theirs = alone[result * N + process * half + rank]
        assert ours.tobytes() == theirs.tobytes(), (result, rank)
    print(f"{len(joint)} equal")


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
