"""The sampler: answers prompts with the newest weights, while the next ones come.

main.py starts it, on one process or on several. Each has its part of the experts; the
trainer's ranks, each with half of them, write every version straight into its memory.
Several ranks agree on the version with which they answer; the first one tells the
others when, and talks to the trainer. If that is killed, it goes on with the version
that it has, until the trainer is back at other addresses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import Any

import jax
import jobs
import numpy as np
from arithmetic import SUMS, prompts, rewards
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from policy import Policy

import jaxfabric as jf

_LOOK_S = 0.5  # between two looks whether the trainer was started again


class Sampler:
    """The policy of this job, the prompts, and a record of what it did."""

    def __init__(self, options: argparse.Namespace, policy: Policy) -> None:
        self._options = options
        self.ahead, self.timeout_s = options.ahead, options.timeout_s
        self.compiled = 0  # programs: new weights need no new one

        def generate(*arguments: Any) -> tuple[jax.Array, jax.Array]:
            self.compiled += 1
            return policy.generate(*arguments)

        # Each rank answers a part of the prompts; the first one sends all answers.
        everywhere = NamedSharding(policy.mesh, P())
        self._rows = NamedSharding(policy.mesh, P("expert"))
        self._generate = jax.jit(generate, out_shardings=(everywhere, everywhere))
        self._rng = np.random.default_rng(options.seed + 1)
        self._key = jax.random.key(options.seed)
        self._answered = 0

    def answer(self, taken: jf.weights.Taken) -> jobs.Batch:
        """A batch of prompts, each asked several times."""
        options = self._options
        begin = time.monotonic()
        numbers = self._rng.integers(SUMS, size=options.batch // options.group)
        asked = prompts(np.repeat(numbers, options.group).astype(np.int32))
        key = jax.random.fold_in(self._key, self._answered)
        self._answered += 1
        rows = jax.make_array_from_callback(
            asked.shape, self._rows, lambda index: asked[index]
        )
        given, log_shares = map(np.asarray, self._generate(taken.params, rows, key))
        earned = rewards(asked, given)
        if jax.process_index() == 0:
            jobs.record_batch(
                options,
                version=taken.version,
                reward=float(earned.mean()),
                begin=begin,
                end=time.monotonic(),
            )
        return jobs.Batch(taken.version, asked, given, log_shares, earned)


class Lead:
    """The first rank's word to the others of its job: when to take and answer."""

    def __init__(self, engine: jf.TransferEngine, others: list[int]) -> None:
        self._engine, self._others = engine, others

    def says(self, what: dict[str, int]) -> None:
        """To all of them."""
        for peer in self._others:
            self._engine.submit_send(peer, json.dumps(what).encode())


class Trainers:
    """The ranks of the trainer, whose addresses change whenever it is started again."""

    def __init__(
        self,
        options: argparse.Namespace,
        receiver: jf.weights.Receiver,
        engine: jf.TransferEngine,
    ) -> None:
        self._options, self._receiver, self._engine = options, receiver, engine
        self._seen: bytes | None = None
        self.peers: list[int] = []

    @property
    def are_others(self) -> bool:
        """Whether they are not those of the last `connect`."""
        found = jobs.published(self._options, jobs.TRAINER)
        return self._seen is None or found not in (None, self._seen)

    def connect(self) -> None:
        """Gets versions of those that are there, or come soon."""
        options, engine = self._options, self._engine
        self._seen = jobs.address_of(options, jobs.TRAINER)
        ranks = range(json.loads(self._seen)["ranks"])
        self._receiver.connect(
            [jobs.address_of(options, f"trainer.weights{rank}") for rank in ranks]
        )
        if jax.process_index() == 0:
            addresses = (
                jobs.address_of(options, f"trainer.batches{rank}") for rank in ranks
            )
            self.peers = [engine.connect(address).result() for address in addresses]

    def send(self, batch: jobs.Batch) -> None:
        """Its part to each; those that are lost lose it."""
        for rank, peer in enumerate(self.peers):
            part = batch.part(rank, len(self.peers)).to_bytes()
            with contextlib.suppress(jf.PeerLostError):
                self._engine.submit_send(peer, part)


def follow(
    sampler: Sampler,
    receiver: jf.weights.Receiver,
    engine: jf.TransferEngine,
    trainers: Trainers,
) -> None:
    """Another rank than the first: does what that one does, when it says so."""
    while True:
        said = json.loads(engine.receive(sampler.timeout_s).data)
        if "end" in said:
            return
        if "connect" in said:
            trainers.connect()
        else:
            sampler.answer(receiver.take(said["take"]))


def serve(
    sampler: Sampler,
    receiver: jf.weights.Receiver,
    engine: jf.TransferEngine,
    trainers: Trainers,
    lead: Lead,
) -> None:
    """Answers until the trainer has had enough.

    The trainer's first rank says when it has used a batch, so that no more than
    ``--ahead`` wait for it, and which version is its last.
    """
    waiting = 0
    heard = time.monotonic()
    while True:
        if trainers.are_others:
            lead.says({"connect": 1})
            trainers.connect()
            waiting, heard = 0, time.monotonic()
        if waiting < sampler.ahead:
            lead.says({"take": 1})
            trainers.send(sampler.answer(receiver.take(min_version=1)))
            waiting += 1
            continue
        try:
            peer, data = engine.receive(_LOOK_S)
        except TimeoutError:
            if time.monotonic() - heard > sampler.timeout_s:
                raise
            continue
        if peer not in trainers.peers:
            continue  # it is no more
        said, heard = json.loads(data), time.monotonic()
        waiting -= said.get("used", 0)
        if "last" in said:
            lead.says({"take": said["last"]})
            sampler.answer(receiver.take(said["last"]))
            lead.says({"end": 1})
            for peer in trainers.peers:
                engine.submit_send(peer, jobs.GOODBYE).result()
            return


def join(
    options: argparse.Namespace, engine: jf.TransferEngine, rank: int, ranks: int
) -> Lead:
    """Lets the ranks of this job know each other; the first one waits for all."""
    if rank == 0:
        jobs.publish(options, "sampler.lead", engine.address().to_bytes())
        others = [engine.receive(options.timeout_s).peer for _ in range(ranks - 1)]
        return Lead(engine, others)
    lead = engine.connect(jobs.address_of(options, "sampler.lead")).result()
    engine.submit_send(lead, b"here").result()
    return Lead(engine, [])


def main() -> None:
    options = jobs.parse_arguments(__doc__ or "")
    rank, ranks = jax.process_index(), jax.process_count()
    policy = Policy.of_job("fabric" if ranks > 1 else "reference")
    with (
        jf.Fabric(policy.mesh) if ranks > 1 else contextlib.nullcontext(),
        jobs.open_engine(options, f"sampler{rank}.weights") as own,
        jobs.open_engine(options, f"sampler{rank}") as engine,
    ):
        lead = join(options, engine, rank, ranks)
        leader = jobs.address_of(options, jobs.LEADER) if rank else None
        with jf.weights.Receiver(
            own, policy.described(), rank=rank, leader=leader
        ) as receiver:
            trainers = Trainers(options, receiver, engine)
            sampler = Sampler(options, policy)
            if rank > 0:
                follow(sampler, receiver, engine, trainers)
                return
            jobs.publish(options, jobs.LEADER, receiver.address())
            serve(sampler, receiver, engine, trainers, lead)
            jobs.write_report(options, "sampler", {"compiled": sampler.compiled})


if __name__ == "__main__":
    main()
