"""What both jobs have in common: how they meet, and what a batch looks like."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import pathlib
import time
from typing import Any

import numpy as np
import numpy.typing as npt

import jaxfabric as jf

TRAINER = "trainer"  # how many ranks it has, and when it was started
GOODBYE = b"goodbye"  # the sampler's last message
LEADER = "sampler.weights"  # its first rank's address, for the others
_POLL_S = 0.02


def parse_arguments(doc: str) -> argparse.Namespace:
    """The options of either job; main.py gives them."""
    parser = argparse.ArgumentParser(
        description=doc.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--folder", type=pathlib.Path, required=True, help="where the jobs meet")
    add("--transport", default="shm", help="of weights and batches")
    add("--steps", type=int, default=60, help="of reinforcement learning")
    add("--warm-share", type=float, default=0.4, help="right answers before that")
    add("--batch", type=int, default=256, help="answers of a step")
    add("--group", type=int, default=8, help="answers to each prompt")
    add("--ahead", type=int, default=1, help="batches that may wait for the trainer")
    add("--learning-rate", type=float, default=1e-3, help="of reinforcement learning")
    add("--warm-learning-rate", type=float, default=3e-3, help="before that")
    add("--checkpoints", type=pathlib.Path, help="folder of the trainer's")
    add("--save-every", type=int, default=5, help="steps between two checkpoints")
    add("--seed", type=int, default=0)
    add("--timeout-s", type=float, default=120.0, help="of each operation")
    return parser.parse_args()


def open_engine(options: argparse.Namespace, name: str) -> jf.TransferEngine:
    """An engine that shows all others that it knows the jobs' token."""
    return jf.TransferEngine(
        options.transport,
        job="rl",
        token=(options.folder / "token").read_text(),
        name=name,
        timeout_s=options.timeout_s,
    )


def publish(options: argparse.Namespace, name: str, address: bytes) -> None:
    """Tells an address; any other way would do as well."""
    partial = options.folder / f"{name}.partial"
    partial.write_bytes(address)
    partial.rename(options.folder / f"{name}.address")


def published(options: argparse.Namespace, name: str) -> bytes | None:
    """An address, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        return (options.folder / f"{name}.address").read_bytes()
    return None


def address_of(options: argparse.Namespace, name: str) -> bytes:
    """An address, once it is there; raises SystemExit if it does not come."""
    until = time.monotonic() + options.timeout_s
    while (address := published(options, name)) is None:
        if time.monotonic() > until:
            raise SystemExit(
                f"nobody wrote {name}.address in {options.folder} within "
                f"{options.timeout_s} s"
            )
        time.sleep(_POLL_S)
    return address


def tell_step(options: argparse.Namespace, step: int) -> None:
    """Says how far the trainer is."""
    partial = options.folder / "step.partial"
    partial.write_text(str(step))
    partial.rename(options.folder / "step")


def step_of(folder: pathlib.Path) -> int:
    """How far the trainer is; 0 before it has begun."""
    file = folder / "step"
    return int(file.read_text()) if file.exists() else 0


def record_batch(options: argparse.Namespace, **what: Any) -> None:
    """A line for main.py, which is there even if the sampler is killed later."""
    with (options.folder / "batches.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


def write_report(options: argparse.Namespace, name: str, report: Any) -> None:
    """For main.py."""
    (options.folder / f"{name}.json").write_text(json.dumps(report))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Answers that travel from the sampler to a rank of the trainer.

    Attributes:
      version: of the weights that gave them.
      asked: int32[N, 4]; answers to the same prompt are neighbours.
      given: int32[N, 2].
      log_shares: f32[N, 2], their log-probabilities when they were given; NaN for
        answers that no policy gave.
      rewards: f32[N].
    """

    version: int
    asked: npt.NDArray[np.int32]
    given: npt.NDArray[np.int32]
    log_shares: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]

    def part(self, rank: int, ranks: int) -> Batch:
        """What one of several ranks gets of it."""
        size = len(self.asked) // ranks
        rows = slice(rank * size, (rank + 1) * size)
        return Batch(
            self.version,
            self.asked[rows],
            self.given[rows],
            self.log_shares[rows],
            self.rewards[rows],
        )

    def to_bytes(self) -> bytes:
        """A message; `from_bytes` reads it."""
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **dataclasses.asdict(self))
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Batch:
        """Reads what `to_bytes` gave."""
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            names = ("asked", "given", "log_shares", "rewards")
            return cls(int(found["version"]), *(found[name] for name in names))
