"""e4m3 with block scales on the wire: bits, gradients, refusals.

The oracle is NumPy with ml_dtypes, a block at a time, from the rules in
jaxfabric/moe/_plan.py.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import moe_oracle
import numpy as np
import pytest
from fabric_cases import AXIS, local_rows, mapped, mesh_of_all, place
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import (
    IMPLEMENTATIONS,
    data,
    make_mesh,
    on_ranks,
    open_fabric,
)

import jaxfabric as jf
from jaxfabric.moe import _wire

N, T, K, E = 4, 5, 3, 8
DTYPES = {"f32": np.float32, "bf16": jnp.bfloat16, "f16": np.float16}
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# No multiple of 128, of 4, or of anything; one element; a row of one block.
HIDDEN = (1, 128, 259)


def quantize(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A row's payload, float8_e4m3fn[D], and scales, float32[ceil(D/128)]."""
    payload, scales = [], []
    for begin in range(0, len(row), 128):
        block = row[begin : begin + 128].astype(np.float32)
        if not np.isfinite(block).all():
            payload.append(np.full(len(block), 0x7F, np.uint8).view(E4M3))
            scales.append(np.float32(np.nan))
            continue
        amax = np.maximum(np.abs(block).max(), np.float32(2.0**-100))
        with np.errstate(under="ignore"):
            payload.append((block * (np.float32(448) / amax)).astype(E4M3))
        scales.append(amax * np.float32(1 / 448))
    return np.concatenate(payload), np.array(scales, np.float32)


def dequantize(payload: np.ndarray, scales: np.ndarray, dtype: Any) -> np.ndarray:
    """The row that its receiver sees."""
    with np.errstate(over="ignore"):
        scale = np.repeat(scales, 128)[: len(payload)]
        return (payload.astype(np.float32) * scale).astype(dtype)


