"""Faults of the reference system: the table of their tests, and those in Python.

docs/design/0005-known-faults.md has the table.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from fabric_cases import AXIS, local_rows, mapped, mesh_of_all, place

import jaxfabric as jf

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs/design/0005-known-faults.md"
FAULTS = 8  # in the list that ends section 4 of the design

# A test, by language and name.
CPP_TEST = r"^TEST(?:_[FP])?\(\w+,\s*({})\)"
PYTHON_TEST = r"^def ({})\("
# What a test is called after.
CPP_FAULT = r"Fault[A-Z]\w*"
PYTHON_FAULT = r"test_fault_\w+"


def named_tests(path: Path, name: str) -> list[str]:
    """The tests of a file whose names match."""
    pattern = CPP_TEST if path.suffix == ".cc" else PYTHON_TEST
    return re.findall(pattern.format(name), path.read_text(), re.MULTILINE)


def table() -> list[list[tuple[str, str]]]:
    """By fault, the files and names of its tests."""
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    named = [re.findall(r"`(tests/[\w/]+\.\w+)::(\w+)`", row) for row in rows]
    return named[2:]  # below the head and its line


def test_each_fault_has_tests_that_exist() -> None:
    assert len(table()) == FAULTS
    assert all(table()), "a fault without a test"
    gone = [
        f"{path}::{name}"
        for tests in table()
        for path, name in tests
        if not (ROOT / path).is_file() or not named_tests(ROOT / path, name)
    ]
    assert not gone


def test_each_test_of_a_fault_is_in_the_table() -> None:
    listed = {test for tests in table() for test in tests}
    found = {
        (str(path.relative_to(ROOT)), name)
        for suffix, fault in ((".cc", CPP_FAULT), (".py", PYTHON_FAULT))
        for path in (ROOT / "tests").rglob(f"*{suffix}")
        for name in named_tests(path, fault)
    }
    assert found - listed == set()


# --- Two processes of two ranks ----------------------------------------------

N, T, D, K, E = 4, 5, 3, 2, 8


def moe(x: Any, ids: Any, weights: Any) -> jax.Array:
    """dispatch and combine, without experts between."""
    d = jf.moe.dispatch(x, ids, weights, axis_name=AXIS, num_experts=E)
    return jf.moe.combine(d.tokens, d.plan)


def operands(mesh: Any, ids: np.ndarray, seed: int) -> tuple[list[Any], np.ndarray]:
    """x, ids, weights, by rank, and what the program makes of them, [N * T, D]."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-9, 9, (N * T, D)).astype(np.float32)
    weights = rng.integers(1, 5, (N * T, K)).astype(np.float32)
    ids = ids.reshape(N * T, K)
    want = x * np.where(ids < 0, 0, weights).sum(1, keepdims=True)
    return [place(mesh, a) for a in (x, ids, weights)], want


def routes(kind: str, seed: int) -> np.ndarray:
    """ids int32[N, T, K]."""
    return moe_oracle.routing(kind, np.random.default_rng(seed), N, T, K, E)


@pytest.mark.jaxfabric(processes=2, devices_per_process=2, timeout_s=60)
def test_fault_empty_ranks_and_steps() -> None:
    """Ranks without tokens, and steps without any, between others of one program."""
    mesh = mesh_of_all()
    f = mapped(mesh, moe)
    kinds = ("random", "empty_ranks", "nothing", "random", "nothing", "nothing")
    with jf.Fabric(mesh, timeout_s=20):
        for step, kind in enumerate(3 * (*kinds, "one_rank")):
            arrays, want = operands(mesh, routes(kind, step), step)
            for first, rows in local_rows(f(*arrays)).items():
                np.testing.assert_array_equal(rows, want[first : first + T])


@pytest.mark.parametrize("good", [1, 3])
def test_fault_an_error_of_a_later_execution_is_never_seen(good: int) -> None:
    """One compiled program, whose operands decide whether a wait can succeed."""
    mesh = mesh_of_all(jax.devices()[:2])
    with jf.Fabric(mesh, timeout_s=0.5) as fabric:
        win = fabric.window((4,), jnp.int32)

        def program(x: Any, dst: Any) -> jax.Array:
            token = jf.put(win, x, dst[0], axis_name=AXIS, id=1)
            y, token = jf.wait(win, axis_name=AXIS, id=1, token=token)
            # Nobody puts again before all have read.
            return y + 0 * jf.barrier(AXIS, token=token).astype(jnp.int32)

        f = mapped(mesh, program)
        crossed = place(mesh, np.array([1, 0], np.int32))
        nobody = place(mesh, np.array([-1, -1], np.int32))
        for step in range(good):
            x = np.arange(8, dtype=np.int32) + 100 * step
            for first, rows in local_rows(f(place(mesh, x), crossed)).items():
                np.testing.assert_array_equal(rows, np.roll(x, 4)[first : first + 4])
        begin = time.monotonic()
        with pytest.raises(jax.errors.JaxRuntimeError, match="0 have come"):
            jax.block_until_ready(f(place(mesh, x), nobody))
        assert time.monotonic() - begin < 10


def test_fault_a_failed_fabric_is_never_seen_again() -> None:
    """Each execution after the failure raises, and at once; a new Fabric heals."""
    mesh = mesh_of_all(jax.devices()[:N])
    f = mapped(mesh, moe)
    good = operands(mesh, routes("random", 0), 0)[0]
    spoilt = routes("random", 1)
    spoilt[2, 1, 0] = E
    with jf.Fabric(mesh, timeout_s=20):
        jax.block_until_ready(f(*good))
        bad = operands(mesh, spoilt, 1)[0]
        for arrays in (bad, good, good):
            begin = time.monotonic()
            with pytest.raises((RuntimeError, ValueError)):
                jax.block_until_ready(f(*arrays))
            assert time.monotonic() - begin < 5
    with jf.Fabric(mesh):
        jax.block_until_ready(f(*good))
