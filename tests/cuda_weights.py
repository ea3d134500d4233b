"""Weights that live on devices at both ends, for tests/test_cuda.py.

python cuda_weights.py FOLDER DEVICES PROCESSES RANK. One process is trainer and
sampler, with all devices between them; of two, each has one device to itself, and the
trainer's address travels as a file in FOLDER. They also run on devices of the CPU.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

if int(sys.argv[3]) > 1:
    os.environ["CUDA_VISIBLE_DEVICES"] = sys.argv[4]

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transfer_cases import PATIENCE_S, engine, until

import jaxfabric as jf
from jaxfabric.weights._quantise import quantise

P = PartitionSpec
VERSIONS = (1, 2, 3)
SHAPES: dict[str, tuple[tuple[int, ...], Any, P, P]] = {
    # shape, dtype, spec of the trainer, spec of the sampler
    "embed": ((1000, 384), jnp.bfloat16, P("model", None), P(None, "model")),
    "stack": ((6, 64, 130), jnp.float32, P("model"), P(None, None, "model")),
    "bias": ((130,), jnp.float32, P(), P()),
    "w": ((512, 768), jnp.float32, P("model", None), P(None, "model")),
}


def whole(version: int) -> dict[str, np.ndarray]:
    """The parameters of a version, on the host."""
    random = np.random.default_rng(version)
    return {
        name: random.standard_normal(shape, np.float32).astype(dtype)
        for name, (shape, dtype, _, _) in SHAPES.items()
    }


def on_devices(devices: Any, version: int) -> dict[str, jax.Array]:
    """The same on the trainer's mesh."""
    mesh = Mesh(np.array(devices), ("model",))
    return {
        name: jax.device_put(array, NamedSharding(mesh, SHAPES[name][2]))
        for name, array in whole(version).items()
    }


def wanted(devices: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What the sampler takes: w as e4m3 with scales of 128x128 blocks."""
    mesh = Mesh(np.array(devices), ("model",))
    like = {}
    for name, (shape, dtype, _, spec) in SHAPES.items():
        sharding = NamedSharding(mesh, spec)
        if name == "w":
            dtype = jnp.float8_e4m3fn
            scales = (shape[0] // 128, shape[1] // 128)
            like["w_scale"] = jax.ShapeDtypeStruct(scales, "f4", sharding=sharding)
        like[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return like


def check(taken: jf.weights.Taken, like: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Bits, dtypes and places of all that was taken."""
    want = whole(taken.version)
    want["w"], want["w_scale"] = quantise(want["w"])
    assert sorted(taken.params) == sorted(like)
    for name, array in taken.params.items():
        assert array.sharding == like[name].sharding, name
        assert array.dtype == like[name].dtype, name
        assert np.asarray(array).tobytes() == want[name].tobytes(), name


def one_process() -> None:
    """From the first device to all of them, and back."""
    devices = jax.devices()
    for source, target in ((devices[:1], devices), (devices, devices[-1:])):
        like = wanted(target)
        layout = jf.weights.TreeLayout.of(on_devices(source, 1))
        with (
            engine("shm") as own,
            engine("shm") as other,
            jf.weights.Sender(own, layout, scales="{}_scale") as sender,
            jf.weights.Receiver(other, like) as receiver,
        ):
            receiver.connect([sender.address()])
            for version in VERSIONS:
                pushed = on_devices(source, version)
                sender.push(pushed, version).wait(PATIENCE_S)
                check(receiver.take(version), like)
        print(f"passed {len(source)} to {len(target)} devices", flush=True)


def trainer(folder: Path) -> None:
    """Pushes all versions, and stays until they were taken."""
    layout = jf.weights.TreeLayout.of(on_devices(jax.devices()[:1], 1))
    with (
        engine("shm") as own,
        jf.weights.Sender(own, layout, scales="{}_scale") as sender,
    ):
        written = folder / "address.part"
        written.write_bytes(sender.address())
        written.rename(folder / "address")
        until(sender.receivers)
        for version in VERSIONS:
            pushed = on_devices(jax.devices()[:1], version)
            sender.push(pushed, version).wait(PATIENCE_S)
            until((folder / f"taken-{version}").exists)


def sampler(folder: Path) -> None:
    """Takes all versions."""
    like = wanted(jax.devices()[:1])
    with engine("shm") as own, jf.weights.Receiver(own, like) as receiver:
        until((folder / "address").exists)
        receiver.connect([(folder / "address").read_bytes()])
        for version in VERSIONS:
            check(receiver.take(version, timeout_s=PATIENCE_S), like)
            (folder / f"taken-{version}").touch()


if __name__ == "__main__":
    began = time.monotonic()
    folder, processes, rank = Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
    if processes == 1:
        one_process()
    else:
        (trainer, sampler)[rank](folder)
    kind = jax.devices()[0].device_kind
    print(f"passed weights on {kind} in {time.monotonic() - began:.1f} s", flush=True)
