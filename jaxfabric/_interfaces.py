"""Which network interfaces the ranks of a Fabric use."""

from __future__ import annotations

import os
import pathlib
import socket
from collections.abc import Sequence

from jaxfabric import _ffi
from jaxfabric._config import config
from jaxfabric._libfabric import libfabric_path
from jaxfabric._rendezvous import coordinator_address

_LOOPBACK = "lo"
# Transports whose NICs are shared out. TCP has one interface that leads anywhere.
_SHARED = ("ofi/efa", "verbs")
# Reserved for documentation, hence reached by the default route. Nothing is sent.
_ELSEWHERE = ("192.0.2.1", 9)


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
    transport: str, hosts: Sequence[str], cores: Sequence[int], process: int
) -> list[str]:
    """A process's share of its host's NICs, the closest ones; none: all there are.

    Args:
      transport: as given to `jf.Fabric`.
      hosts: `network_host` of each process.
      cores: the core that each process runs on; see `first_core`.
      process: whose share, an index into both.
    """
    if not transport.startswith(_SHARED):
        return []
    here = [i for i, host in enumerate(hosts) if host == hosts[process]]
    shares = _ffi.native().share_nics(
        transport, libfabric_path(), [cores[i] for i in here]
    )
    return list(shares[here.index(process)]) if shares else []


def nearest_interfaces(transport: str) -> list[str]:
    """The NICs on this process's NUMA node, none if there are none to choose from.

    A process that may run on several nodes gets those of all.
    """
    if not transport.startswith(_SHARED):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return list(_ffi.native().nearest_nics(transport, libfabric_path(), cores))


def first_core() -> int:
    """The first core that this process may run on."""
    return min(os.sched_getaffinity(0))


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
