"""doctor: what it finds on machines of all kinds, and that it says how to repair."""

from __future__ import annotations

import json
import pathlib
import resource
import shutil
from typing import Any

import pytest
from ranks import run_child

from jaxfabric import _doctor, _ffi
from jaxfabric._config import config
from jaxfabric._doctor import Verdict
from jaxfabric._errors import FabricError
from jaxfabric._mesh import TRANSPORTS


def found(root: pathlib.Path) -> dict[str, _doctor.Check]:
    return {check.name: check for check in _doctor.examine(root)}


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_the_command_prints_every_check_of_this_machine() -> None:
    table = run_child("-m", "jaxfabric._cli", "doctor")
    objects = json.loads(run_child("-m", "jaxfabric._cli", "doctor", "--json"))
    names = [o["name"] for o in objects]
    for name in ("python", "jax", "native module", "transport shm", "/dev/shm"):
        assert name in names
        assert name in table
    assert {o["verdict"] for o in objects} <= {v.value for v in Verdict}
    # Whatever is not right has a fix beside it, and only that.
    for o in objects:
        assert bool(o["fix"]) == (o["verdict"] != "PASS"), o


def test_nics_and_numa_nodes(tmp_path: pathlib.Path) -> None:
    net = tmp_path / "sys/class/net"
    write(net / "eth0/operstate", "up")
    write(net / "eth0/speed", "100000")
    write(net / "eth0/mtu", "9001")
    write(net / "eth0/device/numa_node", "1")
    write(net / "eth1/operstate", "down")
    write(net / "bonding_masters", "not a device")
    write(tmp_path / "sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE")
    write(tmp_path / "sys/class/infiniband/mlx5_1/ports/1/state", "1: DOWN")
    write(tmp_path / "sys/devices/system/node/node0/cpulist", "0-3")
    write(tmp_path / "sys/devices/system/node/node1/cpulist", "4-7")
    checks = found(tmp_path)
    eth0 = checks["NIC eth0"]
    assert eth0.verdict is Verdict.PASS
    assert eth0.found == "up, MTU 9001, 100000 Mbit/s, NUMA node 1"
    assert checks["NIC eth1"].verdict is Verdict.WARN
    assert checks["NIC eth1"].fix == "ip link set eth1 up"
    assert "NIC bonding_masters" not in checks
    assert checks["RDMA device mlx5_0"].verdict is Verdict.PASS
    assert checks["RDMA device mlx5_1"].verdict is Verdict.WARN
    assert checks["NUMA nodes"].found == "0: cores 0-3; 1: cores 4-7"


def test_a_machine_that_says_nothing(tmp_path: pathlib.Path) -> None:
    checks = found(tmp_path)
    assert checks["NICs"].verdict is Verdict.SKIP
    assert checks["ptrace"].verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("soft", "verdict"),
    [
        (64 << 10, Verdict.WARN),
        (2 << 30, Verdict.PASS),
        (resource.RLIM_INFINITY, Verdict.PASS),
    ],
)
def test_locked_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, soft: int, verdict: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert found(tmp_path)["locked memory"].verdict is verdict


