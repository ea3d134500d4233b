"""Which network interfaces the ranks of a Fabric use."""

from __future__ import annotations

import ctypes
import os
import pathlib
import socket
from collections.abc import Sequence
from typing import TypedDict

import jax

from jaxfabric import _ffi
from jaxfabric._config import config
from jaxfabric._libfabric import libfabric_path
from jaxfabric._rendezvous import coordinator_address

_LOOPBACK = "lo"
# Transports whose NICs are shared out. TCP has one interface that leads anywhere.
_SHARED = ("ofi/efa", "verbs")
# Reserved for documentation, hence reached by the default route. Nothing is sent.
_ELSEWHERE = ("192.0.2.1", 9)


class Place(TypedDict):
    """Where a process runs; processes tell each other as JSON."""

    core: int  # the first one that it may run on
    gpus: list[str]  # PCI addresses, as "0000:3b:00.0"


def network_host() -> str:
    """Equal for processes that reach each other over loopback."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = socket.gethostname()
    try:
        namespace = os.stat("/proc/self/ns/net").st_ino
    except OSError:
        namespace = 0
    return f"{boot}/{namespace}"


def choose_interfaces(transport: str, hosts: Sequence[str]) -> list[str]:
    """Names or addresses of the interfaces to use; none: what the transport takes.

    Args:
      transport: as given to `jf.Fabric`.
      hosts: `network_host` of each process.
    """
    if config.settings.nics:
        return [name.strip() for name in config.settings.nics.split(",")]
    if transport != "ofi/tcp":
        return []
    return [_LOOPBACK] if len(set(hosts)) <= 1 else [_outward_address()]


def share_interfaces(
    transport: str, hosts: Sequence[str], places: Sequence[Place], process: int
) -> list[str]:
    """A process's share of its host's NICs, the closest ones; none: all there are.

    Closest to its GPUs, then to its core.

    Args:
      transport: as given to `jf.Fabric`.
      hosts: `network_host` of each process.
      places: of each process; see `place`.
      process: whose share, an index into both.
    """
    if not transport.startswith(_SHARED):
        return []
    here = [i for i, host in enumerate(hosts) if host == hosts[process]]
    shares = _ffi.native().share_nics(
        *(transport, libfabric_path()),
        [places[i]["core"] for i in here],
        [places[i]["gpus"] for i in here],
    )
    return list(shares[here.index(process)]) if shares else []


def nearest_interfaces(transport: str) -> list[str]:
    """This process's closest NICs, none if there are none to choose from.

    Closest to its GPUs, or if it has none, of its NUMA node; a process that may run
    on several nodes gets those of all.
    """
    if not transport.startswith(_SHARED):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return list(
        _ffi.native().nearest_nics(transport, libfabric_path(), cores, local_gpus())
    )


def place() -> Place:
    """Where this process runs."""
    return {"core": min(os.sched_getaffinity(0)), "gpus": local_gpus()}


def local_gpus() -> list[str]:
    """PCI addresses of the NVIDIA GPUs that JAX has opened in this process.

    None before JAX has started, which this does not do.
    """
    if not _jax_has_started():
        return []
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # has no such backend
        return []
    found = [_pci_address(device.local_hardware_id) for device in devices]
    return [address for address in found if address]


def _pci_address(ordinal: int) -> str:
    """Of a GPU that JAX has opened, as "0000:3b:00.0"; "" where CUDA does not tell."""
    text = ctypes.create_string_buffer(32)
    device = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    if driver.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
        return ""
    if driver.cuDeviceGetPCIBusId(text, len(text), device) != 0:
        return ""
    return text.value.decode().lower()  # CUDA says it in capitals, the kernel does not


def _jax_has_started() -> bool:
    """Private to JAX, whose public functions would all start it."""
    try:
        from jax._src import xla_bridge

        return bool(xla_bridge.backends_are_initialized())
    except (ImportError, AttributeError):
        return False


def _outward_address() -> str:
    """The address from which this host reaches the others."""
    target: tuple[str, int] = _ELSEWHERE
    coordinator = coordinator_address()
    if coordinator is not None:
        name, _, port = coordinator.rpartition(":")
        target = (name.strip("[]"), int(port))
    found = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # chooses a route, and sends nothing
        return str(probe.getsockname()[0])
