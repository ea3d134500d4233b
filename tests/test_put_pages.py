"""put_pages against NumPy, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import draw, make_mesh, on_ranks, poisoned, same
from test_primitives import DTYPES, few, fill, transports

import jaxfabric as jf


@transports
@few
@given(
    ranks=st.sampled_from([1, 2, 4]),
    page=st.lists(st.integers(1, 5), max_size=2).map(tuple),
    pages=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_pages_land_where_they_should(
    options: dict[str, Any],
    ranks: int,
    page: tuple[int, ...],
    pages: tuple[int, int],
    dtype: str,
    seed: int,
) -> None:
    """Each rank writes random pages to one other rank; a third of them are padding."""
    rng = np.random.default_rng(seed)
    kind = jnp.dtype(dtype)
    here, there = pages
    dst = rng.permutation(ranks).astype(np.int32)
    x = draw(rng, (ranks, here, *page), kind)
    src_idx = rng.integers(0, here, (ranks, there)).astype(np.int32)
    dst_idx = np.stack([rng.permutation(there) for _ in range(ranks)]).astype(np.int32)
    src_idx[rng.random(src_idx.shape) < 0.2] = -1
    dst_idx[rng.random(dst_idx.shape) < 0.2] = -1
    want = poisoned((ranks, there, *page), kind)
    for s in range(ranks):
        for a, b in zip(src_idx[s], dst_idx[s], strict=True):
            if a >= 0 and b >= 0:
                want[dst[s], b] = x[s, a]

    mesh = make_mesh(ranks)
    with jf.Fabric(mesh, **options) as fabric:
        win = fabric.window((there, *page), kind)

        def program(x: Any, src: Any, to: Any, dst: Any) -> jax.Array:
            token = fill(win, jf.token())
            token = jf.put_pages(
                *(win, x, src, to, dst), axis_name="x", id=3, token=token
            )
            return jf.wait(win, axis_name="x", id=3, count=1, token=token)[0]

        same(mesh, on_ranks(mesh, program)(x, src_idx, dst_idx, dst), want)


def test_a_negative_destination_writes_and_counts_nothing() -> None:
    mesh = make_mesh(2)
    with jf.Fabric(mesh, timeout_s=0.5) as fabric:
        win = fabric.window((2, 4), jnp.int32)

        def program(x: Any, index: Any) -> jax.Array:
            token = jf.put_pages(win, x, index, index, -1, axis_name="x")
            return jf.wait(win, axis_name="x", count=1, token=token)[0]

        with pytest.raises(jax.errors.JaxRuntimeError, match="of which 0 have come"):
            jax.block_until_ready(
                on_ranks(mesh, program)(
                    np.zeros((2, 2, 4), np.int32), np.zeros((2, 1), np.int32)
                )
            )


def _refused(pages: Any, src: Any, to: Any, dst: Any = 0) -> Exception:
    mesh = make_mesh(2)
    with jf.Fabric(mesh) as fabric:
        win = fabric.window((3, 4), jnp.float32)

        def program(x: Any) -> jax.Array:
            token = jf.put_pages(win, pages + x, src, to, dst, axis_name="x")
            return jf.wait(win, axis_name="x", token=token)[0]

        with pytest.raises(Exception) as caught:  # noqa: PT011
            on_ranks(mesh, program)(np.zeros(2, np.float32))
    return caught.value


def ints(*values: int) -> jax.Array:
    return jnp.array(values, jnp.int32)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((jnp.zeros((5, 3)), ints(0), ints(0)), ValueError, r"\(5, 3\) and the window"),
        ((jnp.zeros((5, 4)), ints(0, 1), ints(0)), TypeError, r"must be int32\[2\]"),
        ((jnp.zeros((5, 4)), jnp.zeros(1), ints(0)), TypeError, r"got float32\[1\]"),
        ((jnp.zeros((5, 4)), ints(0), ints(0), 2), ValueError, "dst=2"),
        (
            (jnp.zeros((5, 4)), ints(0, 5), ints(0, 1)),
            jax.errors.JaxRuntimeError,
            "entry 1: page 5 of 5 into page 1 of 3",
        ),
        (
            (jnp.zeros((5, 4)), ints(0), ints(3)),
            jax.errors.JaxRuntimeError,
            "into page 3 of 3",
        ),
        (
            (jnp.zeros((5, 4)), ints(0, 1), ints(2, 2)),
            jax.errors.JaxRuntimeError,
            "page 2 twice",
        ),
    ],
)
def test_refusals(arguments: tuple[Any, ...], error: type, text: str) -> None:
    refused = _refused(*arguments)
    assert isinstance(refused, error)
    assert re.search(text, str(refused)), refused


def test_no_derivative() -> None:
    mesh = make_mesh(1)
    with jf.Fabric(mesh) as fabric:
        win = fabric.window((1, 1), jnp.float32)

        def loss(x: Any) -> jax.Array:
            index = ints(0)
            token = jf.put_pages(win, x, index, index, 0, axis_name="x")
            return jf.wait(win, axis_name="x", token=token)[0].sum()

        with pytest.raises(NotImplementedError, match="no derivative"):
            on_ranks(mesh, jax.grad(loss))(np.zeros((1, 1, 1), np.float32))
