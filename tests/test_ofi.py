"""Fabrics over libfabric's tcp: the same bits as shm, deaths, and refusals."""

from __future__ import annotations

import os
import pathlib
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_cases import AXIS, Meeting, local_rows, mapped, mesh_of_all, place

import jaxfabric as jf
from jaxfabric import _ffi, _interfaces, _libfabric

N, T, D, K, E = 4, 6, 8, 2, 8
RING = [(rank, (rank + 1) % N) for rank in range(N)]
NOTICE_S = 2.0  # within which the death of a process is an error everywhere


def state(name: str) -> tuple[str, str]:
    """State of a transport, and why."""
    rows = {row[0]: row for row in _ffi.transport_states()}
    return rows[name][1], rows[name][2]


def require_tcp() -> None:
    found, reason = state("ofi/tcp")
    if found != "usable":
        pytest.skip(f"ofi/tcp: {found}: {reason}")


def operands(mesh: jax.sharding.Mesh) -> tuple[jax.Array, ...]:
    """x, ids, weights of all ranks."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(N * T)]).astype(np.int32)
    return (
        place(mesh, rng.normal(size=(N * T, D)).astype(np.float32)),
        place(mesh, ids),
        place(mesh, rng.random((N * T, K)).astype(np.float32)),
    )


def every_primitive(mesh: jax.sharding.Mesh, transport: str) -> list[np.ndarray]:
    """What this process gets of a program that uses each primitive."""
    with jf.Fabric(mesh, transport=transport) as fabric:
        window = fabric.window((N, D), jnp.float32)

        def program(x: Any, ids: Any, weights: Any) -> Any:
            rank = jax.lax.axis_index(AXIS)
            token = jf.barrier(AXIS, token=jf.token())
            token = jf.put(
                *(window, x[0], (rank + 1) % N),
                axis_name=AXIS,
                offset=rank * D,
                id=3,
                token=token,
            )
            got, token = jf.wait(window, axis_name=AXIS, id=3, token=token)
            swapped, token = jf.exchange(x, RING, axis_name=AXIS, token=token)
            out = jf.moe.dispatch(x, ids, weights, axis_name=AXIS, num_experts=E)
            y = jf.moe.combine(jnp.tanh(out.tokens), out.plan)
            return got[(rank - 1) % N][None], swapped, out.tokens, y

        results = mapped(mesh, program)(*operands(mesh))
        return [
            rows
            for result in jax.block_until_ready(results)
            for _, rows in sorted(local_rows(result).items())
        ]


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
    asked: list[tuple[str, list[int]]] = []

    class Native:
        @staticmethod
        def share_nics(transport: str, library: str, cores: list[int]) -> Any:
            asked.append((transport, cores))
            return [[f"nic of {core}"] for core in cores]

    monkeypatch.setattr(_ffi, "native", Native)
    hosts, cores = ["a", "b", "a", "b"], [0, 8, 4, 9]
    share = _interfaces.share_interfaces("ofi/efa", hosts, cores, 2)
    assert share == ["nic of 4"]
    assert asked == [("ofi/efa", [0, 4])]
    assert _interfaces.share_interfaces("ofi/tcp", hosts, cores, 2) == []
    assert _interfaces.share_interfaces("shm", hosts, cores, 2) == []


def test_the_library_is_the_one_that_is_set() -> None:
    with jf.config(libfabric="/opt/libfabric.so.1"):
        assert _libfabric.libfabric_path() == "/opt/libfabric.so.1"
