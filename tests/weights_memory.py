"""A trainer or a sampler that measures how much memory its pushes or takes cost it.

python weights_memory.py trainer TRANSPORT
python weights_memory.py sampler TRANSPORT ADDRESS
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from transfer_cases import PATIENCE_S, engine

import jaxfabric as jf

LEAVES, LEAF_BYTES = 12, 8 << 20
VERSIONS = 3
BUCKET_BYTES = 1 << 20


def resident(which: str) -> int:
    """VmRSS (now) or VmHWM (the most so far), in bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{which}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def begin() -> int:
    """Forgets what was the most so far; what there is now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def params() -> dict[str, jax.Array]:
    size = LEAF_BYTES // 4
    return {f"w{i}": jnp.full((size // 1024, 1024), i, "f4") for i in range(LEAVES)}


def train(own: jf.TransferEngine) -> dict[str, Any]:
    tree = jax.block_until_ready(params())
    before = begin()
    layout = jf.weights.TreeLayout.of(tree)
    with jf.weights.Sender(own, layout, bucket_bytes=BUCKET_BYTES) as sender:
        print(sender.address().hex(), flush=True)
        sys.stdin.readline()
        for version in range(1, VERSIONS + 1):
            sender.push(tree, version).wait(PATIENCE_S)
        grown = resident("VmHWM") - before
        sys.stdin.readline()  # the sampler has taken the last one
        return {"grown": grown, **sender.stats()}


def sample(own: jf.TransferEngine, address: str) -> dict[str, Any]:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.eval_shape(params)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like
    )
    jax.block_until_ready(jnp.zeros(1))
    before = begin()
    with jf.weights.Receiver(own, like) as receiver:
        receiver.connect([bytes.fromhex(address)])
        print("connected", flush=True)
        version = 0
        while version < VERSIONS:  # two sets of its own while the second is made
            version, tree = receiver.take(version + 1, timeout_s=PATIENCE_S)
        jax.block_until_ready(tree)
        return {"grown": resident("VmHWM") - before, **receiver.stats()}


if __name__ == "__main__":
    role, transport, *rest = sys.argv[1:]
    with engine(transport, name=role) as opened:
        print(json.dumps((train if role == "trainer" else sample)(opened, *rest)))
