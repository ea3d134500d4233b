"""Ranks that die, stop, raise or run another program: errors, in time, and no leaks."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_cases import AXIS, Meeting, mapped, mesh_of_all, place, sleep_until

import jaxfabric as jf
from jaxfabric._rendezvous import Rendezvous

T, D, K, E = 4, 8, 2, 8
NOTICE_S = 2.0  # within which the death of a process is an error everywhere
AT_ONCE_S = 0.5  # what a call on a failed Fabric may take, on busy cores
OPS = ("barrier", "dispatch", "combine")


def case(mesh: Any, d: int = D) -> tuple[jax.Array, ...]:
    """x, ids, weights of all ranks."""
    rng = np.random.default_rng(0)
    rows = T * mesh.size
    ids = np.stack([rng.permutation(E)[:K] for _ in range(rows)])
    return (
        place(mesh, rng.normal(size=(rows, d)).astype(np.float32)),
        place(mesh, ids.astype(np.int32)),
        place(mesh, rng.random((rows, K)).astype(np.float32)),
    )


def barrier_call(fabric: jf.Fabric) -> Callable[[], Any]:
    mesh = fabric.mesh
    f = mapped(mesh, lambda t: jf.barrier(AXIS, token=t, fabric=fabric))
    token = place(mesh, np.zeros(mesh.size, np.float32))
    return lambda: f(token)


def dispatch_call(fabric: jf.Fabric, d: int = D, experts: int = E) -> Any:
    def program(x: Any, ids: Any, weights: Any) -> Any:
        out = jf.moe.dispatch(
            *(x, ids, weights), axis_name=AXIS, num_experts=experts, fabric=fabric
        )
        return out.tokens, out.plan

    f = mapped(fabric.mesh, program)
    operands = case(fabric.mesh, d)
    return lambda: f(*operands)


def combine_call(fabric: jf.Fabric) -> Callable[[], Any]:
    """The dispatch before it is done at once."""
    rows, plan = jax.block_until_ready(dispatch_call(fabric)())
    f = mapped(fabric.mesh, jf.moe.combine)
    return lambda: f(rows, plan)


CALLS: dict[str, Callable[[jf.Fabric], Callable[[], Any]]] = {
    "barrier": barrier_call,
    "dispatch": dispatch_call,
    "combine": combine_call,
}


class Attempt(threading.Thread):
    """A call that blocks in another rank's absence; its error, and when it came."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: Exception | None = None
        self.ended = 0.0
        self.start()

    def run(self) -> None:
        try:
            jax.block_until_ready(self._call())
        except Exception as error:
            self.error = error
        self.ended = time.monotonic()

    def finish(self, timeout_s: float) -> Exception:
        """Its error; fails if there is none, or it still blocks."""
        self.join(timeout_s)
        assert not self.is_alive(), f"still blocked after {timeout_s} s"
        assert self.error is not None, "it went through"
        return self.error


def attempt_now(call: Callable[[], Any]) -> tuple[Exception, float]:
    """The error of a call, and how many seconds it took."""
    begin = time.monotonic()
    attempt = Attempt(call)
    return attempt.finish(20), attempt.ended - begin


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def under_way(fabric: jf.Fabric) -> int:
    return int(fabric._native.operations_under_way())


def names(error: Exception, *ranks: int) -> None:
    """The error is JAX's, and says which ranks."""
    # block_until_ready of several arrays makes a ValueError of the same text.
    assert isinstance(error, jax.errors.JaxRuntimeError | ValueError), repr(error)
    assert "jaxfabric: " in str(error)
    for rank in ranks:
        assert re.search(rf"\brank {rank}\b", str(error)), str(error)


def open_fabrics(mesh: Any, *fabrics: str) -> dict[str, jf.Fabric]:
    return {name: jf.Fabric(mesh, name=name) for name in fabrics}


