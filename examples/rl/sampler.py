"""The sampler: answers prompts with the newest weights, while the next ones come.

main.py starts it. It has the model whole on its one device; the trainer's ranks, each
with half of the experts, write every version straight into its memory.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import jobs
import numpy as np
from arithmetic import SUMS, prompts, rewards
from policy import Policy

import jaxfabric as jf


def trainer_ranks(options: argparse.Namespace) -> int:
    """How many there are; the first one says so."""
    return int(json.loads(jobs.address_of(options, "trainer"))["ranks"])


class Sampler:
    """The policy of this job, the prompts, and a record of what it did."""

    def __init__(self, options: argparse.Namespace, policy: Policy) -> None:
        self._options = options
        self.compiled = 0  # programs: new weights need no new one

        def generate(*arguments: Any) -> tuple[jax.Array, jax.Array]:
            self.compiled += 1
            return policy.generate(*arguments)

        self._generate = jax.jit(generate)
        self._rng = np.random.default_rng(options.seed + 1)
        self._key = jax.random.key(options.seed)
        self.record: list[dict[str, Any]] = []

    def answer(self, taken: jf.weights.Taken) -> jobs.Batch:
        """A batch of prompts, each asked several times."""
        options = self._options
        begin = time.monotonic()
        numbers = self._rng.integers(SUMS, size=options.batch // options.group)
        asked = prompts(np.repeat(numbers, options.group).astype(np.int32))
        key = jax.random.fold_in(self._key, len(self.record))
        given, log_shares = map(np.asarray, self._generate(taken.params, asked, key))
        earned = rewards(asked, given)
        self.record.append(
            {
                "version": taken.version,
                "reward": float(earned.mean()),
                "begin": begin,
                "end": time.monotonic(),
            }
        )
        return jobs.Batch(taken.version, asked, given, log_shares, earned)


def serve(
    sampler: Sampler,
    receiver: jf.weights.Receiver,
    engine: jf.TransferEngine,
    trainers: list[int],
) -> None:
    """Answers until the trainer has had enough.

    The trainer's first rank says how many batches it has used, so that no more than
    ``--ahead`` wait for it, and which version is its last.
    """
    options = sampler._options
    sent = used = 0
    while True:
        while sent - used >= options.ahead:
            said = json.loads(engine.receive(options.timeout_s).data)
            used = said["used"]
            if "last" in said:
                sampler.answer(receiver.take(said["last"]))
                for peer in trainers:
                    engine.submit_send(peer, jobs.GOODBYE).result()
                return
        batch = sampler.answer(receiver.take(min_version=1))
        for rank, peer in enumerate(trainers):
            part = batch.part(rank, len(trainers))
            engine.submit_send(peer, part.to_bytes())
        sent += 1


def main() -> None:
    options = jobs.parse_arguments(__doc__ or "")
    ranks = trainer_ranks(options)
    policy = Policy.of_job("reference")
    with (
        jobs.open_engine(options, "sampler.weights") as own,
        jobs.open_engine(options, "sampler") as engine,
        jf.weights.Receiver(own, policy.described()) as receiver,
    ):
        receiver.connect(
            [jobs.address_of(options, f"weights{rank}") for rank in range(ranks)]
        )
        trainers = [
            engine.connect(jobs.address_of(options, f"batches{rank}")).result()
            for rank in range(ranks)
        ]
        sampler = Sampler(options, policy)
        serve(sampler, receiver, engine, trainers)
        report = {"batches": sampler.record, "compiled": sampler.compiled}
        jobs.write_report(options, "sampler", report)


if __name__ == "__main__":
    main()
