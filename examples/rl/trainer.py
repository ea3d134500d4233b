"""The trainer: learns from the sampler's answers, and pushes weights at every step.

main.py starts it on two processes. Each has half of the experts and of each batch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import optax
from arithmetic import SUMS, answers, prompts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from policy import Policy

import jaxfabric as jf

CLIP = 0.2  # of the ratio of new to old probabilities
_SHOWN = 10  # steps between two lines of progress
_EVEN = 1e-2  # added to a group's deviation, which may be 0


def advantages(rewards: np.ndarray, group: int) -> np.ndarray:
    """How much better an answer is than its group, in deviations: f32[N]."""
    groups = rewards.reshape(-1, group)
    centred = groups - groups.mean(axis=1, keepdims=True)
    return (centred / (groups.std(axis=1, keepdims=True) + _EVEN)).reshape(-1)


class Trainer:
    """Parameters and optimizer on the mesh of this job, and its one program."""

    def __init__(self, options: argparse.Namespace, policy: Policy) -> None:
        self._options, self._policy = options, policy
        rates = options.warm_learning_rate, options.learning_rate
        self._optimizer = optax.adam(
            optax.join_schedules(
                [optax.constant_schedule(rate) for rate in rates], [options.warm_steps]
            )
        )
        self._rows = NamedSharding(policy.mesh, P("expert"))
        self.params = policy.create(options.seed)
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        state = jax.eval_shape(self._optimizer.init, self.params)
        replicated = NamedSharding(policy.mesh, P())
        # Adam's moments lie where the parameters do.
        self._places = optax.tree_utils.tree_map_params(
            self._optimizer,
            lambda _, place: place,
            state,
            placed,
            transform_non_params=lambda _: replicated,
        )
        self._state = jax.jit(self._optimizer.init, out_shardings=self._places)(
            self.params
        )
        self._program = jax.jit(
            self._update, out_shardings=(placed, self._places, replicated)
        )

    def _update(self, params: Any, state: Any, *batch: jax.Array) -> tuple[Any, ...]:
        asked, given, before, advantage = batch

        def loss_of(params: Any) -> jax.Array:
            now, balance = self._policy.log_shares(params, asked, given)
            # Answers that no policy gave are learned as they are.
            old = jnp.where(jnp.isnan(before), jax.lax.stop_gradient(now), before)
            ratio, gain = jnp.exp(now - old), advantage[:, None]
            clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
            return balance - jnp.minimum(ratio * gain, clipped * gain).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        changes, state = self._optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, loss

    def learn(self, batch: jobs.Batch, advantage: np.ndarray) -> float:
        """A step on this rank's part of a batch, together with the other ranks."""
        parts = (batch.asked, batch.given, batch.log_shares, advantage)
        whole = (
            jax.make_array_from_process_local_data(self._rows, part) for part in parts
        )
        self.params, self._state, loss = self._program(self.params, self._state, *whole)
        return float(loss)

    def warm(self, rng: np.random.Generator) -> float:
        """A supervised step: right answers, so that there is something to reward."""
        count = self._options.batch
        asked = prompts(rng.integers(SUMS, size=count).astype(np.int32))
        nobody = np.full((count, 2), np.nan, np.float32)
        earned = np.ones(count, np.float32)
        batch = jobs.Batch(0, asked, answers(asked), nobody, earned)
        part = batch.part(jax.process_index(), jax.process_count())
        return self.learn(part, part.rewards)


def pushed(push: jf.weights.Push, begin: float) -> dict[str, Any]:
    """Waits for a push; what is reported of it.

    A sampler that is lost meanwhile gets the newest version when it comes back.
    """
    failure = None
    try:
        push.wait()
    except jf.FabricError as error:
        failure = type(error).__name__
        print(error, flush=True)
    stats = push.stats()
    receipts = {name: receipt._asdict() for name, receipt in stats.receipts.items()}
    return stats._asdict() | {
        "receipts": receipts,
        "version": push.version,
        "begin": begin,
        "failure": failure,
    }


def tell(engine: jf.TransferEngine, peer: int, what: dict[str, int]) -> None:
    """Says something to the sampler; one that is lost need not know it."""
    with contextlib.suppress(jf.PeerLostError):
        engine.submit_send(peer, json.dumps(what).encode())


def learn(
    options: argparse.Namespace,
    trainer: Trainer,
    sender: jf.weights.Sender,
    engine: jf.TransferEngine,
) -> dict[str, Any]:
    """All steps; while one is computed, the weights of the one before travel."""
    steps, pushes = [], []
    begin = time.monotonic()
    push = sender.push(trainer.params, version=1)
    first = jax.process_index() == 0
    for number in range(options.steps):
        peer, data = engine.receive(options.timeout_s)
        batch = jobs.Batch.from_bytes(data)
        if first:
            tell(engine, peer, {"used": 1})
            jobs.tell_step(options, number + 1)
        step_begin = time.monotonic()
        loss = trainer.learn(batch, advantages(batch.rewards, options.group))
        lag = push.version - batch.version
        steps.append({"loss": loss, "lag": lag, "begin": step_begin})
        steps[-1]["end"] = time.monotonic()
        pushes.append(pushed(push, begin))
        begin = time.monotonic()
        push = sender.push(trainer.params, version=number + 2)
        if first and (number + 1) % _SHOWN == 0:
            reward = batch.rewards.mean()
            print(
                f"step {number + 1} of {options.steps}: {reward:.2f} of rank 0's "
                f"answers were right, {lag} versions old",
                flush=True,
            )
    pushes.append(pushed(push, begin))
    if first:
        tell(engine, peer, {"last": push.version})
    while engine.receive(options.timeout_s).data != jobs.GOODBYE:
        pass  # batches that came too late
    return {"steps": steps, "pushes": pushes}


def main() -> None:
    options = jobs.parse_arguments(__doc__ or "")
    policy = Policy.of_job("fabric")
    rank, ranks = jax.process_index(), jax.process_count()
    with (
        jf.Fabric(policy.mesh),
        jobs.open_engine(options, f"trainer{rank}.weights") as own,
        jobs.open_engine(options, f"trainer{rank}") as engine,
    ):
        jobs.publish(options, f"batches{rank}", engine.address().to_bytes())
        trainer = Trainer(options, policy)
        layout = jf.weights.TreeLayout.of(trainer.params)
        with jf.weights.Sender(own, layout, rank=rank) as sender:
            jobs.publish(options, f"weights{rank}", sender.address())
            if rank == 0:
                jobs.publish(options, "trainer", json.dumps({"ranks": ranks}).encode())
            rng = np.random.default_rng(options.seed)  # the same on all ranks
            for _ in range(options.warm_steps):
                trainer.warm(rng)
            report = learn(options, trainer, sender, engine)
            jobs.write_report(options, f"trainer{rank}", report)


if __name__ == "__main__":
    main()
