"""Fabrics: which one an operation takes, opening, closing, and what outlives them."""

from __future__ import annotations

import threading
import time
from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from ranks import make_mesh, on_ranks, rows, same, spread

import jaxfabric as jf

RING = [(i, (i + 1) % 4) for i in range(4)]


def ring(fabric: Any = None, axis: str = "x") -> Any:
    def program(x: Any) -> Any:
        return jf.exchange(x, RING, axis_name=axis, fabric=fabric)[0]

    return program


def case() -> tuple[Any, np.ndarray, np.ndarray]:
    x = np.arange(4 * 5, dtype=np.float32).reshape(4, 5)
    return make_mesh(4), x, np.roll(x, 1, axis=0)


def sent(fabric: jf.Fabric) -> int:
    """Messages that rank 0 has sent to rank 1."""
    return fabric.snapshot()[0][1]["messages_sent"]


@pytest.mark.smoke
def test_the_innermost_entered_fabric_is_taken() -> None:
    mesh, x, want = case()
    with jf.Fabric(mesh, name="outer") as outer:
        with jf.Fabric(mesh, name="inner") as inner:
            same(mesh, on_ranks(mesh, ring())(x), want)
            assert (sent(outer), sent(inner)) == (0, 1)
            same(mesh, on_ranks(mesh, ring(outer))(x), want)
            assert (sent(outer), sent(inner)) == (1, 1)
        same(mesh, on_ranks(mesh, ring())(x), want)
        assert sent(outer) == 2


def test_one_without_the_axis_is_passed_over() -> None:
    mesh, x, want = case()
    other = make_mesh((2, 3), ("a", "b"))
    with jf.Fabric(mesh) as fabric, jf.Fabric(other):
        same(mesh, on_ranks(mesh, ring())(x), want)
        assert sent(fabric) == 1


def test_the_only_open_one_is_taken_and_two_are_ambiguous() -> None:
    mesh, x, want = case()
    one = jf.Fabric(mesh, name="one")
    try:
        same(mesh, on_ranks(mesh, ring())(x), want)
        two = jf.Fabric(mesh, name="two")
        with pytest.raises(jf.FabricError, match=r"'one', 'two'; say which with fabr"):
            on_ranks(mesh, ring())(x)
        same(mesh, on_ranks(mesh, ring(two))(x), want)
        assert (sent(one), sent(two)) == (1, 1)
        two.close()
        same(mesh, on_ranks(mesh, ring())(x), want)
    finally:
        one.close()


def test_threads_have_their_own_innermost_fabric() -> None:
    mesh, x, want = case()
    found: dict[str, Any] = {}

    def work(name: str, fabric: jf.Fabric | None) -> None:
        try:
            if fabric is None:
                found[name] = on_ranks(mesh, ring())(x)
            else:
                with fabric:
                    found[name] = on_ranks(mesh, ring())(x)
                    found[name + " sent"] = sent(fabric)
        except Exception as error:
            found[name] = error

    def run(*arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments)
        thread.start()
        thread.join()

    with jf.Fabric(mesh, name="mine") as mine:
        run("plain", None)  # takes the only open one
        run("own", jf.Fabric(mesh, name="own"))
        same(mesh, on_ranks(mesh, ring())(x), want)
        assert sent(mine) == 2
    same(mesh, found["plain"], want)
    same(mesh, found["own"], want)
    assert found["own sent"] == 1


@pytest.mark.smoke
def test_several_meshes_at_once() -> None:
    """Eight ranks, a 2-D mesh, the same devices in another order, and two halves."""
    _, x, want = case()
    meshes = {
        "eight": make_mesh(8, ("e",)),
        "grid": make_mesh((2, 4), ("d", "x")),
        "turned": make_mesh(4, ("t",), order=(6, 1, 3, 0)),
        "low": make_mesh(4, ("l",), order=(0, 1, 2, 3)),
        "high": make_mesh(4, ("h",), order=(4, 5, 6, 7)),
    }
    axes = {"eight": "e", "grid": "x", "turned": "t", "low": "l", "high": "h"}
    x8 = np.concatenate([x, 100 + x])
    want8 = {
        "eight": np.concatenate([want, np.zeros_like(x)]),
        "grid": np.concatenate([want, 100 + want]),
    }
    fabrics = {name: jf.Fabric(mesh, name=name) for name, mesh in meshes.items()}
    try:
        runs = {n: on_ranks(m, ring(axis=axes[n])) for n, m in meshes.items()}
        for _ in range(3):
            for name, mesh in meshes.items():
                whole = mesh.size == 8
                got = runs[name](x8 if whole else x)
                same(mesh, got, want8[name] if whole else want)
    finally:
        for fabric in fabrics.values():
            fabric.close()


