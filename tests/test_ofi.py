"""Fabrics over libfabric's tcp: the same bits as shm, deaths, and refusals."""

from __future__ import annotations

import os
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np
import pytest
from fabric_cases import AXIS, Meeting, local_rows, mapped, mesh_of_all, place
from primitive_cases import RING, N, every_primitive

import jaxfabric as jf
from jaxfabric import _ffi, _interfaces, _libfabric

NOTICE_S = 2.0  # within which the death of a process is an error everywhere


def state(name: str) -> tuple[str, str]:
    """State of a transport, and why."""
    rows = {row[0]: row for row in _ffi.transport_states()}
    return rows[name][1], rows[name][2]


def require_tcp() -> None:
    found, reason = state("ofi/tcp")
    if found != "usable":
        pytest.skip(f"ofi/tcp: {found}: {reason}")


@pytest.mark.jaxfabric(processes=N, timeout_s=120)
def test_the_primitives_give_the_bits_of_shm() -> None:
    require_tcp()
    mesh = mesh_of_all()
    for ours, theirs in zip(
        every_primitive(mesh, "ofi/tcp"), every_primitive(mesh, "shm"), strict=True
    ):
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.jaxfabric(processes=2, devices_per_process=2, timeout_s=120)
def test_two_ranks_a_process_and_messages_of_many_writes() -> None:
    require_tcp()
    mesh = mesh_of_all()
    rows = np.arange(N * 1_000_003, dtype=np.float32).reshape(N, 1_000_003)
    with jf.Fabric(mesh, transport="ofi/tcp"):
        turn = mapped(mesh, lambda x: jf.exchange(x, RING, axis_name=AXIS)[0])
        got = jax.block_until_ready(turn(place(mesh, rows)))
    want = np.roll(rows, 1, axis=0)
    for first, part in local_rows(got).items():
        np.testing.assert_array_equal(part, want[first : first + len(part)])


@pytest.mark.jaxfabric(processes=N, lost=(2,), timeout_s=60)
def test_a_death_is_noticed_by_those_who_only_wait() -> None:
    require_tcp()
    fabric = jf.Fabric(mesh_of_all(), transport="ofi/tcp")
    meeting = Meeting()
    meeting.gather("open")
    killed = meeting.moment(0.5)
    time.sleep(max(0.0, killed - time.monotonic()))
    if jax.process_index() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    while fabric.failure() is None and time.monotonic() < killed + 20:
        time.sleep(0.01)
    took_s = time.monotonic() - killed
    failure = fabric.failure()
    print(f"noticed after {took_s:.3f} s: {failure}")
    assert isinstance(failure, jf.PeerLostError)
    assert failure.peers == (2,)
    assert took_s < NOTICE_S
    fabric.close()


def test_an_unknown_transport_is_refused_with_those_there_are() -> None:
    with pytest.raises(jf.TransportUnavailableError, match=r"no transport.*ofi/tcp"):
        jf.Fabric(mesh_of_all(), transport="ofi/pigeon")


def test_without_a_library_the_way_to_get_one_is_told(tmp_path: pathlib.Path) -> None:
    if state("ofi/tcp")[0] == "not built":
        pytest.skip("the ofi transport is not built")
    with (
        jf.config(libfabric=str(tmp_path / "libfabric.so.1")),
        pytest.raises(
            jf.TransportUnavailableError,
            match=r"(?s)library missing.*pip install 'jaxfabric\[ofi\]'",
        ),
    ):
        jf.Fabric(mesh_of_all(), transport="ofi/tcp")


def test_a_file_that_is_no_libfabric_is_refused(tmp_path: pathlib.Path) -> None:
    if state("ofi/tcp")[0] == "not built":
        pytest.skip("the ofi transport is not built")
    nonsense = tmp_path / "libfabric.so.1"
    nonsense.write_bytes(b"\x7fELF nonsense")
    with (
        jf.config(libfabric=str(nonsense)),
        pytest.raises(jf.TransportUnavailableError, match="cannot be loaded"),
    ):
        jf.Fabric(mesh_of_all(), transport="ofi/tcp")


def test_an_unknown_interface_is_refused_with_those_there_are() -> None:
    require_tcp()
    with (
        jf.config(nics="lo,nosuch0"),
        pytest.raises(jf.FabricError, match=r"'nosuch0'.*\blo\b.*JAXFABRIC_NICS"),
    ):
        jf.Fabric(mesh_of_all(), transport="ofi/tcp")


def test_interfaces_are_named_or_found() -> None:
    here = _interfaces.network_host()
    assert _interfaces.choose_interfaces("ofi/efa", [here]) == []
    assert _interfaces.choose_interfaces("ofi/tcp", [here, here]) == ["lo"]
    with jf.config(nics="a0, a1"):
        assert _interfaces.choose_interfaces("ofi/tcp", [here]) == ["a0", "a1"]


def test_processes_of_a_host_share_its_nics(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    class Native:
        @staticmethod
        def share_nics(
            transport: str, library: str, cores: list[int], gpus: list[list[str]]
        ) -> Any:
            asked.append((transport, cores, gpus))
            return [[f"nic of {core}"] for core in cores]

    monkeypatch.setattr(_ffi, "native", Native)
    hosts = ["a", "b", "a", "b"]
    places: list[_interfaces.Place] = [
        {"core": core, "gpus": [f"gpu of {core}"]} for core in (0, 8, 4, 9)
    ]
    share = _interfaces.share_interfaces("ofi/efa", hosts, places, 2)
    assert share == ["nic of 4"]
    assert asked == [("ofi/efa", [0, 4], [["gpu of 0"], ["gpu of 4"]])]
    assert _interfaces.share_interfaces("ofi/tcp", hosts, places, 2) == []
    assert _interfaces.share_interfaces("shm", hosts, places, 2) == []


def test_a_process_tells_the_planner_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Native:
        @staticmethod
        def nearest_nics(
            transport: str, library: str, cores: list[int], gpus: list[str]
        ) -> list[str]:
            return [f"near {gpu}" for gpu in gpus]

    class Gpu:
        def __init__(self, ordinal: int) -> None:
            self.local_hardware_id = ordinal

    class Driver:
        """libcuda: three GPUs are visible, and one does not say where it is."""

        def cuDeviceGet(self, device: Any, ordinal: int) -> int:
            device._obj.value = ordinal + 10
            return 0

        def cuDeviceGetPCIBusId(self, text: Any, size: int, device: Any) -> int:
            if device.value == 11:
                return 101
            text.value = f"0000:{device.value:02X}:0B.0".encode()
            return 0

    assert _interfaces.local_gpus() == []  # there are none on a test machine
    monkeypatch.setattr(
        jax, "local_devices", lambda *, backend: [Gpu(i) for i in range(3)]
    )
    monkeypatch.setattr(_interfaces.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(_ffi, "native", Native)
    jax.devices("cpu")  # starts JAX
    assert _interfaces.place()["gpus"] == ["0000:0a:0b.0", "0000:0c:0b.0"]
    near = _interfaces.nearest_interfaces("ofi/efa")
    assert near == ["near 0000:0a:0b.0", "near 0000:0c:0b.0"]
    monkeypatch.setattr(_interfaces, "_jax_has_started", lambda: False)
    assert _interfaces.local_gpus() == []


def test_the_library_is_the_one_that_is_set() -> None:
    with jf.config(libfabric="/opt/libfabric.so.1"):
        assert _libfabric.libfabric_path() == "/opt/libfabric.so.1"
