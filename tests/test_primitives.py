"""window, put, wait, scatter, exchange, barrier against NumPy."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from ranks import draw, make_mesh, on_ranks, poison, poisoned, same

import jaxfabric as jf

N = 8
DTYPES = [
    *("float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool"),
    *("complex64", "float8_e4m3fn", "uint16"),
]
# Bounded, since every example compiles; no deadline, since machines are slow.
few = settings(max_examples=12, deadline=None, derandomize=True)
transports = pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "transport": "fake",
            "chaos": {"seed": 3, "pieces_max": 4, "delay_max_s": 2e-4},
            "mailbox_bytes": 1 << 16,
            "window_bytes": 1 << 16,
        },
    ],
    ids=["shm", "fake"],
)


def fill(win: jf.Window, token: jax.Array) -> jax.Array:
    """Fills this rank's region with POISON by a put to itself."""
    raw = jnp.asarray(poisoned(win.shape, win.dtype))
    token = jf.put(win, raw, lax.axis_index("x"), axis_name="x", id=255, token=token)
    _, token = jf.wait(win, axis_name="x", id=255, token=token)
    return jf.barrier("x", token=token)


@transports
@few
@given(
    ranks=st.sampled_from([1, 2, 3, 8]),
    puts=st.integers(1, 4),
    items=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_put_and_wait(
    options: dict[str, Any], ranks: int, puts: int, items: int, dtype: str, seed: int
) -> None:
    """Traced destinations and offsets, negative ones and the rank itself among them.

    Put j of each rank goes along a random permutation, or nowhere. Whoever is left
    without one puts to itself, so that each rank can wait for as many.
    """
    rng = np.random.default_rng(seed)
    kind = jnp.dtype(dtype)
    goes = np.stack([rng.permutation(ranks) for _ in range(puts)], axis=1)
    goes[rng.random(goes.shape) < 0.3] = -1
    hit = np.stack([np.isin(np.arange(ranks), column) for column in goes.T], axis=1)
    own = np.where(hit, -1, np.arange(ranks)[:, None])
    dst = np.concatenate([goes, own], axis=1).astype(np.int32)
    # Each source and put has a place of its own in the window, in random order.
    place = rng.permutation(ranks * 2 * puts).reshape(ranks, 2 * puts)
    offset = (place * items).astype(np.int32)
    x = draw(rng, (ranks, 2 * puts, items), kind)
    ids = rng.integers(0, 3, puts)
    want = poisoned((ranks, ranks * 2 * puts * items + 3), kind)
    for source, j in np.argwhere(dst >= 0):
        at = offset[source, j]
        want[dst[source, j], at : at + items] = x[source, j]

    mesh = make_mesh(ranks)
    with jf.Fabric(mesh, **options) as fabric:
        win = fabric.window(want.shape[1], kind)

        def program(x: Any, dst: Any, offset: Any) -> jax.Array:
            token = fill(win, jf.token())
            for j in range(2 * puts):
                token = jf.put(
                    *(win, x[j], dst[j]),
                    axis_name="x",
                    offset=offset[j],
                    id=int(ids[j % puts]),
                    token=token,
                )
            for id in set(ids.tolist()):
                y, token = jf.wait(
                    *(win,),
                    axis_name="x",
                    id=id,
                    count=int((ids == id).sum()),
                    token=token,
                )
            return y

        run = on_ranks(mesh, program)
        poison(mesh, want)
        for _ in range(2):
            same(mesh, run(x, dst, offset), want)


@transports
@few
@given(
    ranks=st.sampled_from([1, 2, 8]),
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_scatter(
    options: dict[str, Any], ranks: int, shape: tuple[int, ...], dtype: str, seed: int
) -> None:
    """Rank s sends slice i to rank i if (i - s) mod N is in a random set."""
    rng = np.random.default_rng(seed)
    kind = jnp.dtype(dtype)
    items = int(np.prod(shape))
    steps = np.flatnonzero(rng.random(ranks) < 0.7)
    x = draw(rng, (ranks, ranks, *shape), kind)
    sends = np.isin((np.arange(ranks) - np.arange(ranks)[:, None]) % ranks, steps)
    place = rng.permutation(ranks)[:, None] * items
    offsets = np.where(sends, place, -1).astype(np.int32)
    want = poisoned((ranks, ranks * items), kind)
    for s, i in np.argwhere(sends):
        want[i, offsets[s, i] : offsets[s, i] + items] = x[s, i].reshape(-1)

    mesh = make_mesh(ranks)
    with jf.Fabric(mesh, **options) as fabric:
        win = fabric.window(want.shape[1], kind)

        def program(x: Any, offsets: Any) -> jax.Array:
            token = fill(win, jf.token())
            token = jf.scatter(win, x, offsets, axis_name="x", token=token)
            return jf.wait(win, axis_name="x", count=len(steps), token=token)[0]

        same(mesh, on_ranks(mesh, program)(x, offsets), want)


@transports
@few
@given(
    ranks=st.sampled_from([1, 2, 8]),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_exchange(
    options: dict[str, Any], ranks: int, shape: tuple[int, ...], dtype: str, seed: int
) -> None:
    """Three exchanges along partial permutations, with nothing that orders them."""
    rng = np.random.default_rng(seed)
    x = draw(rng, (ranks, 3, *shape), jnp.dtype(dtype))
    perms = []
    for _ in range(3):
        pairs = enumerate(rng.permutation(ranks).tolist())
        perms.append([pair for pair in pairs if rng.random() < 0.8])
    want = np.zeros_like(x)
    for i, perm in enumerate(perms):
        for source, destination in perm:
            want[destination, i] = x[source, i]

    def program(x: Any) -> jax.Array:
        swapped = [
            jf.exchange(x[i], perm, axis_name="x")[0] for i, perm in enumerate(perms)
        ]
        return jnp.stack(swapped)

    mesh = make_mesh(ranks)
    with jf.Fabric(mesh, **options):
        run = on_ranks(mesh, program)
        poison(mesh, x)
        same(mesh, run(x), want)


@pytest.mark.smoke
def test_large_exchange_through_a_small_mailbox() -> None:
    """As many messages as wait for credit: 40 of a third of a mailbox each."""
    mesh = make_mesh(4)
    x = draw(np.random.default_rng(0), (4, 40, 5000), np.int32)
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def program(x: Any) -> jax.Array:
        return jnp.stack([jf.exchange(row, ring, axis_name="x")[0] for row in x])

    with jf.Fabric(mesh, mailbox_bytes=60_000):
        same(mesh, on_ranks(mesh, program)(x), np.roll(x, 1, axis=0))


@transports
def test_counts_carry_over(options: dict[str, Any]) -> None:
    """From one wait to the next, also when that is in another program; by id."""
    mesh = make_mesh(4)
    x = np.arange(4 * 3, dtype=np.float32).reshape(4, 3)
    with jf.Fabric(mesh, **options) as fabric:
        win = fabric.window(6, np.float32)

        def send(x: Any) -> jax.Array:
            right = (lax.axis_index("x") + 1) % 4
            token = jf.token()
            for i in range(3):
                token = jf.put(
                    *(win, x[i : i + 1], right),
                    axis_name="x",
                    offset=i,
                    id=7,
                    token=token,
                )
            return jf.put(win, x, right, axis_name="x", offset=3, id=8, token=token)

        def receive(count: int, id: int) -> Any:
            def program(x: Any) -> jax.Array:
                return jf.wait(win, axis_name="x", id=id, count=count)[0]

            return on_ranks(mesh, program)

        on_ranks(mesh, send)(x)
        receive(2, 7)(x)
        late = receive(1, 8)(x)
        got = receive(1, 7)(x)
        left = np.roll(x, 1, axis=0)
        np.testing.assert_array_equal(np.asarray(late)[:, 3:], left)
        np.testing.assert_array_equal(np.asarray(got)[:, :3], left)

        # Nothing is left, so one more wait runs into its time limit.
        def starve(x: Any) -> jax.Array:
            return jf.wait(win, axis_name="x", id=7, timeout_s=0.3)[0]

        with pytest.raises(jax.errors.JaxRuntimeError, match="of which 0 have come"):
            on_ranks(mesh, starve)(x)
        assert isinstance(fabric.failure(), jf.DeadlineError)


@pytest.mark.smoke
def test_windows_and_ids_are_apart() -> None:
    """Four windows of different dtypes and shapes, filled in one program."""
    mesh = make_mesh(N)
    kinds = [((3, 5), "float32"), ((7,), "int8"), ((2, 2, 2), "bfloat16"), ((), "bool")]
    rng = np.random.default_rng(1)
    data = [draw(rng, (N, *shape), jnp.dtype(dtype)) for shape, dtype in kinds]
    with jf.Fabric(mesh) as fabric:
        windows = [fabric.window(*kind) for kind in kinds]
        assert [w.shape for w in windows] == [shape for shape, _ in kinds]

        def program(*operands: Any) -> Any:
            me = lax.axis_index("x")
            tokens = [
                jf.put(win, x, (me + shift) % N, axis_name="x", id=9)
                for shift, (win, x) in enumerate(zip(windows, operands, strict=True))
            ]
            return [
                jf.wait(win, axis_name="x", id=9, token=token)[0]
                for win, token in zip(windows, tokens, strict=True)
            ]

        got = on_ranks(mesh, program)(*data)
        for shift, (y, x) in enumerate(zip(got, data, strict=True)):
            same(mesh, y, np.roll(x, shift, axis=0))


def test_windows_start_as_zeros_and_wait_for_none_reads() -> None:
    mesh = make_mesh(2)
    with jf.Fabric(mesh) as fabric:
        win = fabric.window((2, 3), np.int32)

        def program(x: Any) -> jax.Array:
            return jf.wait(win, axis_name="x", count=0)[0] + x

        x = np.ones((2, 1), np.int32)
        same(mesh, on_ranks(mesh, program)(x), np.ones((2, 2, 3), np.int32))


@pytest.mark.parametrize("late", [0, 5])
def test_barrier(late: int) -> None:
    """Nobody leaves before the last has come."""
    mesh = make_mesh(N)
    came = np.zeros(N)
    left = np.zeros(N)

    def come(rank: Any, token: Any) -> Any:
        time.sleep(0.15 * (int(rank) == late))
        came[int(rank)] = time.monotonic()
        return np.asarray(token)

    def leave(rank: Any, token: Any) -> Any:
        left[int(rank)] = time.monotonic()
        return np.asarray(token)

    def program(x: Any) -> jax.Array:
        me = lax.axis_index("x")
        token = lax.pcast(jf.token(), "x", to="varying")
        token = jax.pure_callback(come, jax.typeof(token), me, token)
        token = jf.barrier("x", token=token)
        return jax.pure_callback(leave, jax.typeof(token), me, token) + x

    with jf.Fabric(mesh):
        run = on_ranks(mesh, program)
        for _ in range(3):
            jax.block_until_ready(run(np.zeros((N, 1), np.float32)))
            assert came.max() <= left.min()


MESHES = [
    ((8,), ("x",), "x", None),
    ((8,), ("x",), "x", (3, 1, 4, 0, 5, 2, 7, 6)),
    ((2, 4), ("d", "x"), "x", None),
    ((4, 2), ("x", "d"), "x", None),
    ((2, 4), ("d", "x"), ("d", "x"), None),
    ((2, 4), ("d", "x"), ("x", "d"), None),
    ((2, 2, 2), ("a", "b", "c"), ("c", "a"), (7, 2, 0, 6, 1, 3, 5, 4)),
    ((2, 3), ("d", "x"), "x", (6, 0, 3, 5, 1, 7)),
]


@pytest.mark.parametrize(("sizes", "names", "axis", "order"), MESHES)
@pytest.mark.parametrize("explicit", [False, True])
def test_meshes(sizes: Any, names: Any, axis: Any, order: Any, explicit: bool) -> None:
    """Axes beside others, tuples, permuted devices; each group is on its own."""
    axes = (axis,) if isinstance(axis, str) else axis
    others = [name for name in names if name not in axes]
    every = int(np.prod(sizes))
    grid = np.arange(every).reshape(sizes)
    groups = grid.transpose([names.index(a) for a in (*others, *axes)])
    n = int(np.prod([sizes[names.index(a)] for a in axes]))
    groups = groups.reshape(-1, n)

    x = np.arange(every * n, dtype=np.int32).reshape(every, n)
    shifted, transposed = np.zeros_like(x), np.zeros_like(x)
    for group in groups:
        shifted[group] = np.roll(x[group], 1, axis=0)
        transposed[group] = x[group].T
    mesh = make_mesh(sizes, names, order=order, explicit=explicit)
    ring = [(i, (i + 1) % n) for i in range(n)]
    with jf.Fabric(mesh) as fabric:
        win = fabric.window(n, np.int32)

        def program(x: Any) -> Any:
            me = lax.axis_index(axis)
            offsets = jnp.full(n, me, jnp.int32)
            token = jf.scatter(win, x[:, None], offsets, axis_name=axis)
            a, token = jf.wait(win, axis_name=axis, count=n, token=token)
            token = jf.barrier(axis, token=token)
            token = jf.put(win, x, (me + 1) % n, axis_name=axis, token=token)
            b, token = jf.wait(win, axis_name=axis, token=token)
            return a, b, jf.exchange(x, ring, axis_name=axis, token=token)[0]

        a, b, c = on_ranks(mesh, program)(x)
        same(mesh, a, transposed)
        same(mesh, b, shifted)
        same(mesh, c, shifted)


def joint_program(n: int) -> None:
    """put, scatter, exchange and barrier over all devices of all processes."""
    mesh = make_mesh(n)
    rng = np.random.default_rng(4)
    x = draw(rng, (n, n, 3), jnp.bfloat16)
    perm = list(enumerate(rng.permutation(n).tolist()))
    want = np.zeros_like(x)
    for source, destination in perm:
        want[destination] = x[source]
    with jf.Fabric(mesh) as fabric:
        win = fabric.window((n, 3), jnp.bfloat16)

        def program(x: Any) -> Any:
            me = lax.axis_index("x")
            token = fill(win, jf.token())
            offsets = jnp.full(n, me * 3, jnp.int32)
            token = jf.scatter(win, x, offsets, axis_name="x", token=token)
            a, token = jf.wait(win, axis_name="x", count=n, token=token)
            token = jf.barrier("x", token=token)
            token = jf.put(win, x[0], me, axis_name="x", offset=3, token=token)
            token = jf.put(win, x[1], -1 - me, axis_name="x", token=token)
            b, token = jf.wait(win, axis_name="x", token=token)
            return a, b[1], jf.exchange(x, perm, axis_name="x", token=token)[0]

        run = on_ranks(mesh, program)
        poison(mesh, x)
        for _ in range(5):
            a, b, c = run(x)
            same(mesh, a, x.transpose(1, 0, 2))
            same(mesh, b, x[:, 0])
            same(mesh, c, want)
        assert fabric.failure() is None
        assert all(peer["up"] for peer in fabric.peers().values())


@pytest.mark.smoke
@pytest.mark.jaxfabric(processes=4)
def test_four_processes() -> None:
    joint_program(4)


@pytest.mark.jaxfabric(processes=2, devices_per_process=2)
def test_two_processes_of_two_devices() -> None:
    joint_program(4)


@pytest.mark.jaxfabric(processes=2, devices_per_process=2)
def test_processes_in_a_permuted_mesh() -> None:
    """Ranks of the two processes alternate, beside an axis that is not used."""
    mesh = make_mesh((2, 2), ("d", "x"), order=(0, 2, 3, 1))
    x = draw(np.random.default_rng(5), (4, 6), np.int32)
    with jf.Fabric(mesh):

        def program(x: Any) -> jax.Array:
            return jf.exchange(x, [(0, 1), (1, 0)], axis_name="x")[0]

        same(mesh, on_ranks(mesh, program)(x), x[[1, 0, 3, 2]])
