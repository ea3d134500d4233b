"""What works on this machine, what does not, and the line that repairs it."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import os
import pathlib
import platform
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from jaxfabric import _config, _ffi, _mesh
from jaxfabric._config import (
    POOL_THREADS_MIN,
    THREADS_PER_DEVICE,
    config,
    pool_threads,
)
from jaxfabric._errors import FabricError

_MEBIBYTE = 1 << 20
# Less shared memory than this does not hold what one prefill step writes.
_SHARED_MEMORY_MIN = 1 << 30
_WITHOUT_NICS = ("shm", "ofi/shm")
# NICs pin what they write; less than this ends in registration errors.
_LOCKED_MEMORY_MIN = 1 << 30


class Verdict(enum.StrEnum):
    """How a check ended; only FAIL means that jaxfabric cannot work here."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
      name: what was looked at.
      verdict: how it ended.
      found: what was found, in one line.
      fix: the command or setting that repairs it; empty for PASS.
    """

    name: str
    verdict: Verdict
    found: str
    fix: str = ""


def examine(root: pathlib.Path = pathlib.Path("/")) -> list[Check]:
    """All checks, in the order in which a new user would meet the problems.

    Args:
      root: where ``proc`` and ``sys`` lie.

    Example::

      [c.fix for c in examine() if c.verdict is Verdict.FAIL]   # [] if it can work
    """
    needed = [_native_module(), _settings()]
    checks = [_python(), _jax(), *needed]
    if all(check.verdict is not Verdict.FAIL for check in needed):
        checks += _transports()
    checks += [_xla_pool(), _shared_memory(), _locked_memory(), _ptrace(root)]
    checks += [*_nics(root), _numa(root)]
    return checks


def _python() -> Check:
    return Check("python", Verdict.PASS, f"{platform.python_version()}")


def _jax() -> Check:
    try:
        versions = [f"{p} {importlib.metadata.version(p)}" for p in ("jax", "jaxlib")]
    except importlib.metadata.PackageNotFoundError as missing:
        return Check(
            *("jax", Verdict.FAIL, f"{missing.name} is not installed"),
            fix="pip install 'jax>=0.9.1'",
        )
    return Check("jax", Verdict.PASS, ", ".join(versions))


def _native_module() -> Check:
    try:
        built = _ffi.native().ffi_api_version()
    except ImportError as error:
        return Check("native module", Verdict.FAIL, str(error), fix="pip install .")
    running = _ffi.runtime_ffi_api()
    now = "unknown" if running is None else f"{running[0]}.{running[1]}"
    found = f"built for XLA FFI {built[0]}.{built[1]}, jaxlib has {now}"
    return Check("native module", Verdict.PASS, found)


def _transports() -> Iterator[Check]:
    for name, state, reason, fix in _ffi.transport_states():
        if state != "usable":
            yield Check(f"transport {name}", Verdict.SKIP, f"{state}: {reason}", fix)
        elif name in _WITHOUT_NICS:
            yield Check(f"transport {name}", Verdict.PASS, f"{state}: {reason}")
        else:
            yield _open_transport(name, f"{state}: {reason}")


def _open_transport(name: str, found: str) -> Check:
    """A device that is found may refuse to be opened, or do less than one expects."""
    try:
        caps = _ffi.open_for_caps(name)
    except FabricError as error:
        return Check(
            *(f"transport {name}", Verdict.WARN, f"{found}, but not opened: {error}"),
            fix="see locked memory below, and the permissions of /dev/infiniband",
        )
    found += f"; {caps['queue_depth']} writes at a time"
    if caps["emulated_writes"]:
        return Check(
            f"transport {name}",
            Verdict.WARN,
            f"{found}; the device has no RDMA writes, so libfabric emulates them by "
            "messages and copies: slow",
            fix="use an instance type with RDMA write (fi_info -p efa -c FI_RMA), and "
            "leave FI_EFA_USE_DEVICE_RDMA unset",
        )
    if not caps["removal_fences"]:
        return Check(
            f"transport {name}",
            Verdict.WARN,
            f"{found}; cannot cut off a peer: a write to a process that is frozen ends "
            "only when that goes on or dies, and a NIC that fails leaves the outcome "
            "unknown",
            fix="use libfabric 2: pip install 'jaxfabric[ofi]', and leave "
            "JAXFABRIC_LIBFABRIC unset",
        )
    return Check(f"transport {name}", Verdict.PASS, found)


def _xla_pool() -> Check:
    threads = pool_threads()
    found = f"{threads or 'as many as cores'}; {os.cpu_count()} cores"
    if threads is not None and threads < POOL_THREADS_MIN:
        return Check(
            *("XLA's threads", Verdict.WARN, found),
            fix=f"export PJRT_NPROC={POOL_THREADS_MIN} "
            f"(at least {THREADS_PER_DEVICE} for each device of a process)",
        )
    return Check("XLA's threads", Verdict.PASS, found)


def _shared_memory() -> Check:
    name = "/dev/shm"
    try:
        usage = shutil.disk_usage(name)
    except OSError as error:
        return Check(
            *(name, Verdict.WARN, f"cannot be read: {error.strerror}"),
            fix="mount -t tmpfs tmpfs /dev/shm",
        )
    found = f"{usage.free // _MEBIBYTE} MiB free of {usage.total // _MEBIBYTE} MiB"
    if usage.free >= _SHARED_MEMORY_MIN:
        return Check(name, Verdict.PASS, found)
    # jaxfabric's own memory is memfds; it is XLA, gloo and others that use it.
    return Check(
        *(name, Verdict.WARN, found),
        fix="docker run --shm-size=8g, or in Kubernetes an emptyDir with medium: "
        "Memory mounted at /dev/shm",
    )


def _locked_memory() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("locked memory", Verdict.PASS, "unlimited")
    limit = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard >> 10} KiB"
    found = f"{soft >> 10} KiB, may be raised to {limit}"
    if soft >= _LOCKED_MEMORY_MIN:
        return Check("locked memory", Verdict.PASS, found)
    return Check(
        *("locked memory", Verdict.WARN, f"{found}; only NICs need it"),
        fix="ulimit -l unlimited (docker run --ulimit memlock=-1)",
    )


def _ptrace(root: pathlib.Path) -> Check:
    scope = _read(root / "proc/sys/kernel/yama/ptrace_scope")
    if scope in ("", "0"):
        return Check("ptrace", Verdict.PASS, f"ptrace_scope {scope or '(no yama)'}")
    return Check(
        *("ptrace", Verdict.WARN, f"ptrace_scope {scope}: libfabric's shm copies"),
        fix="sysctl kernel.yama.ptrace_scope=0 (only for transport='ofi/shm')",
    )


def _settings() -> Check:
    try:
        values = dataclasses.asdict(config.settings)
        _mesh.transport_options("verbs", None)
    except ValueError as error:
        name = re.split("[=:]", str(error))[0]
        return Check("settings", Verdict.FAIL, str(error), fix=f"unset {name}")
    transport = values["transport"]
    if transport is not None and transport not in _mesh.TRANSPORTS:
        return Check(
            *("settings", Verdict.FAIL, f"there is no transport={transport}"),
            fix=f"JAXFABRIC_TRANSPORT is one of {', '.join(_mesh.TRANSPORTS)}",
        )
    if misspelt := _config.misspelt_variables():
        return Check(
            *("settings", Verdict.WARN, f"nobody reads {', '.join(misspelt)}"),
            fix=", ".join(f"did you mean {name}?" for name in misspelt.values()),
        )
    shown = [f"{key}={value}" for key, value in values.items() if value is not None]
    return Check("settings", Verdict.PASS, ", ".join(shown))


def _nics(root: pathlib.Path) -> Iterator[Check]:
    found = [
        *_devices(root / "sys/class/net", _net_device),
        *_devices(root / "sys/class/infiniband", _rdma_device),
    ]
    if not found:
        yield Check("NICs", Verdict.SKIP, "none", "one host needs none: transport shm")
    yield from found


def _devices(
    folder: pathlib.Path, describe: Callable[[pathlib.Path], Check]
) -> list[Check]:
    try:
        return [describe(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    except OSError:
        return []


def _net_device(path: pathlib.Path) -> Check:
    state = _read(path / "operstate") or "unknown"
    speed = _read(path / "speed")
    parts = [state, f"MTU {_read(path / 'mtu')}"]
    if speed.isdigit():
        parts.append(f"{speed} Mbit/s")
    parts.append(_numa_node(path))
    usable = state in ("up", "unknown")  # loopback and tunnels say unknown
    return Check(
        f"NIC {path.name}",
        Verdict.PASS if usable else Verdict.WARN,
        ", ".join(part for part in parts if part),
        "" if usable else f"ip link set {path.name} up",
    )


def _rdma_device(path: pathlib.Path) -> Check:
    ports = sorted((path / "ports").glob("*"))
    states = [f"port {port.name} {_read(port / 'state')}" for port in ports]
    down = any("ACTIVE" not in state for state in states)
    return Check(
        f"RDMA device {path.name}",
        Verdict.WARN if down else Verdict.PASS,
        ", ".join([*states, _numa_node(path)]).strip(", "),
        f"rdma link show; ibv_devinfo -d {path.name}" if down else "",
    )


def _numa_node(path: pathlib.Path) -> str:
    node = _read(path / "device/numa_node")
    return "" if node in ("", "-1") else f"NUMA node {node}"


def _numa(root: pathlib.Path) -> Check:
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"))
    cores = [f"{n.name[4:]}: cores {_read(n / 'cpulist')}" for n in nodes]
    return Check("NUMA nodes", Verdict.PASS, "; ".join(cores) or "not told")


def _read(path: pathlib.Path) -> str:
    """A line of the kernel's, or nothing where it does not say."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def to_json(checks: list[Check]) -> list[dict[str, Any]]:
    """The table for machines: one object per check, keys as of `Check`."""
    return [dataclasses.asdict(check) for check in checks]
