"""jf.nnx.MoE: meshes, transforms, statistics, checkpoints of other projects."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_cases import IMPLEMENTATIONS, make_mesh, open_fabric

from jaxfabric import _hf_weights
from jaxfabric.moe import routers
from jaxfabric.nnx import MoE, find_mesh

D, F, E, K, B, S = 8, 12, 8, 2, 8, 3


def make_layer(mesh: Any, **options: Any) -> Any:
    return MoE(D, F, E, K, mesh=mesh, rngs=nnx.Rngs(0), **options)


def tokens(seed: int = 1, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).normal(size=(B, S, D)).astype(dtype)


@nnx.jit
def apply(layer: MoE, x: Any) -> Any:
    """Compiled: op by op a sharded layer takes seconds."""
    return layer(x)


@nnx.jit
def apply_with_stats(layer: MoE, x: Any) -> Any:
    return layer(x, return_stats=True)


def dense(layer: MoE, x: Any) -> jax.Array:
    """The layer without any mesh: every expert sees every token."""
    w = {n: np.asarray(v[...]) for n, v in nnx.state(layer).items()}
    ids, weights = layer.router(x @ w["gate"], K)
    hidden = jax.nn.silu(jnp.einsum("...d,edf->...ef", x, w["w_gate"]))
    hidden *= jnp.einsum("...d,edf->...ef", x, w["w_up"])
    rows = jnp.einsum("...ef,efd->...ed", hidden, w["w_down"])
    rows = jnp.take_along_axis(rows, ids[..., None], -2)
    y = (rows * weights[..., None]).sum(-2)
    if "shared_gate" in w:
        hidden = jax.nn.silu(x @ w["shared_gate"]) * (x @ w["shared_up"])
        y += hidden @ w["shared_down"]
    return y


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("sizes", "names"), [((4,), ("expert",)), ((2, 4), ("data", "expert"))]
)
@pytest.mark.parametrize("router", ["mixtral", "qwen3_moe"])
def test_layer(implementation: str, sizes: Any, names: Any, router: str) -> None:
    mesh = make_mesh(sizes, names)
    layer = make_layer(
        mesh, shared_experts=2, router=router, implementation=implementation
    )
    assert layer.w_gate[...].sharding.spec == P("expert", None, None)
    assert layer.shared_gate[...].shape == (D, 2 * F)
    x = tokens()

    def loss(layer: MoE, x: Any) -> Any:
        y, stats = layer(x, return_stats=True)
        return (y**2).sum(), (y, stats)

    with open_fabric(implementation, mesh):
        grad = nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))
        (_, dx), (y, stats) = jax.block_until_ready(grad(layer, x))
    np.testing.assert_allclose(y, dense(layer, x), rtol=0, atol=1e-5)
    want = jax.grad(lambda x: (dense(layer, x) ** 2).sum())(x)
    np.testing.assert_allclose(dx, want, rtol=0, atol=1e-4)

    logits = x.reshape(-1, D) @ np.asarray(layer.gate[...])
    ids, _ = layer.router(logits, K)
    load = np.bincount(np.asarray(ids).ravel(), minlength=E)
    np.testing.assert_array_equal(stats.expert_load, load)
    share = load / len(logits) * np.asarray(jax.nn.softmax(logits)).mean(0)
    np.testing.assert_allclose(stats.load_balance_loss, E * share.sum(), rtol=1e-5)
    n = sizes[-1]
    assert stats.dispatch.sent.shape == (mesh.size, n)
    np.testing.assert_array_equal(
        np.reshape(stats.dispatch.sent, (-1, n, n)).swapaxes(1, 2),
        np.reshape(stats.dispatch.received, (-1, n, n)),
    )
    assert not stats.dispatch.dropped_at_receiver.any()


def test_balance_loss_has_a_gradient() -> None:
    layer = make_layer(make_mesh(4))

    def loss(layer: MoE) -> jax.Array:
        return layer(tokens(), return_stats=True)[1].load_balance_loss

    grads = nnx.jit(nnx.grad(loss))(layer)
    assert abs(grads["gate"][...]).max() > 0
    assert not grads["w_gate"][...].any()


def test_capacity_drops_and_counts() -> None:
    layer = make_layer(make_mesh(4), capacity=1)
    y, stats = apply_with_stats(layer, tokens())
    assert int(stats.dispatch.dropped_at_receiver.sum()) == B * S * K - 4
    assert (abs(y).max(-1) == 0).sum() >= B * S - 4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transforms(implementation: str) -> None:
    """jit, remat, grad, and scan over stacked layers agree with plain calls."""
    mesh = make_mesh(4)
    x = tokens()
    layers = [
        MoE(D, F, E, K, mesh=mesh, implementation=implementation, rngs=nnx.Rngs(seed))
        for seed in range(3)
    ]
    graphdef = nnx.graphdef(layers[0])
    states = [nnx.state(layer) for layer in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def loop(states: Any, x: Any) -> Any:
        for state in states:
            x = x + nnx.merge(graphdef, state)(x)
        return (x**2).sum()

    def scan(stacked: Any, x: Any) -> Any:
        @jax.checkpoint
        def step(x: Any, state: Any) -> Any:
            return x + nnx.merge(graphdef, state)(x), None

        return (lax.scan(step, x, stacked)[0] ** 2).sum()

    @nnx.jit
    def remat(layers: list[MoE], x: Any) -> Any:
        def loss(layers: list[MoE], x: Any) -> Any:
            for layer in layers:
                x = x + nnx.remat(lambda layer, x: layer(x))(layer, x)
            return (x**2).sum()

        return nnx.value_and_grad(loss)(layers, x)

    with open_fabric(implementation, mesh):
        value, grads = jax.jit(jax.value_and_grad(loop))(states, x)
        scanned, stacked_grads = jax.jit(jax.value_and_grad(scan))(stacked, x)
        rematerialised, more_grads = remat(layers, x)
        jax.block_until_ready((grads, stacked_grads, more_grads))
    np.testing.assert_allclose(scanned, value, rtol=1e-6)
    np.testing.assert_allclose(rematerialised, value, rtol=1e-6)
    for i in range(3):
        for name in ("gate", "w_gate", "w_up", "w_down"):
            want = grads[i][name][...]
            close: Any = {"rtol": 0, "atol": 1e-5 * float(abs(want).max())}
            np.testing.assert_allclose(stacked_grads[name][...][i], want, **close)
            np.testing.assert_allclose(more_grads[i][name][...], want, **close)


def test_nnx_scan_over_layers() -> None:
    """Flax's own way to stack layers: nnx.vmap to build, nnx.scan to apply."""
    mesh = make_mesh(4)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def build(rngs: nnx.Rngs) -> MoE:
        return MoE(D, F, E, K, mesh=mesh, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def stack(layer: MoE, x: Any) -> Any:
        return x + layer(x)

    layers = build(nnx.Rngs(0))
    assert layers.w_gate[...].shape == (3, E, D, F)
    x = want = tokens()
    for i in range(3):
        graphdef, state = nnx.split(layers)
        one = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))
        want = want + apply(one, want)
    np.testing.assert_allclose(nnx.jit(stack)(layers, x), want, rtol=1e-5, atol=1e-5)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "given",
    [
        "context",
        pytest.param("argument", marks=SLOW),
        pytest.param("both", marks=SLOW),
    ],
)
def test_explicit_mesh(given: str) -> None:
    """y is sharded as x is, so that a residual connection works."""
    mesh = jax.make_mesh(
        (2, 4), ("data", "expert"), axis_types=(AxisType.Explicit,) * 2
    )
    auto = make_mesh((2, 4), ("data", "expert"))
    want = apply(make_layer(auto), tokens())
    argument = mesh if given != "context" else None
    context: Any = contextlib.nullcontext()
    if given != "argument":
        context = jax.set_mesh(mesh)
    with context:
        layer = make_layer(argument)
        for spec in (P("data"), P(), P(("data", "expert"))):
            x = jax.device_put(tokens(), NamedSharding(mesh, spec))
            y = nnx.jit(lambda layer, x: x + layer(x))(layer, x)
            np.testing.assert_allclose(y - x, want, rtol=0, atol=1e-6)
            assert y.sharding.is_equivalent_to(x.sharding, 3)
            grads = nnx.jit(nnx.grad(lambda layer, x: (layer(x) ** 2).sum()))(layer, x)
            assert grads["w_up"][...].sharding.spec[0] == "expert"


