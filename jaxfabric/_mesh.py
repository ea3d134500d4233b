"""What a Fabric takes from its mesh: key, ranks, and the transports that can serve."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence

import jax

from jaxfabric import _ffi
from jaxfabric._config import config, pool_is_narrow
from jaxfabric._errors import TransportUnavailableError

TRANSPORTS = (
    *("shm", "verbs", "ofi/efa-direct", "ofi/efa", "ofi/tcp", "ofi/shm"),
    "fake",
)


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
    if platforms not in ({"cpu"}, {"gpu"}):
        raise TransportUnavailableError(
            f"jf.Fabric: the mesh has devices of {sorted(platforms)}, but a Fabric is "
            "over CPUs or over NVIDIA GPUs; use implementation='reference' there"
        )
    return mesh


def is_on_gpus(mesh: jax.sharding.Mesh) -> bool:
    """Whether ranks are GPUs, and so speak over NVLink."""
    return bool(mesh.devices.flat[0].platform == "gpu")


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


def transport_options(
    transport: str, chaos: Mapping[str, float] | None
) -> dict[str, float]:
    """The numbers that a transport takes: verbs its settings, ``"fake"`` its chaos.

    Raises:
      ValueError: JAXFABRIC_VERBS is not of the form ``name=number,name=number``.
    """
    if transport != "verbs":
        return dict(chaos or {})
    text = config.settings.verbs or ""
    options = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        try:
            options[name.strip()] = float(number)
        except ValueError:
            raise ValueError(
                f"JAXFABRIC_VERBS={text!r}: {part!r} is not name=number, as in "
                "gid_index=3,traffic_class=106"
            ) from None
    return options


def choose_transport(asked: str | None, processes: Sequence[int]) -> str:
    """The transport asked for, or the best one; raises if it cannot serve."""
    if asked is None:
        return "shm"
    if asked not in TRANSPORTS:
        raise TransportUnavailableError(
            f"jf.Fabric: there is no transport={asked!r}; there are "
            f"{', '.join(TRANSPORTS)}"
        )
    if asked not in ("shm", "fake"):
        require_usable(asked)
    if asked == "fake" and len(processes) > 1:
        raise TransportUnavailableError(
            "jf.Fabric: transport='fake' joins ranks of one process, and this mesh "
            f"has {len(processes)} processes; use transport='shm'"
        )
    return asked


def warn_if_pool_is_narrow(devices: Sequence[jax.Device]) -> None:
    """Tells of a pool that is too narrow for this process's devices; see _config."""
    me = jax.process_index()
    local = sum(device.process_index == me for device in devices)
    if pool_is_narrow(local):
        warnings.warn(
            f"jf.Fabric: XLA may have too few threads for {local} devices in one "
            f"process, and then calls hang; set PJRT_NPROC={4 * local} or more before "
            "JAX starts, or import jaxfabric first",
            RuntimeWarning,
            stacklevel=3,
        )
