"""What the tests of Fabrics on several processes share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfabric._rendezvous import Rendezvous

AXIS = "expert"
SPEC = P(AXIS)


def mesh_of_all(devices: Any = None) -> Mesh:
    """One axis over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def place(mesh: Mesh, array: np.ndarray, spec: P = SPEC) -> jax.Array:
    """A host array, equal on all processes, as a sharded one."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def local_rows(array: jax.Array) -> dict[int, np.ndarray]:
    """This process's shards by their first row."""
    return {
        shard.index[0].start or 0: np.asarray(shard.data)
        for shard in array.addressable_shards
    }


def mapped(
    mesh: Mesh, function: Callable[..., Any], spec: P = SPEC
) -> Callable[..., Any]:
    """Compiles a function of each rank's shards."""
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))


class Meeting:
    """All-gathers among all processes that need no Fabric, for test bodies."""

    _held = 0

    def __init__(self, timeout_s: float = 60) -> None:
        Meeting._held += 1  # every process runs the same tests in the same order
        self._rendezvous = Rendezvous(
            f"test-meeting/{Meeting._held}", range(jax.process_count()), timeout_s
        )

    def gather(self, value: Any) -> list[Any]:
        """One JSON value of each process."""
        payload = json.dumps(value).encode()
        return [json.loads(v) for v in self._rendezvous.all_gather(payload)]

    def moment(self, after_s: float) -> float:
        """A time.monotonic() that all processes (of one host) agree on."""
        return max(self.gather(time.monotonic())) + after_s


def sleep_until(moment: float) -> None:
    """Sleeps until time.monotonic() is `moment`."""
    time.sleep(max(0.0, moment - time.monotonic()))
