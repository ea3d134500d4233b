"""e4m3 in blocks: the native quantisation against NumPy's, bit by bit."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfabric import _ffi
from jaxfabric.weights._buckets import scale_shape
from jaxfabric.weights._quantise import quantise, quantise_into

Array = npt.NDArray[Any]
DTYPES = ["float32", "bfloat16", "float16", "float64", ">f4", "longdouble"]
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 448.0, 2.0**-100, 1e-45, 6e4]


@np.errstate(over="ignore", invalid="ignore")
def reference(values: Array) -> tuple[Array, Array]:
    """The contract, block by block, with ml_dtypes' conversion."""
    payload = np.empty(values.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty(scale_shape(values.shape), np.float32)
    for row in range(0, values.shape[-2], 128):
        for column in range(0, values.shape[-1], 128):
            box = (..., slice(row, row + 128), slice(column, column + 128))
            block = values[box].astype(np.float32)
            amax = np.abs(block).max(axis=(-2, -1), keepdims=True)
            finite = np.isfinite(amax)
            amax = np.where(finite, np.maximum(amax, np.float32(2.0**-100)), 1)
            amax = amax.astype(np.float32)
            scaled = np.where(finite, block * (np.float32(448) / amax), np.nan)
            payload[box] = scaled.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
            scale = np.where(finite, amax * np.float32(1 / 448), np.float32(np.nan))
            scales[..., row // 128, column // 128] = scale[..., 0, 0]
    return payload, scales


def assert_same(values: Array, payload: Array, scales: Array) -> None:
    want = reference(values)
    np.testing.assert_array_equal(payload.view(np.uint8), want[0].view(np.uint8))
    np.testing.assert_array_equal(scales.view(np.uint32), want[1].view(np.uint32))


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Rows of many sizes, or any bits at all, and some special values."""
    kind = np.dtype(dtype)
    if rng.integers(4) == 0 and kind.isnative and kind.itemsize <= 8:
        bits = rng.integers(0, 256, (*shape, kind.itemsize), np.uint8)
        return bits.view(kind)[..., 0]
    low, high = (-24, 14) if dtype == "float16" else (-150, 120)
    sizes = 2.0 ** rng.integers(low, high, (*shape[:-1], 1))
    values = rng.standard_normal(shape) * sizes
    with np.errstate(over="ignore"):
        values = values.astype(kind)
        for _ in range(int(rng.integers(4)) if values.size else 0):
            at = tuple(int(rng.integers(n)) for n in shape)
            values[at] = np.float64(rng.choice(SPECIAL)).astype(kind)
    return values


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """[..., r, c] with any strides: views of larger arrays, turned and reversed."""
    edges = st.sampled_from([0, 1, 3, 127, 128, 129, 256, 300])
    leading = draw(st.lists(st.integers(0, 3), max_size=2))
    shape = (*leading, draw(edges), draw(edges))
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2, -1])) for _ in shape]
    held = [n * abs(step) + 2 for n, step in zip(shape, steps, strict=True)]
    memory = numbers(rng, tuple(held[axis] for axis in order), dtype)
    if draw(st.booleans()):  # of no alignment
        place = np.empty(memory.nbytes + 1, np.uint8)[1:].view(memory.dtype)
        place = place.reshape(memory.shape)
        place[...] = memory
        memory = place
    turned = memory.transpose(np.argsort(order))
    index = tuple(
        slice(1, 1 + n * step, step) if step > 0 else slice(n, 0, -1)
        for n, step in zip(shape, steps, strict=True)
    )
    view = turned[index]
    assert view.shape == shape
    return view


@given(values=arrays())
@settings(max_examples=200, deadline=None)
def test_bits_are_those_of_numpy(values: Array) -> None:
    before = values.tobytes()
    assert_same(values, *quantise(values))
    assert values.tobytes() == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_each_number_of_two_bytes(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = np.isfinite(bits.view(dtype).astype(np.float32))
    # Blocks of neighbours, and blocks whose largest number scales the others by one.
    alone = np.where(finite, bits, 0).astype(np.uint16).view(dtype).reshape(512, 128)
    assert_same(alone, *quantise(alone))
    small = np.where(np.abs(alone.astype(np.float32)) <= 448, alone, 0).astype(dtype)
    small[:, 0] = 448
    assert_same(small, *quantise(small))


def test_halves_are_rounded_to_even() -> None:
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    exact = codes.astype(np.float32)
    middle = (exact[1:] + exact[:-1]) / 2
    near = [exact, middle, np.nextafter(middle, 0), np.nextafter(middle, 1e9)]
    values = np.concatenate([*near, *(-part for part in near)])
    values = np.append(values, np.zeros(-len(values) % 127)).astype(np.float32)
    values = np.insert(values.reshape(-1, 127), 0, 448, axis=1)
    payload, scales = quantise(values)
    assert scales.item() == 1
    assert_same(values, payload, scales)


def test_it_writes_into_parts_of_a_bucket() -> None:
    values = np.random.default_rng(0).standard_normal((2, 130, 5)).astype("bfloat16")
    bucket = np.full(2 * 130 * 5 + 16 + 3, 0xEE, np.uint8)
    payload = bucket[1:1301].view(ml_dtypes.float8_e4m3fn).reshape(values.shape)
    scales = bucket[1302:1318].view(np.float32).reshape(2, 2, 1)
    quantise_into(values, payload, scales)
    assert_same(values, payload, scales)
    assert (bucket[[0, 1301, 1318]] == 0xEE).all()


E4M3 = ml_dtypes.float8_e4m3fn
OUT, SCALES = np.empty((256, 8), E4M3), np.empty((2, 1), np.float32)
FIXED = np.empty((256, 8), E4M3)
FIXED.flags.writeable = False


@pytest.mark.parametrize(
    ("shape", "payload", "scales", "match"),
    [
        ((8,), OUT, SCALES, r"values\(8,\) have no blocks"),
        ((255, 8), OUT, SCALES, r"payload are .*\(256, 8\), not .*\(255, 8\)"),
        ((256, 8), OUT.view(np.uint8), SCALES, "payload are uint8.*not float8_e4m3fn"),
        ((256, 8), OUT, np.empty((3, 1), np.float32), r"scales are .*\(3, 1\), not"),
        ((256, 8), OUT, SCALES.astype(float), "scales are float64.*not float32"),
        ((256, 8), np.empty((8, 256), E4M3).T, SCALES, "payload must be contiguous"),
        ((256, 8), OUT, np.empty((4, 1), np.float32)[::2], "scales must be contig"),
        ((256, 8), FIXED, SCALES, "payload must be contiguous and writeable"),
    ],
)
def test_other_arrays_are_refused(
    shape: tuple[int, ...], payload: Array, scales: Array, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        quantise_into(np.zeros(shape, np.float32), payload, scales)


def test_the_module_refuses_what_it_cannot_read() -> None:
    call = _ffi.native().quantise_blocks
    with pytest.raises(ValueError, match="int8 is none of float32"):
        call("int8", 0, (0, 0), (1, 1), 0, 0)
    for shape, strides in [((8,), (4,)), ((8, 8), (4,)), ((-1, 8), (32, 4)), ((), ())]:
        with pytest.raises(ValueError, match=f"{len(shape)} sizes and {len(strides)}"):
            call("float32", 0, shape, strides, 0, 0)


def test_other_threads_run_meanwhile() -> None:
    values = np.ones((4096, 4096), np.float32)
    payload, scales = quantise(values)
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    # Threads take turns only where one lets go of the interpreter.
    sys.setswitchinterval(1000)
    try:
        thread.start()
        ran = False
        end = time.monotonic() + 30
        while not ran and time.monotonic() < end:
            before = ticks[0]
            quantise_into(values, payload, scales)
            ran = ticks[0] > before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert ran, "no other thread ran in 30 s of quantising"