def one_is_killed(victim: int) -> None:
    """Blocked in three operations at once, and idle, when `victim` is killed.

    The victim is inside of the operations as well: the rank after it has not come.
    """
    me = jax.process_index()
    late = (victim + 1) % jax.process_count()
    mesh = mesh_of_all()
    fabrics = open_fabrics(mesh, *OPS, "idle")
    assert all(f.timeout_s == 30 for f in fabrics.values())
    calls = {op: CALLS[op](fabrics[op]) for op in OPS}
    idle = barrier_call(fabrics["idle"])
    for call in (*calls.values(), idle):
        jax.block_until_ready(call())  # compiled, and everything works
    meeting = Meeting()
    meeting.gather("warm")
    attempts = {}
    if me != late:
        attempts = {op: Attempt(call) for op, call in calls.items()}
        wait_for(lambda: all(under_way(fabrics[op]) == 1 for op in OPS))
    killed = meeting.moment(0.3)
    sleep_until(killed)
    if me == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    for op, attempt in attempts.items():
        names(attempt.finish(20), victim)
        took_s = attempt.ended - killed
        print(f"{op}: noticed the death of rank {victim} after {took_s:.3f} s")
        assert took_s < NOTICE_S
    wait_for(lambda: all(f.failure() is not None for f in fabrics.values()))
    assert time.monotonic() - killed < NOTICE_S
    for name, call in (*calls.items(), ("idle", idle)):
        failure = fabrics[name].failure()
        assert isinstance(failure, jf.PeerLostError), repr(failure)
        assert failure.peers == (victim,)
        assert not fabrics[name].peers()[victim]["up"]
        error, took_s = attempt_now(call)
        names(error, victim)
        print(f"{name}: the next call raised after {took_s:.3f} s")
        assert took_s < AT_ONCE_S
    begin = time.monotonic()
    for fabric in fabrics.values():
        fabric.close()
    assert time.monotonic() - begin < 2


@pytest.mark.jaxfabric(processes=4, lost=(0,), timeout_s=60)
def test_rank_0_is_killed() -> None:
    one_is_killed(0)


@pytest.mark.jaxfabric(processes=4, lost=(1,), timeout_s=60)
def test_rank_1_is_killed() -> None:
    one_is_killed(1)


@pytest.mark.jaxfabric(processes=4, lost=(2,), timeout_s=60)
def test_rank_2_is_killed() -> None:
    one_is_killed(2)


@pytest.mark.jaxfabric(processes=4, lost=(3,), timeout_s=60)
def test_rank_3_is_killed() -> None:
    one_is_killed(3)


@pytest.mark.jaxfabric(processes=4, lost=(2,), timeout_s=60)
def test_killed_in_full_swing() -> None:
    """At any point of a loop of all three, and in two processes that only compute."""
    me, victim = jax.process_index(), 2
    mesh = mesh_of_all()
    x, ids, weights = case(mesh)

    def loop(x: Any, ids: Any, weights: Any) -> Any:
        def step(_: Any, carry: Any) -> Any:
            x, token = carry
            d = jf.moe.dispatch(
                *(x, ids, weights), axis_name=AXIS, num_experts=E, token=token
            )
            y, token = jf.moe.combine(d.tokens, d.plan, token=d.token)
            return y / 2, jf.barrier(AXIS, token=token)

        return jax.lax.fori_loop(
            0, 10_000_000, step, (x, jax.lax.pcast(jf.token(), AXIS, to="varying"))
        )

    with contextlib.ExitStack() as stack:
        fabric = stack.enter_context(jf.Fabric(mesh))
        f = mapped(mesh, loop)
        attempt = Attempt(lambda: f(x, ids, weights))
        wait_for(lambda: moved(fabric) > 10)
        killed = Meeting().moment(0.3)
        sleep_until(killed)
        if me == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        names(attempt.finish(20), victim)
        print(f"noticed after {attempt.ended - killed:.3f} s")
        assert attempt.ended - killed < NOTICE_S
        failure = fabric.failure()
        assert isinstance(failure, jf.PeerLostError)
        assert failure.peers == (victim,)


def moved(fabric: jf.Fabric) -> int:
    """Messages that this process's ranks have received."""
    peers = fabric.snapshot().values()
    return sum(p["messages_received"] for by_peer in peers for p in by_peer.values())


