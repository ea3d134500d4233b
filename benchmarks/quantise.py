"""Quantising weights to e4m3 in blocks of 128x128, on one core.

    python benchmarks/quantise.py

Beside it plain copies, and ml_dtypes' conversion alone, without scales. GB/s of the
source, in seconds of a core, so that other programs on the machine count little; the
best of several runs. Into memory that is there, as a push does it, strip by strip:
"rows" of a tile, "columns" (the left half of them), "transposed", a tile in Fortran's
order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from measure import table

from jaxfabric._bench.machine import line
from jaxfabric.weights._buckets import scale_shape
from jaxfabric.weights._quantise import quantise_into

Array = npt.NDArray[Any]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
TILE = (4096, 8192)
STRIP_ROWS = 128  # 1 MiB of e4m3
RUNS = 7


def gb_s(values: Array, work: Callable[[], object]) -> float:
    """Of source, in seconds of this thread's core."""
    best = float("inf")
    for _ in range(RUNS):
        begin = time.thread_time()
        work()
        best = min(best, time.thread_time() - begin)
    return values.nbytes / best / 1e9


def in_strips(values: Array) -> Callable[[], None]:
    """Quantises a tile strip by strip."""
    payload = np.zeros(values.shape, E4M3)
    scales = np.zeros(scale_shape(values.shape), np.float32)

    def work() -> None:
        for row in range(0, len(values), STRIP_ROWS):
            at = slice(row, row + STRIP_ROWS)
            block = slice(row // 128, (row + STRIP_ROWS) // 128)
            quantise_into(values[at], payload[at], scales[block])

    return work


def rates(dtype: str) -> list[str]:
    """A row of the table."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(TILE, dtype=np.float32).astype(dtype)
    copy = np.zeros_like(values)
    payload = np.zeros(TILE, E4M3)
    half = values[:, : TILE[1] // 2]
    measured = [
        gb_s(values, lambda: np.copyto(copy, values)),
        gb_s(values, lambda: np.copyto(payload, values, casting="unsafe")),
        gb_s(values, in_strips(values)),
        gb_s(half, in_strips(half)),
        gb_s(values, in_strips(np.asfortranarray(values))),
    ]
    per_element = measured[2] / values.itemsize
    return [dtype, *(f"{rate:.2f}" for rate in measured), f"{per_element:.2f}"]


def main() -> None:
    """Prints the table."""
    print(line())
    header = ["GB/s of source", "memcpy", "cast alone", "rows", "columns"]
    header += ["transposed", "e4m3 of rows"]
    print(table(header, [rates(t) for t in ("bfloat16", "float32", "float16")]))


if __name__ == "__main__":
    main()
