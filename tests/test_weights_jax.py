"""jf.weights with JAX's own arrays, sharded over two meshes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ranks import run_child
from test_docs import ROOT, blocks
from transfer_cases import PATIENCE_S, engine
from weights_cases import whole_arrays

import jaxfabric as jf

P = PartitionSpec


def on(mesh: Mesh, *spec: str | None) -> NamedSharding:
    return NamedSharding(mesh, P(*spec))


def meshes() -> tuple[Mesh, Mesh]:
    devices = np.asarray(jax.devices())
    if len(devices) < 4:
        pytest.skip(f"{len(devices)} devices; 4 are needed")
    return Mesh(devices[:4].reshape(2, 2), ("data", "model")), Mesh(
        devices[2:4], ("model",)
    )


def test_arrays_of_one_mesh_become_arrays_of_another() -> None:
    trainer, sampler = meshes()
    shapes = {"embed": (64, 32), "wq": (32, 64), "scale": (32,)}
    ours = {
        "embed": on(trainer, "model", None),
        "wq": on(trainer, "data", "model"),
        "scale": on(trainer),
    }
    theirs = {
        "embed": on(sampler, None, "model"),
        "wq": on(sampler, None, "model"),
        "scale": on(sampler),
    }
    like = {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=theirs[name])
        for name, shape in shapes.items()
    }

    def params(seed: int) -> dict[str, jax.Array]:
        layout = jf.weights.TreeLayout.of(like)
        whole = whole_arrays(layout, seed)
        return {
            name: jax.device_put(whole[name].astype(np.float32), ours[name])
            for name in shapes
        }

    compiled: list[int] = []

    @jax.jit
    def program(tree: dict[str, jax.Array]) -> jax.Array:
        compiled.append(1)
        return (tree["embed"] @ tree["wq"]).sum() + tree["scale"].sum()

    with (
        engine("shm") as own,
        engine("shm") as other,
        jf.weights.Sender(
            own, jf.weights.TreeLayout.of(params(0)), cast=True
        ) as sender,
        jf.weights.Receiver(other, like) as receiver,
    ):
        receiver.connect([sender.address()])
        for version in (1, 2, 3):
            pushed = params(version)
            sender.push(pushed, version).wait(PATIENCE_S)
            taken = receiver.take(version)
            for name, array in taken.params.items():
                assert array.sharding == theirs[name]
                wanted = np.asarray(pushed[name]).astype(jnp.bfloat16)
                assert np.asarray(array).tobytes() == wanted.tobytes()
            program(taken.params).block_until_ready()
        assert len(compiled) == 1


def test_arrays_that_were_donated_are_named() -> None:
    params = {"w": jnp.arange(8.0)}
    with (
        engine("shm") as own,
        engine("shm") as other,
        jf.weights.Sender(own, jf.weights.TreeLayout.of(params)) as sender,
    ):
        push = sender.push(params, 1)
        push.wait(PATIENCE_S)
        params["w"].delete()
        with jf.weights.Receiver(other, {"w": np.zeros(8, np.float32)}) as late:
            late.connect([sender.address()])
            with pytest.raises(jf.FabricError, match="version 1 are gone"):
                late.take(1, timeout_s=PATIENCE_S)
            sender.push({"w": jnp.arange(8.0)}, 2).wait(PATIENCE_S)
            assert (late.take(2).params["w"] == np.arange(8.0)).all()


def test_the_page_about_weights_is_one_program(tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    parts = blocks(ROOT / "docs/weights.md")
    assert len(parts) >= 5
    program.write_text("\n".join(parts))
    printed = run_child(str(program))
    assert "version 1 took" in printed
    assert "2 leaves on 32 ranks become 2 leaves on 16 ranks." in printed
    assert "experts.w1 is float32 at the source and experts.w1 is bfloat16" in printed
    assert "{'sampler/0': 'Receipt'}" in printed
    assert "still version 2" in printed
