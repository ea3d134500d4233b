"""A rank of `bench weights`: a trainer's or a sampler's; answers requests in lines.

`weights.run` starts it; JSON comes on standard input, and goes out on the descriptor
that the command line names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import numpy.typing as npt
import xxhash

import jaxfabric as jf
from jaxfabric._bench import weights_model
from jaxfabric._bench.weights_others import Gather, Pull
from jaxfabric.weights._push import covered
from jaxfabric.weights._quantise import quantise
from jaxfabric.weights._tiles import (
    TilesByKey,
    aligned_copy,
    box_index,
    tile_shape,
    tiles_of,
)

TIMEOUT_S = 120.0
_PROBE_BYTES = 64 << 20  # more than caches hold
_PROBE_SECONDS = 0.3
_SLOWER = 8  # so much less is quantised in a probe
_STAGING, _SLOTS = 3, 2  # buckets, as a Sender packs them, and a Receiver has them
_WIRE_ID = 1 << 20  # its counts

Array = npt.NDArray[Any]


class _Sender(jf.weights.Sender):
    """Is pushed the tiles that this rank has, by number of leaf and tile."""

    def _tiles(self, params: Any) -> dict[tuple[int, int], Any]:
        return dict(params)


class _Receiver(jf.weights.Receiver):
    """Takes the tiles of this rank, as arrays of JAX."""

    def _tree(self, tiles: TilesByKey) -> dict[tuple[int, int], jax.Array]:
        return {key: jax.device_put(aligned_copy(t)) for key, t in tiles.items()}


def content(leaf: jf.weights.LeafLayout, number: int, box: tuple[slice, ...]) -> Array:
    """A box of a leaf, in which neighbours differ, and leaves too."""
    total = np.full((1,) * len(leaf.shape), 977 * number, np.uint16)
    for axis, part in enumerate(box):
        step = int(np.prod(leaf.shape[axis + 1 :], dtype=np.uint64) % (1 << 16)) | 1
        line = np.arange(part.start, part.stop, dtype=np.uint64) * step
        shape = [1] * len(leaf.shape)
        shape[axis] = -1
        total = total + (line % (1 << 14)).astype(np.uint16).reshape(shape)
    return (total % (1 << 14)).view(leaf.dtype)  # no NaN, which all compare unequal


def tiles_with_content(
    layout: jf.weights.TreeLayout,
    rank: int,
    source: jf.weights.TreeLayout | None = None,
) -> TilesByKey:
    """All tiles of a rank; with ``source`` they are quantised from its contents."""
    made = {}
    for number, leaf in enumerate(layout.leaves):
        tiles = tiles_of(layout, leaf)
        shape = tile_shape(leaf, tiles)
        for which, holders in enumerate(tiles.holders):
            if rank not in holders:
                continue
            position = np.unravel_index(which, tiles.parts)
            start = tuple(int(p) * n for p, n in zip(position, shape, strict=True))
            box = box_index(start, shape)
            if source is None:
                made[number, which] = content(leaf, number, box)
            elif number < len(source.leaves):
                values = content(source.leaves[number], number, box)
                scales = number + len(source.leaves), which
                made[number, which], made[scales] = quantise(values)
    return made


class Rank:
    """What both kinds of rank have; each public method answers a request.

    Attributes:
      arrays: of the last subject that delivered some: what the sampler would use.
    """

    def __init__(
        self,
        role: str,
        rank: int,
        nbytes: int,
        counts: list[int],
        transport: str,
        threads: int | None = None,
        quantises: bool = False,
    ) -> None:
        self.threads, self.quantises = threads, quantises
        layouts = weights_model.layouts(nbytes, *counts, quantise=quantises)
        self.plan = jf.weights.plan(*layouts, scales=weights_model.SCALES)
        self.layout = layouts[role == "sampler"]
        self.role, self.rank = role, rank
        self.arrays: dict[tuple[int, int], Any] = {}
        self.open = [
            jf.TransferEngine(
                transport,
                job="bench",
                token="bench weights",
                name=f"{role}{rank}.{use}",
                timeout_s=TIMEOUT_S,
            )
            for use in ("weights", "raw")
        ]
        self.engine, self.raw = self.open

    def memory(self) -> dict[str, float]:
        """Bytes/s that this rank copies, hashes, quantises, while all others do, too.

        And bytes for each second of a core, with ``_core``.
        """
        source = np.ones(_PROBE_BYTES, np.uint8)
        target = np.empty_like(source)
        copy = _rate(lambda: np.copyto(target, source))
        hashed = _rate(lambda: xxhash.xxh3_64_intdigest(source.data))
        rates = {"copy": copy, "hash": hashed}
        if self.quantises:
            values = source.view(ml_dtypes.bfloat16).reshape(-1, 4096)
            part = values[: len(values) // _SLOWER]
            found = _rate(lambda: quantise(part))
            rates["quantise"] = found[0] / _SLOWER, found[1] / _SLOWER
        return {name: rate[0] for name, rate in rates.items()} | {
            f"{name}_core": rate[1] for name, rate in rates.items()
        }

    def peak(self) -> dict[str, Any]:
        """How far this process's memory grew since it had no Sender or Receiver."""
        return {"grew": _memory("VmHWM") - self._before}

    def _mark(self) -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM begins anew
        self._before = _memory("VmRSS")

    def wire_ready(self, addresses: list[str]) -> dict[str, Any]:
        """Memory that others may write into, as much as is under way at a time."""
        self._ring = self.raw.alloc((len(addresses), _SLOTS, self.plan.bucket_bytes))
        return {"memory": self._ring.desc.to_bytes().hex()}

    def close(self) -> dict[str, Any]:
        """Ends the engines."""
        for engine in self.open:
            engine.close()
        return {}


