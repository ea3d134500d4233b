"""jf.weights with JAX's own arrays, sharded over two meshes."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ranks import run_child
from test_docs import ROOT, blocks
from transfer_cases import PATIENCE_S, engine, until
from weights_cases import whole_arrays

import jaxfabric as jf
from jaxfabric.weights import _shards
from jaxfabric.weights._shards import check_like, source_tiles, target_tree
from jaxfabric.weights._tiles import empty_tiles

P = PartitionSpec
JOBS_S = 120


def on(mesh: Mesh, *spec: str | None) -> NamedSharding:
    return NamedSharding(mesh, P(*spec))


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that XLA compiles meanwhile."""
    found: list[str] = []

    def heard(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    monitoring.register_event_duration_secs_listener(heard)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(heard)


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

    @jax.jit
    def program(tree: dict[str, jax.Array]) -> jax.Array:
        return (tree["embed"] @ tree["wq"]).sum() + tree["scale"].sum()

    own_params = jax.tree.map(
        lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        like,
    )
    program(own_params).block_until_ready()
    with (
        compilations() as compiled,
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
            compiled.clear()
            program(taken.params).block_until_ready()
            assert not compiled
        # Another sharding would have compiled it again, which can be told.
        program(params(4)).block_until_ready()
        assert compiled


def test_a_step_runs_while_the_weights_of_the_last_one_travel() -> None:
    """It ends before the push does; what arrives is what was pushed."""
    params = {"w": jnp.ones((512, 1024))}
    goes_on, steps = threading.Event(), 3

    @jax.jit
    def step(tree: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"w": tree["w"] * 2}

    with (
        engine("shm") as own,
        engine("shm") as other,
        jf.weights.Sender(
            own, jf.weights.TreeLayout.of(params), bucket_bytes=1 << 18
        ) as sender,
        jf.weights.Receiver(other, params, slots=1) as receiver,
    ):
        receiver.connect([sender.address()])
        on_bucket = receiver._on_bucket

        def hesitate(source: Any, slot: int) -> None:
            goes_on.wait(PATIENCE_S)
            on_bucket(source, slot)

        receiver._on_bucket = hesitate  # type: ignore[method-assign]
        push = sender.push(params, 1)
        until(lambda: push.progress()[0] > 0)
        newer = params
        for _ in range(steps):
            newer = jax.block_until_ready(step(newer))
        assert not push.done()
        goes_on.set()
        push.wait(PATIENCE_S)
        assert (np.asarray(receiver.take(1).params["w"]) == 1).all()
        sender.push(newer, 2).wait(PATIENCE_S)
        assert (np.asarray(receiver.take(2).params["w"]) == 2**steps).all()


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


Pair = collections.namedtuple("Pair", ["wq", "wk"])


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        (
            {"z": np.ones((4, 4)), "y": np.zeros((4, 4))},
            "number 0 is y in the tree and wk in",
        ),
        ([np.ones((4, 4)), np.zeros((4, 4))], "number 0 is 0 in the tree and wk in"),
        (
            Pair(np.ones((4, 4)), np.zeros((4, 4))),
            "number 0 is wq in the tree and wk in",
        ),
        (
            {"wk": np.ones((4, 4))},
            "has 1 leaves, its layout 2, and number 1 is none in the tree",
        ),
        ({"wk": np.ones((4, 4)), "wq": 1.0}, "wq is of type float, and no array"),
    ],
)
def test_a_tree_of_other_names_is_refused(tree: Any, match: str) -> None:
    """Shapes do not tell leaves apart."""
    params = {"wq": np.ones((4, 4)), "wk": np.zeros((4, 4))}
    layout = jf.weights.TreeLayout.of(params)
    with (
        engine("shm") as own,
        jf.weights.Sender(own, layout) as sender,
    ):
        with pytest.raises(jf.FabricError, match=f"push: .*{match}"):
            sender.push(tree, 1)
        sender.push(params, 1).wait(PATIENCE_S)
    with pytest.raises(jf.FabricError, match=match):
        check_like(layout, tree, 0)
    with pytest.raises(jf.FabricError, match=match):
        target_tree(layout, tree, empty_tiles(layout, 0))


def test_names_are_compared_once_for_each_structure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = {"wq": np.ones((4, 4)), "wk": np.zeros((4, 4))}
    layout = jf.weights.TreeLayout.of(params)
    compared = []
    monkeypatch.setattr(_shards, "_check_names", lambda *args: compared.append(args))
    for _ in range(3):
        source_tiles(layout, params, 0)
    assert len(compared) == 1
    for number in range(20):
        source_tiles(layout, {f"a{number}": params["wq"], "b": params["wk"]}, 0)
    assert len(layout.structures) <= 8


