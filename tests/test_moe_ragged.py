"""implementation="ragged": XLA has no such collective on CPU, so it is emulated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import moe_oracle
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from moe_cases import data, experts, make_mesh, on_mesh, on_ranks

from jaxfabric import moe
from jaxfabric.moe import _ragged

N, T, D, K, E = 4, 5, 3, 3, 8


def emulated(operand: Any, output: Any, *sizes: Any, axis_name: Any) -> jax.Array:
    """ragged_all_to_all by its documented meaning, from everybody's operands."""
    starts, send_sizes, output_starts, recv_sizes = sizes
    me = lax.axis_index(axis_name)
    operands = lax.all_gather(operand, axis_name)
    starts, send_sizes, output_starts = (
        lax.all_gather(a, axis_name)[:, me] for a in (starts, send_sizes, output_starts)
    )
    row = jnp.arange(operand.shape[0])
    for source in range(operands.shape[0]):
        # recv_sizes is what this rank expects: disagreement must not go unseen.
        agreed = send_sizes[source] == recv_sizes[source]
        size = jnp.where(agreed, send_sizes[source], 0)
        target = jnp.where(row < size, output_starts[source] + row, len(output))
        rows = jnp.take(operands[source], starts[source] + row, axis=0, mode="clip")
        output = output.at[target].set(rows, mode="drop")
    return output


@pytest.fixture
def on_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that this is a platform that has the collective."""
    monkeypatch.setattr(_ragged, "check_platform", lambda platform: None)


def layer(x: Any, ids: Any, weights: Any, w: Any, implementation: str) -> Any:
    d = moe.dispatch(
        *(x, ids, weights),
        axis_name="expert",
        num_experts=E,
        implementation=implementation,
    )
    return d, moe.combine(experts(d, w), d.plan)


@pytest.mark.usefixtures("on_accelerator")
def test_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated)
    rng = np.random.default_rng(0)
    mesh = make_mesh(N)
    w = rng.normal(size=(N, E // N, D, D)).astype(np.float32)

    def both(*operands: Any) -> Any:
        results = []
        for implementation in ("ragged", "reference"):

            def f(x: Any, weights: Any, w: Any, name: str = implementation) -> Any:
                d, y = layer(x, operands[1], weights, w, name)
                return (y**2).sum(), (d.tokens, d.group_sizes, vars(d.stats), y)

            x, _, weights, w = operands
            results.append(jax.grad(f, (0, 1, 2), has_aux=True)(x, weights, w))
        return results

    run = on_ranks(mesh, both)
    for kind in moe_oracle.ROUTINGS:
        x, weights = data(rng, N, T, D, K)
        ids = moe_oracle.routing(kind, rng, N, T, K, E)
        (grads, out), (wanted, expected) = run(x, ids, weights, w)
        jax.tree.map(np.testing.assert_array_equal, out, expected)
        jax.tree.map(np.testing.assert_array_equal, grads, wanted)


@pytest.mark.usefixtures("on_accelerator")
def test_e4m3_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated)
    rng = np.random.default_rng(1)

    def both(x: Any, ids: Any, weights: Any) -> Any:
        found = [
            moe.dispatch(
                *(x, ids, weights),
                axis_name="expert",
                num_experts=E,
                implementation=implementation,
                wire_dtype=jnp.float8_e4m3fn,
                dequantize=False,
            )
            for implementation in ("ragged", "reference")
        ]
        return [(d.tokens, d.scales) for d in found]

    x, weights = data(rng, N, T, 130, K)
    ids = moe_oracle.routing("skips", rng, N, T, K, E)
    got, want = on_ranks(make_mesh(N), both)(x, ids, weights)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()
        assert a.any()


@pytest.mark.usefixtures("on_accelerator")
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators(platform: str) -> None:
    mesh = make_mesh(N)
    rng = np.random.default_rng(0)
    x, weights = data(rng, 1, N * T, D, K)
    ids = moe_oracle.routing("random", rng, 1, N * T, K, E)
    w = np.zeros((E, D, D), np.float32)
    spec = P("expert")
    mapped = jax.shard_map(
        lambda x, ids, weights, w: layer(x, ids, weights, w, "ragged")[1],
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )
    arrays = on_mesh(mesh, spec, x[0], ids[0], weights[0], w)
    grad = jax.jit(jax.grad(lambda *a: mapped(*a).sum(), (0, 2, 3)))
    text = grad.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    # Dispatch; combine's backward; dispatch's backward: rows and weights.
    assert text.count("@ragged_all_to_all(") + text.count('"ragged_all_to_all"') == 4


def test_needs_an_accelerator() -> None:
    with pytest.raises(NotImplementedError, match="'cpu'; use implementation='refer"):
        _ragged.check_platform("cpu")
    _ragged.check_platform("gpu")