class Trainer(Rank):
    """A rank that has parameters."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__("trainer", *arguments)
        made = tiles_with_content(self.layout, self.rank)
        self.params = {key: jax.device_put(tile) for key, tile in made.items()}
        jax.block_until_ready(list(self.params.values()))
        del made
        self._mark()
        self._sender = _Sender(
            *(self.engine, self.layout),
            rank=self.rank,
            plan=self.plan,
            threads=self.threads,
        )
        self.gather = Gather(self.raw, self.plan, self.rank)
        self.pull = Pull()

    def addresses(self) -> dict[str, str]:
        """Where the subjects are found."""
        return {
            "sender": self._sender.address().hex(),
            "raw": self.raw.address().to_bytes().hex(),
            "pull": self.pull.address(),
        }

    def push(self, version: int) -> dict[str, Any]:
        """Ours, until all receivers have the version."""
        push = self._sender.push(self.params, version)
        push.wait(TIMEOUT_S)
        stats = push.stats()
        receipts = [receipt._asdict() for receipt in stats.receipts.values()]
        return stats._asdict() | {"receipts": receipts, "memory": self._sender.stats()}

    def wire_connect(self, peers: list[str], memories: list[str]) -> dict[str, Any]:
        """Connects to the ranks that it will write to, and makes a ring for each."""
        self._peers = [self.raw.connect(bytes.fromhex(p)).result() for p in peers]
        self._memories = [jf.MrDesc.from_bytes(bytes.fromhex(m)) for m in memories]
        self._outgoing = self.raw.alloc((_STAGING, self.plan.bucket_bytes))
        self._outgoing.array[:] = 1
        return {}

    def wire(self) -> dict[str, Any]:
        """The same writes as a push makes, and nothing else."""
        sends = self.plan.sends(self.rank)
        turns = [
            (target, number, bucket.nbytes)
            for number in range(max(map(len, sends.values())))
            for target, buckets in sends.items()
            for bucket in buckets[number : number + 1]
        ]
        under_way: list[tuple[float, Any]] = []
        intervals: list[tuple[float, float]] = []

        def end_first() -> None:
            begin, future = under_way.pop(0)
            future.result()
            intervals.append((begin, time.monotonic()))

        for turn, (target, number, nbytes) in enumerate(turns):
            if len(under_way) == _STAGING:
                end_first()
            slot = self.rank * _SLOTS + number % _SLOTS
            begin = time.monotonic()
            future = self.raw.submit_single_write(
                self._outgoing.array[turn % _STAGING, :nbytes],
                self._memories[target],
                _WIRE_ID,
                target_offset=slot * self.plan.bucket_bytes,
            )
            under_way.append((begin, future))
            if future.done():  # it was the call
                end_first()
        while under_way:
            end_first()
        return {"transfer_s": covered(intervals)}


class Sampler(Rank):
    """A rank that takes parameters."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__("sampler", *arguments)
        self._receiver: _Receiver | None = None
        self.gather = Gather(self.raw, self.plan, self.rank, takes=True)
        self.pull = Pull()

    def addresses(self) -> dict[str, str]:
        """Where the subjects are found."""
        return {
            "leader": self.engine.address().to_bytes().hex(),
            "raw": self.raw.address().to_bytes().hex(),
        }

    def connect(self, senders: list[str], leader: str) -> dict[str, Any]:
        """Finds the trainer."""
        self._mark()
        self._receiver = _Receiver(
            self.engine,
            None,
            layout=self.layout,
            rank=self.rank,
            leader=bytes.fromhex(leader) if self.rank else None,
            threads=self.threads,
        )
        self._receiver.connect([bytes.fromhex(address) for address in senders])
        return {}

    def wire(self) -> dict[str, Any]:
        """Until all writes of `Trainer.wire` are here."""
        writes = sum(map(len, self.plan.receives(self.rank).values()))
        self.raw.imm_counter(_WIRE_ID).wait(writes, TIMEOUT_S)
        return {}

    def take(self, version: int) -> dict[str, Any]:
        """Ours, until the arrays are there."""
        assert self._receiver is not None
        core = time.thread_time()
        self.arrays.clear()
        came = self._receiver.take(version, TIMEOUT_S)
        jax.block_until_ready(list(came.params.values()))
        self.arrays = dict(came.params)
        stats = self._receiver.stats()
        return {
            "core_s": {
                "verify": stats["verify_core_s"],
                "unpack": stats["unpack_core_s"],
                "take": time.thread_time() - core,
            },
            "bytes": stats["bytes"],
            "taken_bytes": sum(array.nbytes for array in self.arrays.values()),
        }

    def check(self) -> dict[str, Any]:
        """Whether the arrays that came last are right, each bit of them."""
        source = self.plan.source if self.quantises else None
        wanted = tiles_with_content(self.layout, self.rank, source)
        wrong = [
            self.layout.leaves[number].name
            for (number, which), tile in wanted.items()
            if (number, which) not in self.arrays
            or np.asarray(self.arrays[number, which]).tobytes() != tile.tobytes()
        ]
        self.arrays.clear()
        return {"wrong": wrong}