@pytest.mark.jaxfabric(processes=4, timeout_s=60)
def test_a_rank_is_stopped() -> None:
    """SIGSTOP: the others raise when the time limit is over, and name it."""
    me, stopped, limit_s = jax.process_index(), 1, 3.0
    with contextlib.ExitStack() as stack:
        fabric = stack.enter_context(jf.Fabric(mesh_of_all(), timeout_s=limit_s))
        calls = [CALLS[op](fabric) for op in OPS]
        for call in calls:
            jax.block_until_ready(call())
        pids = Meeting().gather(os.getpid())
        begin = time.monotonic()
        if me == stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            attempts = [Attempt(call) for call in calls]
            for attempt in attempts:
                names(attempt.finish(20), stopped)
                took_s = attempt.ended - begin
                print(f"raised after {took_s:.2f} s of a limit of {limit_s} s")
                assert took_s < limit_s + 1
            error, took_s = attempt_now(calls[0])
            names(error, stopped)
            assert took_s < AT_ONCE_S
        if me == (stopped + 1) % 4:
            os.kill(pids[stopped], signal.SIGCONT)
        if me == stopped:
            # Awake again, it hears that the others have given up.
            wait_for(lambda: fabric.failure() is not None, 5)
            for call in calls:
                error, took_s = attempt_now(call)
                assert "gave up" in str(error)
                assert took_s < AT_ONCE_S


@pytest.mark.jaxfabric(processes=4)
@pytest.mark.parametrize("op", OPS)
def test_a_rank_raises(op: str) -> None:
    """One that leaves its `with` by an exception takes the others along at once."""
    me, raising = jax.process_index(), 3
    mesh = mesh_of_all()
    meeting = Meeting()
    with pytest.raises((RuntimeError, ValueError, KeyError)) as raised:  # noqa: PT012
        with jf.Fabric(mesh) as fabric:
            call = CALLS[op](fabric)
            jax.block_until_ready(call())
            begin = meeting.moment(0)
            if me == raising:
                raise KeyError("a bug of the user's")
            jax.block_until_ready(call())
    took_s = time.monotonic() - begin
    print(f"{op}: all had left after {took_s:.3f} s")
    assert took_s < NOTICE_S
    if me != raising:
        names(raised.value, raising)
        assert 'gave up: KeyError: "a bug of the user\'s"' in str(raised.value)
    meeting.gather("left")


@pytest.mark.jaxfabric(processes=4)
def test_a_rank_closes_early() -> None:
    """Without an exception: only those that still need it fail, also at once."""
    me, early = jax.process_index(), 1
    fabric = jf.Fabric(mesh_of_all())
    call = barrier_call(fabric)
    jax.block_until_ready(call())
    meeting = Meeting()
    begin = meeting.moment(0)
    if me == early:
        fabric.close()
    else:
        error, _ = attempt_now(call)
        names(error, early)
        assert "closed its Fabric" in str(error)
        assert time.monotonic() - begin < NOTICE_S
        assert isinstance(fabric.failure(), jf.PeerLostError)
        fabric.close()
    meeting.gather("closed")
    with pytest.raises((RuntimeError, ValueError), match=r"Fabric.* is closed"):
        jax.block_until_ready(call())


@pytest.mark.jaxfabric(processes=4)
def test_ranks_that_are_done_may_leave() -> None:
    """Half of the ranks close while the other half goes on among themselves."""
    me = jax.process_index()
    devices = np.array(jax.devices()).reshape(2, 2)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.Mesh(devices, ("data", AXIS), axis_types=auto)
    both = jax.sharding.PartitionSpec(("data", AXIS))
    with jf.Fabric(mesh) as fabric:
        f = mapped(mesh, lambda t: jf.barrier(AXIS, token=t), both)
        token = place(mesh, np.zeros(4, np.float32), both)
        jax.block_until_ready(f(token))
        if me >= 2:
            for _ in range(20):
                time.sleep(0.02)
                jax.block_until_ready(f(token))
            assert fabric.failure() is None
    Meeting().gather("done")


@pytest.mark.jaxfabric(processes=4)
def test_closing_right_after_the_last_step() -> None:
    """A rank that has all it needs does not pull the rug from under slower ones."""
    mesh = mesh_of_all()
    operands = case(mesh)

    def program(x: Any, ids: Any, weights: Any) -> Any:
        d = jf.moe.dispatch(x, ids, weights, axis_name=AXIS, num_experts=E)
        return jf.moe.combine(d.tokens, d.plan)

    f = mapped(mesh, program)
    for _ in range(20):
        with jf.Fabric(mesh):
            jax.block_until_ready(f(*operands))