def through_wire(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All rows of x[..., D]: payload, scales, and what is seen of them."""
    flat = x.reshape(-1, x.shape[-1])
    pairs = [quantize(row) for row in flat]
    seen = [dequantize(p, s, x.dtype) for p, s in pairs]

    def whole(rows: list[np.ndarray]) -> np.ndarray:
        return np.stack(rows).reshape(*x.shape[:-1], -1)

    return whole([p for p, _ in pairs]), whole([s for _, s in pairs]), whole(seen)


def same(got: Any, want: np.ndarray) -> None:
    """Equal bits; a NaN equals any other, but for those of the payload."""
    got = np.asarray(got)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if got.dtype != E4M3:
        nan = np.isnan(want)
        assert (np.isnan(got) == nan).all()
        got, want = np.where(nan, 0, got), np.where(nan, 0, want)
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


@st.composite
def numbers(draw: st.DrawFn, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Blocks of very different sizes, rounding boundaries, and what is special."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = (-14, 15) if dtype == np.float16 else (-126, 126)
    exponents = draw(st.lists(st.integers(low, high), min_size=1, max_size=4))
    x = rng.normal(size=shape) * np.exp2(rng.choice(exponents, (*shape[:-1], 1)))
    if draw(st.booleans()):  # as few bits as make ties with a power of two as amax
        x = np.exp2(exponents[0]) * rng.integers(-448, 449, shape) / 448 * 1.75
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, float(jnp.finfo(dtype).max)]
    special += [float(jnp.finfo(dtype).smallest_subnormal), 448.0, 464.0]
    spots = st.tuples(st.integers(0, x.size - 1), st.sampled_from(special))
    for index, value in draw(st.lists(spots, max_size=6)):
        x.flat[index] = value
    if draw(st.booleans()):
        x[..., :128] = 0
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(np.float32).astype(dtype)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(DTYPES)), st.sampled_from(HIDDEN))
def test_the_reference_quantizes_as_written(
    source: st.DataObject, dtype: str, hidden: int
) -> None:
    x = source.draw(numbers((7, hidden), DTYPES[dtype]))
    payload, scales, seen = through_wire(x)
    got = quantized(x)
    same(_wire.as_e4m3(got[0]), payload)
    same(got[1], scales)
    same(got[2], seen)


@jax.jit
def quantized(x: jax.Array) -> tuple[jax.Array, ...]:
    """What `_wire` makes of x, there and back."""
    payload, scales = _wire.quantize(x)
    return payload, scales, _wire.dequantize(payload, scales, x.dtype)


def test_the_reciprocal_is_rounded_to_nearest() -> None:
    rng = np.random.default_rng(0)
    amax = np.exp2(rng.uniform(-100, 127.9, 200_000)).astype(np.float32)
    ends = [2.0**-100, 1.75, 448.0, 447.99997, 448.00003, 3.4028235e38, 1.0]
    amax = np.concatenate([amax, np.array(ends, np.float32)])
    same(jax.jit(_wire._reciprocal)(amax), np.float32(448) / amax)


def test_error_and_extremes() -> None:
    """The docstring's bound, and blocks worth knowing, by hand."""
    x = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    seen = through_wire(x)[2]
    bound = np.abs(x) / 16
    amax = np.abs(x).reshape(64, 2, 128).max(-1).repeat(128, 1)
    assert (np.abs(seen - x) <= 1.00001 * np.maximum(bound, amax * 2.0**-18)).all()
    payload, scales = quantize(np.array([448, -448, 1, 0, -0.0], np.float32))
    assert payload.view(np.uint8).tolist() == [0x7E, 0xFE, 0x38, 0x00, 0x80]
    assert scales.tolist() == [1.0]
    zero = quantize(np.zeros(3, np.float32))
    assert zero[1][0] == np.float32(2.0**-100) * np.float32(1 / 448)
    lost = quantize(np.array([1, np.inf], np.float32))
    assert lost[0].view(np.uint8).tolist() == [0x7F, 0x7F]


# --- Through dispatch --------------------------------------------------------


def dispatch(x: Any, ids: Any, weights: Any, **options: Any) -> jf.moe.Dispatched:
    options = {"wire_dtype": jnp.float8_e4m3fn, "num_experts": E} | options
    if options.pop("halves", False):
        pending = jf.moe.dispatch_start(x, ids, weights, axis_name=AXIS, **options)
        return jf.moe.dispatch_done(pending)
    return jf.moe.dispatch(x, ids, weights, axis_name=AXIS, **options)


def all_forms(x: Any, ids: Any, weights: Any, **options: Any) -> dict[str, Any]:
    """Seen and kept, repeated and once, in both halves, with capacity and padding."""
    forms: dict[str, dict[str, Any]] = {
        "seen": {"zero_tail": True},
        "seen once": {"expand": False},
        "kept": {"dequantize": False},
        "kept once": {"dequantize": False, "expand": False, "halves": True},
        "few": {"capacity": 7, "expert_alignment": 4, "halves": True},
    }
    found = {}
    for name, form in forms.items():
        d = dispatch(x, ids, weights, key=name, **form, **options)
        assert (d.scales is None) == ("kept" not in name)
        found[name] = (d.tokens,) if d.scales is None else (d.tokens, d.scales)
    return found


def expected(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """`all_forms` of all ranks, [N, ...]."""
    payload, scales, seen = through_wire(x)

    def rows(of: np.ndarray, **options: Any) -> np.ndarray:
        outs = moe_oracle.dispatch(of, ids, weights, E, **options)
        return np.stack([out.tokens for out in outs])

    once: dict[str, Any] = {"expand": False}
    return {
        "seen": (rows(seen),),
        "seen once": (rows(seen, **once),),
        "kept": (rows(payload), rows(scales)),
        "kept once": (rows(payload, **once), rows(scales, **once)),
        "few": (rows(seen, capacity=7, alignment=4),),
    }


def poison(mesh: Any, want: dict[str, Any]) -> None:
    """Leaves NaNs in memory that the results will get: nothing may shine through."""
    for parts in want.values():
        for part in parts:
            raw = np.full((N, part[0].nbytes), 0xFF, np.uint8)
            place(mesh, raw).block_until_ready().delete()


@functools.cache
def compiled(implementation: str, hidden: int, dtype: str) -> Any:
    """all_forms on 4 ranks of a process; the name and sizes are only the key."""
    mesh = make_mesh(N)
    return mesh, on_ranks(
        mesh, functools.partial(all_forms, implementation=implementation)
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("hidden", "dtype"), [(259, "bf16"), (128, "f16"), (1, "f32")])
def test_dispatch_gives_these_bits(
    implementation: str, hidden: int, dtype: str
) -> None:
    mesh, run = compiled(implementation, hidden, dtype)

    @settings(max_examples=10, deadline=None)
    @given(
        numbers((N, T, hidden), DTYPES[dtype]),
        st.sampled_from(moe_oracle.ROUTINGS),
        st.integers(0, 99),
    )
    def check(x: np.ndarray, kind: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        ids = moe_oracle.routing(kind, rng, N, T, K, E)
        weights = rng.random((N, T, K)).astype(np.float32)
        want = expected(x, ids, weights)
        poison(mesh, want)
        for name, parts in run(x, ids, weights).items():
            for got, part in zip(parts, want[name], strict=True):
                same(got, part)

    with open_fabric(implementation, mesh):
        check()


def check_over_processes(*implementations: str) -> None:
    """The bits of the oracle on whatever processes and devices."""
    ranks = jax.device_count()
    mesh = mesh_of_all()
    programs = [
        mapped(mesh, functools.partial(all_forms, implementation=implementation))
        for implementation in implementations
    ]
    rng = np.random.default_rng(5)
    with jf.Fabric(mesh):
        for kind in ("random", "skips", "uneven"):
            x, weights = data(rng, ranks, T, 259, K, jnp.bfloat16)
            ids = moe_oracle.routing(kind, rng, ranks, T, K, E)
            want = expected(x, ids, weights)
            flat = [place(mesh, a.reshape(-1, a.shape[-1])) for a in (x, ids, weights)]
            for results in (program(*flat) for program in programs):
                for name, parts in results.items():
                    for got, part in zip(parts, want[name], strict=True):
                        part = part.reshape(-1, part.shape[-1])
                        for first, rows in local_rows(got).items():
                            same(rows, part[first : first + len(rows)])


@pytest.mark.jaxfabric(processes=2)
def test_bits_on_2_processes() -> None:
    check_over_processes("fabric", "reference")


@pytest.mark.jaxfabric(processes=4)
def test_bits_on_4_processes() -> None:
    check_over_processes("fabric")


# --- Gradients ---------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_pass_straight_through(implementation: str) -> None:
    """A function that is linear in the rows has the gradients of the plain call.

    Those of the routing weights see the quantised rows.
    """
    rng = np.random.default_rng(2)
    x, weights = data(rng, N, T, 130, K)
    ids = moe_oracle.routing("skips", rng, N, T, K, E)
    scale = rng.normal(size=(N, T, 130)).astype(np.float32)
    mesh = make_mesh(N)

    def gradients(wire_dtype: Any, x: Any, ids: Any, weights: Any, scale: Any) -> Any:
        def loss(x: Any, weights: Any) -> Any:
            options = {"wire_dtype": wire_dtype, "implementation": implementation}
            d = dispatch(x, ids, weights, **options)
            return (jf.moe.combine(d.tokens, d.plan) * scale).sum()

        return jax.grad(loss, (0, 1))(x, weights)

    def both(*operands: Any) -> Any:
        wires = (None, jnp.float8_e4m3fn)
        return [gradients(wire, *operands) for wire in wires]

    with open_fabric(implementation, mesh):
        plain, scaled = on_ranks(mesh, both)(x, ids, weights, scale)
    same(scaled[0], plain[0])
    seen = through_wire(x)[2]
    dots = np.einsum("ntd,ntd->nt", seen, scale)[..., None] * (ids >= 0)
    np.testing.assert_allclose(scaled[1], dots, rtol=1e-4, atol=1e-4)
    assert np.abs(scaled[1] - plain[1]).max() > 1e-3


def test_kept_rows_have_no_gradient() -> None:
    x, weights = jnp.ones((T, 8)), jnp.ones((T, K))
    ids = jnp.zeros((T, K), jnp.int32) + jnp.arange(K)
    mesh = make_mesh(N)

    def program(stop: bool) -> Any:
        def loss(x: Any) -> Any:
            rows = jax.lax.stop_gradient(x) if stop else x
            options = {"dequantize": False, "implementation": "reference"}
            d = dispatch(rows, ids, weights, **options)
            assert d.scales is not None
            tokens = d.tokens.astype(jnp.float32) * d.scales
            return (x.sum() + tokens.sum())[None]

        whole = jax.shard_map(
            loss, mesh=mesh, in_specs=jax.P(AXIS), out_specs=jax.P(AXIS)
        )
        gradient = jax.jit(jax.grad(lambda x: whole(x).sum()))
        return gradient(jnp.tile(x, (N, 1)))

    with pytest.raises(NotImplementedError, match=r"dequantize=False.*no gradient"):
        program(stop=False)
    assert (program(stop=True) == 1).all()
