"""Bad arguments: each gets one clear error that names it, where it is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ranks import make_mesh, on_ranks

import jaxfabric as jf

N = 4
X = np.zeros((N, 6), np.float32)
Call = Callable[[jf.Window, Any], Any]


def put(win: jf.Window, x: Any, dst: Any = 0, **kwargs: Any) -> Any:
    return jf.put(win, x, dst, axis_name="x", **kwargs)


def scatter(win: jf.Window, x: Any, offsets: Any, **kwargs: Any) -> Any:
    return jf.scatter(win, x, offsets, axis_name="x", **kwargs)


def wait(win: jf.Window, **kwargs: Any) -> Any:
    return jf.wait(win, axis_name="x", **kwargs)[0]


def exchange(x: Any, perm: Any, **kwargs: Any) -> Any:
    return jf.exchange(x, perm, **{"axis_name": "x", **kwargs})[0]


def zeros(*shape: int) -> Any:
    return jnp.zeros(shape, jnp.int32)


STATIC: list[tuple[str, Call, type[Exception], str]] = [
    (
        "dtype",
        lambda w, x: put(w, x.astype(jnp.int32)),
        TypeError,
        "x is int32 but the",
    ),
    ("large", lambda w, x: put(w, jnp.zeros(9)), ValueError, "9 elements do not fit"),
    ("window", lambda w, x: put(x, x), TypeError, "win must be made by fabric.window"),
    ("dst", lambda w, x: put(w, x, N), ValueError, f"dst={N}, but axis .* size {N}"),
    (
        "dst shape",
        lambda w, x: put(w, x, zeros(2)),
        TypeError,
        "dst must be an integer",
    ),
    ("dst float", lambda w, x: put(w, x, 1.0), TypeError, "dst must be .*float32"),
    (
        "offset float",
        lambda w, x: put(w, x, offset=jnp.float32(1)),
        TypeError,
        "offset must be",
    ),
    ("offset", lambda w, x: put(w, x, offset=3), ValueError, "offset=3"),
    ("offset < 0", lambda w, x: put(w, x, offset=-1), ValueError, "offset=-1"),
    (
        "dst numpy",
        lambda w, x: put(w, x, np.int64(N)),
        ValueError,
        f"dst={N}, but axis .* size {N}",
    ),
    (
        "dst wraps",
        lambda w, x: put(w, x, np.array(2**32 + 1)),
        ValueError,
        "dst holds 4294967297, beyond int32",
    ),
    (
        "offset numpy",
        lambda w, x: put(w, x, offset=np.int64(2**32)),
        ValueError,
        "offset=4294967296",
    ),
    (
        "offsets wrap",
        lambda w, x: scatter(w, x[:4], np.array([0, 0, 0, 2**32])),
        ValueError,
        "dst_offsets holds 4294967296",
    ),
    ("id float", lambda w, x: put(w, x, id=1.7), TypeError, "float"),
    (
        "packed",
        lambda w, x: exchange(x.astype(jnp.int4), []),
        TypeError,
        "pack elements of int4, 2 to a byte",
    ),
    ("id", lambda w, x: put(w, x, id=256), ValueError, "id=256 must be in 0..255"),
    ("id < 0", lambda w, x: wait(w, id=-1), ValueError, "id=-1 must be in 0..255"),
    ("count", lambda w, x: wait(w, count=-1), ValueError, "count=-1 must be in"),
    ("count big", lambda w, x: wait(w, count=1 << 31), ValueError, "count=2147483648"),
    ("timeout", lambda w, x: wait(w, timeout_s=0), ValueError, "timeout_s=0 must be"),
    (
        "timeout without end",
        lambda w, x: wait(w, timeout_s=np.inf),
        ValueError,
        r"timeout_s=inf must be above 0 seconds and at most 1e\+09",
    ),
    ("key", lambda w, x: wait(w, key=[]), TypeError, r"key=\[\] must be hashable"),
    (
        "token",
        lambda w, x: put(w, x, token=jnp.zeros(2)),
        TypeError,
        r"token must be float32\[1\].*float32\[2\]",
    ),
    (
        "token dtype",
        lambda w, x: jf.barrier("x", token=zeros(1)),
        TypeError,
        r"jf.token\(\) makes it, got int32\[1\]",
    ),
    ("slices", lambda w, x: scatter(w, x, zeros(N)), ValueError, r"x has shape \(6,\)"),
    (
        "offsets",
        lambda w, x: scatter(w, x[:4], zeros(3)),
        TypeError,
        r"dst_offsets must be int32\[4\], got int32\[3\]",
    ),
    (
        "offsets float",
        lambda w, x: scatter(w, x[:4], jnp.zeros(4)),
        TypeError,
        r"must be int32\[4\], got float32\[4\]",
    ),
    (
        "slice large",
        lambda w, x: scatter(w, jnp.zeros((4, 9)), zeros(4)),
        ValueError,
        "9 elements do not fit a window of 8",
    ),
    (
        "source twice",
        lambda w, x: exchange(x, [(0, 1), (0, 2)]),
        ValueError,
        "names a source twice",
    ),
    (
        "destination twice",
        lambda w, x: exchange(x, [(0, 1), (2, 1)]),
        ValueError,
        "names a destination twice",
    ),
    (
        "destination",
        lambda w, x: exchange(x, [(0, 4)]),
        ValueError,
        "names destination 4, but axis .* has size 4",
    ),
    (
        "source < 0",
        lambda w, x: exchange(x, [(-1, 0)]),
        ValueError,
        "names source -1",
    ),
    (
        "axis",
        lambda w, x: exchange(x, [], axis_name="y"),
        ValueError,
        "axis 'y' is not in the mesh, whose axes are .*'x'",
    ),
    (
        "axis type",
        lambda w, x: exchange(x, [], axis_name=()),
        TypeError,
        "axis_name must be a mesh axis or a tuple",
    ),
]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [pytest.param(*row[1:], id=row[0]) for row in STATIC],
)
def test_static(call: Call, kind: type[Exception], message: str) -> None:
    mesh = make_mesh(N)
    with jf.Fabric(mesh) as fabric:
        win = fabric.window(8, np.float32)
        with pytest.raises(kind, match=message):
            on_ranks(mesh, lambda x: call(win, x))(X)


def test_no_fabric_and_no_axis_of_a_fabric() -> None:
    mesh = make_mesh(N)
    with pytest.raises(jf.FabricError, match="no open Fabric has axis"):
        on_ranks(mesh, lambda x: exchange(x, []))(X)


TRACED: list[tuple[str, Call, str]] = [
    ("dst", lambda w, x: put(w, x, 4 + x[0].astype(int)), "dst=4 on an axis of size 4"),
    (
        "offset",
        lambda w, x: put(w, x, offset=3 + x[0].astype(int)),
        "offset=3 and 6 elements do not fit a window of 8",
    ),
    (
        "offset < 0",
        lambda w, x: put(w, x, offset=x[0].astype(int) - 1),
        "offset=-1 and 6 elements do not fit",
    ),
    (
        "scatter",
        lambda w, x: scatter(w, x[:4], zeros(4) + 8),
        "offset=8 and 1 elements do not fit",
    ),
]


@pytest.mark.parametrize(
    ("call", "message"), [pytest.param(*row[1:], id=row[0]) for row in TRACED]
)
def test_traced(call: Call, message: str) -> None:
    """Known only when the program runs; the error says which call and which value."""
    mesh = make_mesh(N)
    with jf.Fabric(mesh) as fabric:
        win = fabric.window(8, np.float32)
        with pytest.raises(jax.errors.JaxRuntimeError, match=message) as error:
            on_ranks(mesh, lambda x: call(win, x))(X)
        assert "call 0)" in str(error.value)
        assert fabric.failure() is not None


def test_one_rank_with_a_bad_value_ends_the_others_at_once() -> None:
    """They wait for a message that never comes, and are told so."""
    mesh = make_mesh(N)
    with jf.Fabric(mesh) as fabric:
        win = fabric.window(8, np.float32)

        def program(x: Any) -> Any:
            me = jax.lax.axis_index("x")
            token = put(win, x, jnp.where(me == 2, 9, (me + 1) % N))
            return wait(win, token=token)

        with pytest.raises(jax.errors.JaxRuntimeError, match="dst=9 on an axis"):
            on_ranks(mesh, program)(X)
        assert "dst=9" in str(fabric.failure())


def test_a_time_limit_of_a_call() -> None:
    mesh = make_mesh(N)
    with jf.Fabric(mesh) as fabric:
        win = fabric.window(8, np.float32)
        with pytest.raises(
            jax.errors.JaxRuntimeError,
            match=r"wait \(jit_\S+, call 0\): 0\.\d s into a time limit of 0.3 s.*"
            r"2 transfers .* of which 0 have come.*larger timeout_s=",
        ):
            on_ranks(mesh, lambda x: wait(win, count=2, timeout_s=0.3))(X)
        assert isinstance(fabric.failure(), jf.DeadlineError)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "text"),
    [
        ((-1,), np.float32, ValueError, "a length below zero"),
        ((-1, -2), np.float32, ValueError, "a length below zero"),
        ((2.5,), np.float32, TypeError, "float"),
        ((2,), "U5", TypeError, "dtype <U5|not a valid"),
        ((2,), jnp.int4, TypeError, "pack elements of int4"),
        ((2,), jnp.float4_e2m1fn, TypeError, "pack elements of float4_e2m1fn"),
    ],
)
def test_windows_that_cannot_be(
    shape: Any, dtype: Any, error: type[Exception], text: str
) -> None:
    with jf.Fabric(make_mesh(N)) as fabric, pytest.raises(error, match=text):
        fabric.window(shape, dtype)


def test_known_wrapping_offsets_are_refused_with_x64() -> None:
    """int64 that the program computes: some numbers would wrap."""
    mesh = make_mesh(N)
    with jax.enable_x64(True), jf.Fabric(mesh) as fabric:
        win = fabric.window((8,), jnp.float32)
        program = on_ranks(
            mesh,
            lambda x: put(win, x, offset=jnp.int64(0) + x.astype(jnp.int64)[0]),
        )
        with pytest.raises(TypeError, match="offset is int64"):
            program(X)


def test_random_keys_are_exchanged() -> None:
    mesh = make_mesh(N)
    keys = jax.random.split(jax.random.key(7), N)
    ring = [(i, (i + 1) % N) for i in range(N)]
    with jf.Fabric(mesh):
        got = on_ranks(mesh, lambda x: exchange(x, ring))(keys)
    want = np.roll(jax.random.key_data(keys), 1, axis=0)
    np.testing.assert_array_equal(jax.random.key_data(got), want)