def _rate(work: Callable[[], object]) -> tuple[float, float]:
    """Bytes per second by the clock, and per second of this thread's core."""
    work()
    begin, core, done = time.monotonic(), time.thread_time(), 0
    while time.monotonic() - begin < _PROBE_SECONDS:
        work()
        done += _PROBE_BYTES
    core = time.thread_time() - core
    return done / (time.monotonic() - begin), done / core


def _memory(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) << 10


def _answer(rank: Any, request: dict[str, Any]) -> dict[str, Any]:
    """One request: `do` is a method of the rank, or of one of its subjects."""
    name = request.pop("do")
    subject, _, method = name.rpartition(".")
    owner = getattr(rank, subject) if subject else rank
    if subject:
        request["rank"] = rank
    try:
        begin = time.process_time()
        found = getattr(owner, method)(**request) or {}
        return {"ok": found | {"process_s": time.process_time() - begin}}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Serves until standard input ends."""
    settings = json.loads(sys.argv[1])
    kind = Trainer if settings["role"] == "trainer" else Sampler
    with os.fdopen(settings["answers"], "w") as answers:

        def say(found: dict[str, Any]) -> None:
            answers.write(json.dumps(found) + "\n")
            answers.flush()

        try:
            rank = kind(
                settings["rank"],
                settings["nbytes"],
                settings["counts"],
                settings["transport"],
                settings["threads"],
                settings["quantise"],
            )
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
            return
        say({"ok": rank.addresses()})
        for line in sys.stdin:
            say(_answer(rank, json.loads(line)))


if __name__ == "__main__":
    main()
