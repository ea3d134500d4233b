"""What a Fabric takes from its mesh: key, ranks, and the transports that can serve."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import jax

from jaxfabric import _ffi
from jaxfabric._errors import TransportUnavailableError

OFI_TRANSPORTS = ("ofi/efa-direct", "ofi/efa", "ofi/tcp", "ofi/shm")
TRANSPORTS = ("shm", *OFI_TRANSPORTS, "fake")


def concrete_mesh(mesh: jax.sharding.Mesh | None) -> jax.sharding.Mesh:
    """The mesh, or the one in force; raises if there is none that can serve."""
    if mesh is None:
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(
                "jf.Fabric: no mesh; pass one (jax.make_mesh((jax.device_count(),), "
                "('expert',))) or set one with jax.set_mesh"
            )
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(
            f"jf.Fabric: mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}"
        )
    platforms = {device.platform for device in mesh.devices.flat}
    if platforms != {"cpu"}:
        raise TransportUnavailableError(
            f"jf.Fabric: the mesh has devices of {sorted(platforms)}, and only cpu is "
            "supported so far; use implementation='reference' there, or a CPU mesh"
        )
    return mesh


def stable_key(mesh: jax.sharding.Mesh, name: str) -> int:
    """Equal on all processes and in all runs; fits an int64 attribute."""
    ids = [device.id for device in mesh.devices.flat]
    text = repr((name, mesh.axis_names, mesh.devices.shape, ids))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def device_ordinal(device: jax.Device) -> int:
    """What XLA calls this device in the frame of a handler."""
    return device.id


def require_usable(transport: str) -> None:
    """Raises TransportUnavailableError, with reason and fix, if it cannot be used."""
    for name, state, reason, fix in _ffi.transport_states():
        if name == transport and state != "usable":
            raise TransportUnavailableError(
                f"jf.Fabric: transport={transport!r} ({state}): {reason}; {fix}"
            )


def choose_transport(asked: str | None, processes: Sequence[int]) -> str:
    """The transport asked for, or the best one; raises if it cannot serve."""
    if asked is None:
        return "shm"
    if asked not in TRANSPORTS:
        raise TransportUnavailableError(
            f"jf.Fabric: there is no transport={asked!r}; there are "
            f"{', '.join(TRANSPORTS)}"
        )
    if asked in OFI_TRANSPORTS:
        require_usable(asked)
    if asked == "fake" and len(processes) > 1:
        raise TransportUnavailableError(
            "jf.Fabric: transport='fake' joins ranks of one process, and this mesh "
            f"has {len(processes)} processes; use transport='shm'"
        )
    return asked