@pytest.mark.parametrize("kind", ["pinned_host", "unpinned_host"])
def test_arrays_come_into_the_memory_that_is_wanted(kind: str) -> None:
    trainer, _ = meshes()
    there = NamedSharding(trainer, P("data", "model"), memory_kind=kind)
    params = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), there)}
    with (
        engine("shm") as own,
        engine("shm") as other,
        jf.weights.Sender(own, jf.weights.TreeLayout.of(params)) as sender,
        jf.weights.Receiver(other, params) as receiver,
    ):
        receiver.connect([sender.address()])
        sender.push(params, 1).wait(PATIENCE_S)
        taken = receiver.take(1).params["w"]
    assert taken.sharding == there
    assert (np.asarray(taken) == np.arange(64.0).reshape(8, 8)).all()


def test_shards_on_other_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large as the layout's, but those of another process."""
    trainer, _ = meshes()
    turned = Mesh(trainer.devices[::-1], trainer.axis_names)
    rank_of = dict(zip(trainer.devices.flat, (0, 0, 1, 1), strict=True))
    parts = _shards._parts

    def of_rank_0(name: str, value: Any) -> Any:
        here = [rank_of[shard.device] == 0 for shard in value.addressable_shards]
        found = parts(name, value)
        return [part for part, own in zip(found, here, strict=True) if own]

    def put(mesh: Mesh) -> dict[str, jax.Array]:
        return {"w": jax.device_put(jnp.zeros((8, 8)), on(mesh, "data", "model"))}

    layout = jf.weights.TreeLayout.of(put(trainer), ranks=rank_of.__getitem__)
    monkeypatch.setattr(_shards, "_parts", of_rank_0)
    assert list(source_tiles(layout, put(trainer), 0)) == [(0, 0), (0, 1)]
    with pytest.raises(
        jf.FabricError, match=r"w is sharded otherwise .* tile 0, rank 0's, is not"
    ):
        source_tiles(layout, put(turned), 0)
    with pytest.raises(jf.FabricError, match="tile 2 would be here, and is not"):
        check_like(layout, put(trainer), 0)


def test_like_of_another_kind_is_refused() -> None:
    trainer, _ = meshes()
    cut = jf.weights.TreeLayout.of(
        {"w": jax.device_put(jnp.zeros((8, 8)), on(trainer, "data"))}
    )
    for like, match in (
        ({"w": jnp.zeros((8, 8), jnp.bfloat16)}, "w is bfloat16.* float32"),
        ({"w": jnp.zeros((8, 8))}, r"w of like= has shards of shape \(8, 8\)"),
        ({"w": np.zeros((8, 8), np.float32)}, "w of like= has no sharding"),
    ):
        with pytest.raises(jf.FabricError, match=match):
            check_like(cut, like, 0)
    check_like(cut, None, 0)


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
    assert "rank 0 of the sampler takes at most 0.16 GiB" in printed


@pytest.mark.example
def test_the_two_jobs_of_the_page_meet(tmp_path: Path) -> None:
    """Its three files, and the commands that it gives for them."""
    pytest.importorskip("optax", reason="the jobs need jaxfabric[examples]")
    page = (ROOT / "docs/weights.md").read_text()
    files = re.findall(r"^```python title=(\S+)\n(.*?)^```", page, re.M | re.S)
    assert [name for name, _ in files] == ["model.py", "trainer.py", "sampler.py"]
    for name, text in files:
        (tmp_path / name).write_text(text)
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("secret")
    launcher = ["-m", "jaxfabric._cli", "run", "-n", "2"]
    commands = [
        [sys.executable, str(tmp_path / "sampler.py"), str(tmp_path)],
        [sys.executable, *launcher, str(tmp_path / "trainer.py"), str(tmp_path)],
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    with contextlib.ExitStack() as stack:
        started = []
        for command in commands:
            process = stack.enter_context(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, text=True
                )
            )
            stack.callback(process.kill)
            started.append(process)
        printed = "".join(one.communicate(timeout=JOBS_S)[0] for one in started)
    assert [one.returncode for one in started] == [0, 0], printed
    assert "sampler: after 115 comes 116, says version 20" in printed


def test_a_program_may_end_without_closing_anything(tmp_path: Path) -> None:
    """Nothing is left that the interpreter's end would complain about."""
    program = tmp_path / "page.py"
    program.write_text(blocks(ROOT / "docs/weights.md")[0])
    done = subprocess.run(
        [sys.executable, "-P", str(program)],
        capture_output=True,
        text=True,
        timeout=JOBS_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
