"""jf.nnx.MoE equals the blocks of transformers: forward and all gradients.

With torch and transformers (extra "parity") the original blocks run beside it. Without,
golden files that they wrote (tests/golden/make_golden.py) keep the check alive.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import moe_models
import numpy as np
import pytest
from flax import nnx
from moe_cases import IMPLEMENTATIONS, make_mesh, open_fabric

from jaxfabric.nnx import MoE

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
TOLERANCE = 1e-6
needs_torch = pytest.mark.skipif(
    not (
        importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    ),
    reason="torch and transformers are not installed: pip install 'jaxfabric[parity]'",
)


def kind_of(path: Path) -> str:
    return path.stem.rpartition("_")[0]


def layer_block(
    kind: str, case: dict[str, np.ndarray], ranks: int, implementation: str
) -> dict[str, np.ndarray]:
    """What torch_block returns, by the layer."""
    experts, hidden, ff = case[moe_models.DOWN].shape
    mesh = make_mesh(ranks)
    layer = MoE(
        *(hidden, ff, experts, int(case["k"])),
        router=kind,
        implementation=implementation,
        mesh=mesh,
        rngs=nnx.Rngs(0),
    )
    layer.load_hf(case, "mlp")

    def loss(layer: MoE, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = layer(x)
        return (y * case["dy"]).sum(), y

    grad = nnx.grad(loss, argnums=(0, 1), has_aux=True)
    with open_fabric(implementation, mesh), jax.default_matmul_precision("highest"):
        (params, dx), y = jax.block_until_ready(nnx.jit(grad)(layer, case["x"]))
    d = {n: np.asarray(params[n][...]) for n in ("gate", "w_gate", "w_up", "w_down")}
    gate_up = np.concatenate([d["w_gate"], d["w_up"]], axis=2).swapaxes(1, 2)
    return {
        "y": np.asarray(y),
        "dx": np.asarray(dx),
        f"d{moe_models.GATE}": d["gate"].T,
        f"d{moe_models.GATE_UP}": gate_up,
        f"d{moe_models.DOWN}": d["w_down"].swapaxes(1, 2),
    }


def check(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Relative error of each tensor, in the 2-norm."""
    errors = {}
    for name, value in actual.items():
        a, b = value.astype(np.float64), expected[name].astype(np.float64)
        errors[name] = np.linalg.norm(a - b) / np.linalg.norm(b)
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path: Path, ranks: int, implementation: str) -> None:
    case = dict(np.load(path))
    check(layer_block(kind_of(path), case, ranks, implementation), case)


@needs_torch
@pytest.mark.filterwarnings("default")  # those of torch and transformers
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", moe_models.KINDS)
def test_random_router(kind: str, ranks: int, implementation: str) -> None:
    sizes = (512, 64, 96, 16, 4) if kind == "qwen3_moe" else (512, 64, 128, 8, 2)
    case, ties = moe_models.without_ties(moe_models.random_case(1, *sizes), 4)
    print(f"left out {ties} of {sizes[0]} tokens with ties")
    assert ties < sizes[0] // 50
    expected = moe_models.torch_block(kind, case)
    check(layer_block(kind, case, ranks, implementation), expected)


@needs_torch
@pytest.mark.filterwarnings("default")  # those of torch and transformers
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_files_are_what_torch_gives(path: Path) -> None:
    case = dict(np.load(path))
    got = moe_models.torch_block(kind_of(path), case)
    check(got, case)


def test_golden_files() -> None:
    """All four are there, small, and the trained routers are as uneven as real ones."""
    assert [path.stem for path in GOLDEN] == [
        "mixtral_random",
        "mixtral_trained",
        "qwen3_moe_random",
        "qwen3_moe_trained",
    ]
    for path in GOLDEN:
        assert path.stat().st_size < 200_000
        if path.stem.endswith("trained"):
            case: dict[str, Any] = dict(np.load(path))
            logits = case["x"] @ case[moe_models.GATE].T
            ids = np.argsort(-logits)[:, : int(case["k"])]
            load = np.bincount(ids.ravel(), minlength=logits.shape[1])
            assert load.max() > 2 * load.mean(), load