def test_a_small_shared_memory_and_a_closed_ptrace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    usage = shutil._ntuple_diskusage(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    write(tmp_path / "proc/sys/kernel/yama/ptrace_scope", "1")
    checks = found(tmp_path)
    assert checks["/dev/shm"].verdict is Verdict.WARN
    assert "--shm-size" in checks["/dev/shm"].fix
    assert checks["ptrace"].verdict is Verdict.WARN


def test_a_native_module_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def broken() -> Any:
        raise ImportError("built for XLA FFI API 0.9")

    monkeypatch.setattr(_ffi, "native", broken)
    checks = found(tmp_path)
    assert checks["native module"].verdict is Verdict.FAIL
    assert checks["native module"].found == "built for XLA FFI API 0.9"
    assert "transport shm" not in checks


@pytest.mark.parametrize(
    ("name", "value", "verdict", "fix"),
    [
        ("TIMEOUT_S", "soon", Verdict.FAIL, "unset JAXFABRIC_TIMEOUT_S"),
        ("TIMEOUT_S", "inf", Verdict.FAIL, "unset JAXFABRIC_TIMEOUT_S"),
        ("VERBS", "gid_index=x", Verdict.FAIL, "unset JAXFABRIC_VERBS"),
        (
            *("TRANSPORT", "bogus", Verdict.FAIL),
            f"JAXFABRIC_TRANSPORT is one of {', '.join(TRANSPORTS)}",
        ),
        ("TIMEOUT", "3", Verdict.WARN, "did you mean JAXFABRIC_TIMEOUT_S?"),
    ],
)
def test_settings_that_nothing_accepts(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    name: str,
    value: str,
    verdict: Verdict,
    fix: str,
) -> None:
    monkeypatch.setenv(f"JAXFABRIC_{name}", value)
    monkeypatch.setattr(config, "_settings", None)
    check = found(tmp_path)["settings"]
    assert check.verdict is verdict
    assert check.fix == fix


def transport_checks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, opens: Any
) -> dict[str, _doctor.Check]:
    """As on a machine with an EFA device."""
    states = [
        ("shm", "usable", "ranks of one host share memory", ""),
        ("verbs", "library missing", "no libibverbs.so.1", "apt install it"),
        ("ofi/efa", "usable", "libfabric 2.5 drives rdmap0s6-rdm", ""),
    ]
    monkeypatch.setattr(_ffi, "transport_states", lambda: states)
    monkeypatch.setattr(_ffi, "open_for_caps", opens)
    return found(tmp_path)


CAPS = {"queue_depth": 256, "emulated_writes": False, "removal_fences": True}


def test_a_device_that_emulates_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    asked = []

    def opens(name: str, emulated: bool = True) -> dict[str, Any]:
        asked.append(name)
        return CAPS | {"emulated_writes": emulated}

    checks = transport_checks(monkeypatch, tmp_path, opens)
    assert asked == ["ofi/efa"]  # memory needs no opening, what is missing neither
    assert checks["transport ofi/efa"].verdict is Verdict.WARN
    assert "emulates" in checks["transport ofi/efa"].found
    assert checks["transport shm"].verdict is Verdict.PASS
    assert checks["transport verbs"].verdict is Verdict.SKIP
    checks = transport_checks(monkeypatch, tmp_path, lambda name: opens(name, False))
    assert checks["transport ofi/efa"].verdict is Verdict.PASS
    assert "256 writes at a time" in checks["transport ofi/efa"].found


def test_a_transport_that_cannot_cut_off_a_peer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    checks = transport_checks(
        monkeypatch, tmp_path, lambda name: CAPS | {"removal_fences": False}
    )
    check = checks["transport ofi/efa"]
    assert check.verdict is Verdict.WARN
    assert "frozen" in check.found
    assert "jaxfabric[ofi]" in check.fix


def test_debians_libfabric_1_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    library = next(pathlib.Path("/usr/lib").glob("*/libfabric.so.1"), None)
    if library is None:
        pytest.skip("no libfabric of the system: apt-get install libfabric1")
    # In a process of its own: two libfabrics in one do not end well.
    monkeypatch.setenv("JAXFABRIC_LIBFABRIC", str(library))
    printed = run_child("-m", "jaxfabric._cli", "doctor", "--json")
    check = {row["name"]: row for row in json.loads(printed)}["transport ofi/tcp"]
    if "libfabric 1." not in check["found"]:
        pytest.skip(f"not libfabric 1: {check['found']}")
    assert check["verdict"] == Verdict.WARN
    assert "cannot cut off a peer" in check["found"]


def test_a_device_that_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def opens(name: str) -> dict[str, Any]:
        raise FabricError("cannot register: Cannot allocate memory")

    check = transport_checks(monkeypatch, tmp_path, opens)["transport ofi/efa"]
    assert check.verdict is Verdict.WARN
    assert "not opened" in check.found
    assert "Cannot allocate memory" in check.found
    assert "locked memory" in check.fix