def test_inside_of_the_callers_shard_map() -> None:
    """Within shard_map over all axes the layer uses it; over others it nests."""
    mesh = make_mesh((2, 4), ("data", "expert"))
    layer = make_layer(mesh)
    graphdef, state = nnx.split(layer)
    x = tokens()

    def inside(state: Any, x: Any) -> Any:
        y, stats = nnx.merge(graphdef, state)(x, return_stats=True)
        return y, stats.expert_load

    # Parameters of three dimensions are the experts'.
    leaves, structure = jax.tree.flatten(state)
    specs = [P("expert") if leaf.ndim == 3 else P() for leaf in leaves]
    both = P(("data", "expert"))
    whole = jax.shard_map(
        lambda leaves, x: inside(jax.tree.unflatten(structure, leaves), x),
        mesh=mesh,
        in_specs=(specs, both),
        out_specs=(both, P()),
    )
    y, load = jax.jit(whole)(leaves, x)
    want, stats = apply_with_stats(layer, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(load, stats.expert_load)

    nested = jax.shard_map(
        lambda x: nnx.merge(graphdef, state)(x),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    np.testing.assert_allclose(jax.jit(nested)(x), want, rtol=0, atol=1e-6)


def test_low_precision() -> None:
    mesh = make_mesh(4)
    layer = make_layer(mesh, dtype=jnp.bfloat16)
    y = apply(layer, tokens())
    assert y.dtype == jnp.bfloat16
    assert layer.w_up[...].dtype == jnp.float32
    # Rounding may route the odd token elsewhere, but no more than that.
    error = abs(y.astype(np.float32) - dense(layer, tokens())).max(-1)
    assert (error > 0.02).sum() <= 1
    small = make_layer(mesh, param_dtype=jnp.bfloat16)
    assert small.gate[...].dtype == jnp.bfloat16
    assert apply(small, tokens()).dtype == jnp.float32
    assert apply(small, tokens(dtype=jnp.bfloat16)).dtype == jnp.bfloat16


def test_own_router_and_grouped_matmul() -> None:
    """A router may skip tokens; the grouped matmul is the caller's choice."""
    calls = []

    def dot(rows: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        calls.append(rows.shape)
        return lax.ragged_dot(rows, w, sizes)

    def first_half(logits: jax.Array, k: int) -> Any:
        ids, weights = routers.mixtral(logits, k)
        return jnp.where(ids < E // 2, ids, -1), weights

    layer = make_layer(make_mesh(4), router=first_half, grouped_matmul=dot)
    y, stats = apply_with_stats(layer, tokens())
    assert len(calls) == 3
    assert not stats.expert_load[E // 2 :].any()
    assert 0 < int(stats.expert_load.sum()) < B * S * K
    np.testing.assert_allclose(y, dense_skipping(layer, tokens()), rtol=0, atol=1e-5)


def dense_skipping(layer: MoE, x: np.ndarray) -> Any:
    """`dense` where ids may be -1."""
    original = layer.router

    def zeroed(logits: Any, k: int) -> Any:
        ids, weights = original(logits, k)
        return jnp.maximum(ids, 0), jnp.where(ids < 0, 0, weights)

    layer.router = zeroed
    return dense(layer, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": "hash"}, "router='hash' is unknown.*'mixtral'"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 but num_experts=8"),
        ({"implementation": "best"}, "'best' is unknown"),
    ],
)
def test_bad_construction(change: Any, message: str) -> None:
    options: dict[str, Any] = {
        "d_model": D,
        "d_ff": F,
        "num_experts": E,
        "num_experts_per_tok": K,
    }
    with pytest.raises(ValueError, match=message):
        MoE(**(options | change), rngs=nnx.Rngs(0))


def test_bad_calls() -> None:
    layer = make_layer(make_mesh(4))
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 8\].*\(4, 7\)"):
        layer(np.zeros((4, 7), np.float32))
    with pytest.raises(ValueError, match="first dimension 6, not divisible by the 4"):
        layer(np.zeros((6, D), np.float32))
    with pytest.raises(
        ValueError, match=r"no mesh with axis \('expert',\); pass mesh="
    ):
        make_layer(None)(np.zeros((4, D), np.float32))
    uneven = MoE(D, F, 6, K, axis_name="expert", rngs=nnx.Rngs(0))
    with (
        jax.set_mesh(make_mesh(4)),
        pytest.raises(
            ValueError, match="num_experts=6 is not divisible by the 4 ranks"
        ),
    ):
        apply(uneven, np.zeros((4, D), np.float32))


# Checkpoints.


def hf_tensors(kind: str, prefix: str, shared: bool = False) -> dict[str, np.ndarray]:
    """Random tensors under the names of a kind of checkpoint."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    out = {"gate.weight": normal(E, D)}
    gate, up, down = normal(E, F, D), normal(E, F, D), normal(E, D, F)
    names = {
        "qwen": ("gate_proj", "up_proj", "down_proj"),
        "mixtral": ("w1", "w3", "w2"),
    }
    if kind == "fused":
        out["experts.gate_up_proj"] = np.concatenate([gate, up], 1)
        out["experts.down_proj"] = down
    else:
        for name, values in zip(names[kind], (gate, up, down), strict=True):
            for e in range(E):
                out[f"experts.{e}.{name}.weight"] = values[e]
    if shared:
        out["shared_experts.gate_proj.weight"] = normal(F, D)
        out["shared_experts.up_proj.weight"] = normal(F, D)
        out["shared_experts.down_proj.weight"] = normal(D, F)
    return {f"{prefix}.{name}": value for name, value in out.items()}


@pytest.mark.parametrize("kind", ["fused", "qwen", "mixtral"])
@pytest.mark.parametrize("form", ["mapping", "file", "files", "directory", "index"])
def test_load_hf(kind: str, form: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = hf_tensors(kind, "model.layers.3.mlp", shared=True)
    items = list(tensors.items())
    halves = {"a.safetensors": dict(items[::2]), "b.safetensors": dict(items[1::2])}
    source: Any = tensors
    if form in ("file", "directory"):
        safetensors.save_file(tensors, tmp_path / "model.safetensors")
        source = tmp_path if form == "directory" else tmp_path / "model.safetensors"
    elif form in ("files", "index"):
        for name, part in halves.items():
            safetensors.save_file(part, tmp_path / name)
        where = {t: name for name, part in halves.items() for t in part}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": where}))
        source = str(tmp_path) if form == "index" else [tmp_path / n for n in halves]
    layer = make_layer(make_mesh(4), shared_experts=1)
    layer.load_hf(source, "model.layers.3.mlp")
    assert layer.w_down[...].sharding.spec == P("expert", None, None)
    want = hf_tensors("fused", "p", shared=True)
    gate_up = want["p.experts.gate_up_proj"].swapaxes(1, 2)
    np.testing.assert_array_equal(layer.gate[...], want["p.gate.weight"].T)
    np.testing.assert_array_equal(layer.w_gate[...], gate_up[..., :F])
    np.testing.assert_array_equal(layer.w_up[...], gate_up[..., F:])
    np.testing.assert_array_equal(
        layer.w_down[...], want["p.experts.down_proj"].swapaxes(1, 2)
    )
    shared = want["p.shared_experts.down_proj.weight"].T
    np.testing.assert_array_equal(layer.shared_down[...], shared)


def test_load_hf_casts_and_fills_abstract_layers(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    mesh = make_mesh(4)
    tensors = {
        name: value.astype(jnp.bfloat16)
        for name, value in hf_tensors("qwen", "m").items()
    }
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    layer = nnx.eval_shape(lambda: make_layer(mesh))
    layer.load_hf(tmp_path, "m")
    assert layer.w_up[...].dtype == jnp.float32
    assert layer.w_up[...].sharding.spec == P("expert", None, None)
    np.testing.assert_array_equal(
        layer.w_up[...][5], tensors["m.experts.5.up_proj.weight"].T.astype(np.float32)
    )


@pytest.mark.parametrize("kind", ["fused", "qwen"])
def test_load_hf_reads_only_local_experts(kind: str) -> None:
    """A rank asks for the slices of its own experts and nothing else."""
    asked: dict[str, list[Any]] = {}

    class Recorded(np.ndarray):
        name = ""

        def __getitem__(self, index: Any) -> Any:
            asked.setdefault(self.name, []).append(index)
            return np.asarray(self)[index]

    checkpoint = _hf_weights.Checkpoint(hf_tensors(kind, "m"), "m")
    for name, load in list(checkpoint._slices.items()):

        def recorded(name: str = name, load: Any = load) -> Any:
            array = load().view(Recorded)
            array.name = name
            return array

        checkpoint._slices[name] = recorded
    read = checkpoint._loader("w_up", (E, D, F))
    read((slice(2, 4), slice(None), slice(None)))
    if kind == "fused":
        (index,) = asked["m.experts.gate_up_proj"]
        assert index[0] == slice(2, 4)
    else:
        assert sorted(asked) == [f"m.experts.{e}.up_proj.weight" for e in (2, 3)]


def test_load_hf_errors(tmp_path: Path) -> None:
    layer = make_layer(make_mesh(4))
    tensors = hf_tensors("qwen", "m")
    with pytest.raises(KeyError, match=r"no tensor 'model\.gate\.weight' among the 25"):
        layer.load_hf(tensors, "model")
    with pytest.raises(ValueError, match=r"\(8, 9\), but the layer needs \(8, 8\)"):
        layer.load_hf(tensors | {"m.gate.weight": np.zeros((8, 9))}, "m")
    missing = {n: v for n, v in tensors.items() if ".experts.6." not in n}
    with pytest.raises(KeyError, match=r"m\.experts\.6\."):
        layer.load_hf(missing, "m")
    with pytest.raises(FileNotFoundError):
        layer.load_hf(tmp_path, "m")


def test_find_mesh_prefers_the_context() -> None:
    given, other = make_mesh(2), make_mesh(4)
    assert find_mesh(given, ("expert",)) is given
    with jax.set_mesh(other):
        assert find_mesh(given, ("expert",)) == other
        assert find_mesh(given, ("ep",)) is given
