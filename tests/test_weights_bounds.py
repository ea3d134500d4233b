"""What a push costs in messages, writes and memory, counted and measured."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import weights_memory
from test_weights_plan import leaf, tree
from transfer_cases import PATIENCE_S, engine
from weights_cases import assert_tiles, jobs, mesh, whole_arrays

import jaxfabric as jf
from jaxfabric.weights import TreeLayout, _frames, _shards

MODEL_BYTES = weights_memory.LEAVES * weights_memory.LEAF_BYTES
SLACK_BYTES = 24 << 20  # threads, messages, one leaf


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Messages of all engines by kind, and writes."""
    counts: collections.Counter[str] = collections.Counter()
    send, write = jf.TransferEngine.submit_send, jf.TransferEngine.submit_single_write

    def counting_send(self: Any, peer: int, data: bytes, *rest: Any) -> Any:
        if _frames.is_part(data):
            counts["part"] += 1
        elif _frames.credited(data) is not None:
            counts["credit"] += 1
        else:
            counts[_frames.decode(data)[0]] += 1
        return send(self, peer, data, *rest)

    def counting_write(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts["write"] += 1
        return write(self, *args, **kwargs)

    monkeypatch.setattr(jf.TransferEngine, "submit_send", counting_send)
    monkeypatch.setattr(jf.TransferEngine, "submit_single_write", counting_write)
    return counts


@pytest.mark.parametrize(
    ("leaves", "parts"),
    [(2_000, 1), pytest.param(64_000, 2, marks=pytest.mark.slow)],
)
def test_leaves_cost_no_messages(
    leaves: int, parts: int, counted: collections.Counter[str]
) -> None:
    """From 2 ranks to 2: what is said does not depend on their number.

    But for the layout and the plan, which go in parts of 512 KiB, once.
    """
    names = [f"layers.{i}.w" for i in range(leaves)]
    source = tree(mesh(2), *(leaf(name, (4, 4), "a") for name in names))
    target = tree(mesh(2), *(leaf(name, (4, 4), "", "a") for name in names))
    begin = time.monotonic()
    with jobs("shm", source, target, bucket_bytes=64 << 20) as both:
        print(f"{leaves} leaves: connected after {time.monotonic() - begin:.1f} s")
        pairs = 2 * 2
        greetings = dict.fromkeys(("hello", "welcome", "ready", "joined"), pairs)
        assert counted.pop("part") == (1 + parts) * pairs  # a layout, and a plan
        assert counted == {**greetings, "join": 1}
        counted.clear()
        arrays = whole_arrays(source)
        for push in both.push(arrays, 1):
            push.wait(PATIENCE_S)
        writes = counted.pop("write")  # and a word about each
        assert counted.pop("credit") == writes <= pairs * max(1, leaves // 10_000)
        assert counted == dict.fromkeys(("begin", "go", "have"), pairs)
        for taken in both.take(1).values():
            assert_tiles(target, arrays, taken.params)


@pytest.mark.parametrize(
    "transport", ["shm", pytest.param("ofi/tcp", marks=pytest.mark.slow)]
)
def test_memory_stays_within_what_is_said(transport: str) -> None:
    """Of two processes, by what the kernel counts, over several versions."""
    with engine(transport):
        pass  # or it is skipped
    command = [sys.executable, weights_memory.__file__]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen([*command, "trainer", transport], **pipes) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        address = trainer.stdout.readline().strip()
        with subprocess.Popen(
            [*command, "sampler", transport, address], **pipes
        ) as sampler:
            assert sampler.stdout is not None
            assert sampler.stdout.readline() == "connected\n"
            trainer.stdin.write("\n")
            trainer.stdin.flush()
            theirs = json.loads(sampler.communicate(timeout=PATIENCE_S)[0])
        ours = json.loads(trainer.communicate("\n", timeout=PATIENCE_S)[0])
    print(f"trainer {ours}\nsampler {theirs}\nmodel {MODEL_BYTES}")
    # JAX's arrays are on the host already: they are not copied.
    assert ours["bytes"] <= 8 << 20
    assert ours["grown"] <= ours["bytes"] + ours["ring_bytes"] + SLACK_BYTES
    # Its own: two sets and rings. The user's: what he has, and the next one.
    assert theirs["bytes"] <= 2 * MODEL_BYTES + (8 << 20)
    assert theirs["grown"] <= theirs["bytes"] + 2 * MODEL_BYTES + SLACK_BYTES
    assert theirs["grown"] >= 2 * MODEL_BYTES  # it is measured at all


def test_copies_from_devices_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of arrays that are not in host memory, some tiles at a time are copied."""
    jax_numpy = pytest.importorskip("jax.numpy")
    params = {f"w{i}": jax_numpy.full((64, 256), i, "f4") for i in range(16)}
    most = 4 * 64 * 256 * 4
    monkeypatch.setattr(_shards, "_on_host", lambda part: False)
    found = []
    once = _shards.HostTiles.__call__

    def call(self: Any, leaf: int, tile: int) -> Any:
        values = once(self, leaf, tile)
        found.append(self.nbytes)
        return values

    monkeypatch.setattr(_shards.HostTiles, "__call__", call)
    with (
        engine("shm") as own,
        engine("shm") as theirs,
        jf.weights.Sender(own, TreeLayout.of(params), host_bytes=most) as sender,
        jf.weights.Receiver(theirs, params) as receiver,
    ):
        receiver.connect([sender.address()])
        sender.push(params, 1).wait(PATIENCE_S)
        taken = receiver.take(1).params
        assert sender.stats()["bytes"] >= most
    assert max(found) == most
    assert len(found) >= 16
    for name, values in params.items():
        assert np.asarray(taken[name]).tobytes() == np.asarray(values).tobytes()