def test_two_fabrics_in_one_program() -> None:
    mesh, x, want = case()
    with jf.Fabric(mesh, name="a") as a, jf.Fabric(mesh, name="b") as b:
        windows = a.window(5, np.float32), b.window(5, np.float32)

        def program(x: Any) -> Any:
            me = lax.axis_index("x")
            outs = []
            for fabric, win, shift in ((a, windows[0], 1), (b, windows[1], 2)):
                token = jf.put(
                    *(win, x, (me + shift) % 4), axis_name="x", fabric=fabric
                )
                outs.append(jf.wait(win, axis_name="x", token=token, fabric=fabric)[0])
            return outs

        left, second = on_ranks(mesh, program)(x)
        same(mesh, left, want)
        same(mesh, second, np.roll(x, 2, axis=0))

        def mixed(x: Any) -> Any:
            return jf.put(windows[0], x, 0, axis_name="x", fabric=b)

        with pytest.raises(ValueError, match="of another Fabric"):
            on_ranks(mesh, mixed)(x)


@pytest.mark.smoke
def test_one_function_under_two_successive_fabrics() -> None:
    """It is compiled once; what it holds is the mesh and the name."""
    mesh, x, want = case()
    traces = []

    def program(x: Any) -> Any:
        traces.append(x)
        return ring()(x)

    run = on_ranks(mesh, program)
    for _ in range(3):
        with jf.Fabric(mesh) as fabric:
            same(mesh, run(x), want)
            assert sent(fabric) == 1
    assert len(traces) == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"closed.*with jaxfabric.Fa"):
        run(x)
    with jf.Fabric(mesh):
        same(mesh, run(x), want)


def test_windows_of_an_earlier_fabric() -> None:
    """They are named by their number, so the successor's window is used, if alike."""
    mesh, x, want = case()
    with jf.Fabric(mesh) as fabric:
        win = fabric.window(5, np.float32)

        def program(x: Any) -> Any:
            right = (lax.axis_index("x") + 1) % 4
            token = jf.put(win, x, right, axis_name="x")
            return jf.wait(win, axis_name="x", token=token)[0]

        run = on_ranks(mesh, program)
        same(mesh, run(x), want)
    with jf.Fabric(mesh) as fabric:
        with pytest.raises(jax.errors.JaxRuntimeError, match="no window 0; make it ag"):
            run(x)
    with jf.Fabric(mesh) as fabric:
        assert fabric.window(5, np.float32) == win
        same(mesh, run(x), want)
    with jf.Fabric(mesh) as fabric:
        fabric.window(99, np.float32)
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"20 bytes.*has 396"):
            run(x)


def test_closing() -> None:
    mesh, x, _ = case()
    fabric = jf.Fabric(mesh)
    assert not fabric.closed
    fabric.close()
    fabric.close()
    assert fabric.closed
    assert "closed" in repr(fabric)
    uses: list[Any] = [
        lambda: fabric.window(3, np.float32),
        fabric.snapshot,
        fabric.peers,
        fabric.failure,
        lambda: on_ranks(mesh, ring(fabric))(x),
        lambda: fabric.__enter__(),
    ]
    for use in uses:
        with pytest.raises(jf.FabricError, match=r"'default' is closed; open it again"):
            use()
    with pytest.raises(jf.FabricError, match="no open Fabric has axis 'x'; wrap the"):
        on_ranks(mesh, ring())(x)


def test_closing_ends_what_is_under_way() -> None:
    mesh, x, _ = case()
    with jf.Fabric(mesh) as fabric:
        win = fabric.window(5, np.float32)
        mapped = jax.shard_map(
            lambda x: x + jf.wait(win, axis_name="x")[0],
            mesh=mesh,
            in_specs=P("x"),
            out_specs=P("x"),
        )
        never = jax.jit(mapped)(spread(mesh, x))
        fabric.close()
    with pytest.raises(jax.errors.JaxRuntimeError, match="was closed"):
        never.block_until_ready()