@pytest.mark.jaxfabric(processes=2)
def test_closing_while_a_slow_process_still_opens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the fast one published stays until the slow one has read it."""
    if jax.process_index() == 1:
        get = Rendezvous._get

        def slow_get(self: Rendezvous, key: str, process: int, until: float) -> bytes:
            time.sleep(0.2)
            return get(self, key, process, until)

        monkeypatch.setattr(Rendezvous, "_get", slow_get)
    jf.Fabric(mesh_of_all(), timeout_s=5).close()


def different_programs(fabric: jf.Fabric, kind: str, odd: bool) -> Callable[[], Any]:
    """One that the odd rank runs in another form."""
    mesh = fabric.mesh
    if kind == "rows of another size":
        return dispatch_call(fabric, 64 if odd else 32)
    if kind == "another number of experts":
        return dispatch_call(fabric, experts=16 if odd else 8)
    ring = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]

    def exchange(t: Any) -> Any:
        return jf.exchange(t, ring, axis_name=AXIS)[0]

    def barrier(t: Any) -> Any:
        return jf.barrier(AXIS, token=t)

    f = mapped(mesh, exchange if odd else barrier)
    return lambda: f(place(mesh, np.zeros(mesh.size, np.float32)))


MISMATCHES = {
    "rows of another size": r"dispatch \(.*the same program, on the same shapes\?",
    "another number of experts": r"num_experts = (8|16) where this rank has (8|16)",
    "barrier and exchange": r"do all ranks run the same program",
}


@pytest.mark.jaxfabric(processes=4)
@pytest.mark.parametrize("kind", MISMATCHES)
def test_mismatched_programs(kind: str) -> None:
    """One clear error on every rank."""
    odd = jax.process_index() == 2
    with jf.Fabric(mesh_of_all(), timeout_s=3) as fabric:
        call = different_programs(fabric, kind, odd)
        Meeting().gather("ready")
        error, took_s = attempt_now(call)
        print(f"{took_s:.2f} s: {error}")
        names(error)
        assert re.search(MISMATCHES[kind], str(error)), str(error)
        assert took_s < 5


@pytest.mark.jaxfabric(processes=2)
def test_settings_that_differ() -> None:
    odd = jax.process_index() == 1
    with pytest.raises(jf.PlanMismatchError, match=r"mailbox_bytes is (\d+) on proc"):
        jf.Fabric(mesh_of_all(), mailbox_bytes=1 << (20 + odd))
    Meeting().gather("seen")


@pytest.mark.jaxfabric(processes=2)
def test_a_rank_that_does_not_open() -> None:
    if jax.process_index() == 0:
        begin = time.monotonic()
        with pytest.raises(jf.DeadlineError, match="process 1 did not come within 1 s"):
            jf.Fabric(mesh_of_all(), timeout_s=1, name="lonely")
        assert time.monotonic() - begin < 3
    Meeting().gather("seen")


@pytest.mark.jaxfabric(processes=2)
@pytest.mark.parametrize("op", OPS)
def test_closed_while_under_way(op: str) -> None:
    """close() ends what waits, and returns soon."""
    me = jax.process_index()
    fabric = jf.Fabric(mesh_of_all())
    call = CALLS[op](fabric)
    jax.block_until_ready(call())
    meeting = Meeting()
    meeting.gather("ready")
    if me == 0:
        attempt = Attempt(call)
        wait_for(lambda: under_way(fabric) == 1)
        begin = time.monotonic()
        fabric.close()
        assert time.monotonic() - begin < NOTICE_S
        assert "was closed" in str(attempt.finish(5))
        assert fabric.closed
        fabric.close()
    meeting.gather("closed")
    fabric.close()


@pytest.mark.jaxfabric(processes=2, devices_per_process=2, lost=(1,), timeout_s=60)
def test_killed_process_of_two_ranks() -> None:
    """All ranks of a process are lost together."""
    mesh = mesh_of_all()
    fabric = jf.Fabric(mesh)
    call = dispatch_call(fabric)
    jax.block_until_ready(call())
    killed = Meeting().moment(0.3)
    if jax.process_index() == 1:
        sleep_until(killed)
        os.kill(os.getpid(), signal.SIGKILL)
    attempt = Attempt(call)
    error = attempt.finish(20)
    assert re.search(r"\brank [23]\b", str(error)), str(error)
    assert attempt.ended - killed < NOTICE_S
    failure = fabric.failure()
    assert isinstance(failure, jf.PeerLostError)
    wait_for(lambda: set(fabric.failure().peers) == {2, 3}, 2)  # type: ignore[union-attr]
    fabric.close()


def test_one_rank_of_a_process_fails() -> None:
    """Eight ranks of one process: bad routes of one end the call of all."""
    with jf.Fabric(mesh_of_all()) as fabric:
        rows = T * fabric.mesh.size
        ids = np.zeros((rows, 1), np.int32)
        ids[5 * T + 1] = 16

        def program(x: Any, ids: Any, weights: Any) -> Any:
            return jf.moe.dispatch(
                x, ids, weights, axis_name=AXIS, num_experts=16
            ).tokens

        operands = (
            place(fabric.mesh, np.zeros((rows, D), np.float32)),
            place(fabric.mesh, ids),
            place(fabric.mesh, np.ones((rows, 1), np.float32)),
        )
        f = mapped(fabric.mesh, program)
        error, took_s = attempt_now(lambda: f(*operands))
        assert "16" in str(error)
        assert took_s < 5
        assert fabric.failure() is not None


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def settled(count: Callable[[], int], most: int, timeout_s: float = 5) -> int:
    """The count once it is at most `most`, or after the time limit."""
    deadline = time.monotonic() + timeout_s
    while count() > most and time.monotonic() < deadline:
        time.sleep(0.01)
    return count()


def mappings() -> int:
    """Mapped memory of ours."""
    with open("/proc/self/maps") as file:
        return sum("memfd:jaxfabric" in line for line in file)


def threads_of_fabrics() -> int:
    """Native threads that a Fabric has of its own."""
    count = 0
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            with open(f"/proc/self/task/{task}/comm") as file:
                count += file.read().strip() in ("jaxfabric-work", "jaxfabric-shm")
    return count


def shared_memory() -> list[str]:
    return sorted(os.listdir("/dev/shm"))


CYCLES = 50


def no_leaks(fail: bool) -> None:
    mesh = mesh_of_all()
    token = place(mesh, np.zeros(mesh.size, np.float32))
    f = mapped(mesh, lambda t: jf.barrier(AXIS, token=t))
    before: tuple[int, ...] = ()
    gc.collect()  # engines of earlier tests, whose cycles keep their regions mapped
    files, mapped_before = shared_memory(), mappings()
    for cycle in range(CYCLES + 5):
        with jf.Fabric(mesh) as fabric:
            if cycle % 2 == 0:
                jax.block_until_ready(f(token))
            if fail and cycle % 2:
                fabric._native.abort("a test")
        if cycle == 4:  # what is allocated once is there
            settled(threads_of_fabrics, 0)
            before = (count_fds(), len(os.listdir("/proc/self/task")))
    assert settled(threads_of_fabrics, 0) == 0
    assert settled(mappings, mapped_before) <= mapped_before
    assert settled(count_fds, before[0]) <= before[0]
    # XLA's and the elastic pool's threads vary by a few.
    most = before[1] + 8
    assert settled(lambda: len(os.listdir("/proc/self/task")), most) <= most
    assert shared_memory() == files


def test_no_leaks_in_one_process() -> None:
    no_leaks(fail=False)


@pytest.mark.jaxfabric(processes=2)
def test_no_leaks_in_two_processes() -> None:
    no_leaks(fail=False)
    Meeting().gather("done")


def test_no_leaks_after_failures() -> None:
    no_leaks(fail=True)


def test_waiting_without_end_is_noticed() -> None:
    """The watch of these tests works: an attempt that blocks fails the test."""
    forever = threading.Event()
    with pytest.raises(AssertionError, match="still blocked"):
        Attempt(forever.wait).finish(0.1)
    forever.set()
    with pytest.raises(AssertionError, match="went through"):
        Attempt(lambda: jnp.zeros(())).finish(5)