def test_leaving_lets_calls_under_way_end() -> None:
    mesh, x, _ = case()
    with jf.Fabric(mesh) as fabric:
        win = fabric.window(5, np.float32)

        def chain(x: jax.Array) -> jax.Array:
            token = jf.put(win, x, jax.lax.axis_index("x"), axis_name="x")
            return x + jf.wait(win, axis_name="x", token=token)[0]

        mapped = jax.shard_map(chain, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        program = jax.jit(mapped)
        program(spread(mesh, x)).block_until_ready()
        twice = program(spread(mesh, x))
        while not fabric._native.operations_under_way() and not twice.is_ready():
            pass
    np.testing.assert_array_equal(twice, 2 * x)


def test_one_mesh_and_name_is_open_once() -> None:
    mesh, _, _ = case()
    with jf.Fabric(mesh):
        with pytest.raises(jf.FabricError, match="open over this mesh already; close"):
            jf.Fabric(mesh)
        jf.Fabric(make_mesh(4, order=(1, 0, 2, 3))).close()
    jf.Fabric(mesh).close()


def test_another_mesh_under_a_fabric_is_refused() -> None:
    """Another shape when traced, another order of devices when run."""
    mesh, x, _ = case()
    with jf.Fabric(mesh):
        with pytest.raises(jf.FabricError, match=r"\{'x': 2\}.*\{'x': 4\}.*same mesh"):
            on_ranks(make_mesh(2), ring())(x[:2])
        turned = make_mesh(4, order=(1, 0, 2, 3))
        with pytest.raises(jax.errors.JaxRuntimeError, match="order their devices dif"):
            on_ranks(turned, ring())(x)


def test_opening() -> None:
    mesh, _, _ = case()
    with pytest.raises(ValueError, match=r"no mesh; pass one.*jax.set_mesh"):
        jf.Fabric()
    with jax.set_mesh(mesh), jf.Fabric() as fabric:
        assert fabric.mesh == mesh
    with pytest.raises(TypeError, match=r"must be a jax.sharding.Mesh, got int"):
        jf.Fabric(3)  # type: ignore[arg-type]
    with pytest.raises(
        jf.TransportUnavailableError, match=r"no transport='pigeon'.*shm"
    ):
        jf.Fabric(mesh, transport="pigeon")
    for timeout_s in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="must be above 0 seconds"):
            jf.Fabric(mesh, timeout_s=timeout_s)


def test_a_window_or_a_message_too_large() -> None:
    """CapacityError says which setting to raise; the Fabric goes on after a window."""
    mesh, x, want = case()
    with jf.Fabric(mesh, window_bytes=1024, mailbox_bytes=4096) as fabric:
        fabric.window(200, np.float32)
        with pytest.raises(jf.CapacityError, match="JAXFABRIC_WINDOW_BYTES"):
            fabric.window(200, np.float32)
        same(mesh, on_ranks(mesh, ring())(x), want)
        large = np.zeros((4, 2000), np.float32)
        with pytest.raises(
            jax.errors.JaxRuntimeError, match=r"8000 bytes.*JAXFABRIC_MAILBOX_BYTES"
        ):
            on_ranks(mesh, ring())(large)
        assert isinstance(fabric.failure(), jf.CapacityError)
    with jf.Fabric(mesh, mailbox_bytes=8192):
        on_ranks(mesh, ring())(large)


def test_at_most_128_windows() -> None:
    mesh, _, _ = case()
    with jf.Fabric(mesh) as fabric:
        for _ in range(128):
            fabric.window(1, np.int8)
        with pytest.raises(jf.CapacityError, match="at most 128 windows"):
            fabric.window(1, np.int8)


@pytest.mark.jaxfabric(processes=2)
def test_processes_that_disagree() -> None:
    mesh = make_mesh(2)
    me = jax.process_index()
    with pytest.raises(jf.PlanMismatchError, match=r"mailbox_bytes is \d+ on process"):
        jf.Fabric(mesh, mailbox_bytes=4096 * (1 + me))
    with pytest.raises(jf.TransportUnavailableError, match="2 processes; use transpo"):
        jf.Fabric(mesh, transport="fake")
    with jf.Fabric(mesh) as fabric:
        with pytest.raises(
            jf.PlanMismatchError, match=r"float32 on process . but .*; all p"
        ):
            fabric.window(1 + me, np.float32)
        # It was only compared, so the Fabric goes on.
        win = fabric.window(3, np.float32)
        assert win.shape == (3,)


@pytest.mark.jaxfabric(processes=2)
def test_a_process_that_never_opens_it() -> None:
    mesh = make_mesh(2)
    if jax.process_index() == 0:
        with pytest.raises(
            jf.DeadlineError, match=r"process 1 did not come within 0.5"
        ):
            jf.Fabric(mesh, timeout_s=0.5, name="lonely")
    # Both may open others afterwards.
    with jf.Fabric(mesh, name="together"):
        x = np.array([[1.0], [2.0]], np.float32)

        def swap(x: Any) -> Any:
            return jf.exchange(x, [(0, 1), (1, 0)], axis_name="x")[0]

        for rank, row in rows(mesh, on_ranks(mesh, swap)(x)).items():
            assert row.tolist() == [2.0 - rank]


@pytest.mark.jaxfabric(processes=4)
def test_a_rank_that_is_done_may_leave_early() -> None:
    """Rank 3 has all it needs and closes while rank 2 still waits for rank 1."""
    mesh, x, want = case()

    def late(rank: Any, x: Any) -> Any:
        time.sleep(0.5 * (int(rank) == 1))
        return np.asarray(x)

    def program(x: Any) -> Any:
        x = jax.pure_callback(late, jax.typeof(x), lax.axis_index("x"), x)
        return ring()(x)

    for _ in range(2):
        with jf.Fabric(mesh) as fabric:
            same(mesh, on_ranks(mesh, program)(x), want)
            assert fabric.failure() is None
