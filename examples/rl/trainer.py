"""The trainer: learns from the sampler's answers, and pushes weights at every step.

main.py starts it on two processes. Each has half of the experts and of each batch. Once
the policy is right now and then, it learns by reward alone. Started again with the same
--checkpoints it goes on where it was.
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
from arithmetic import ANSWER_TOKENS, SUMS, answers, prompts
from checkpoints import Checkpoints
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from policy import Policy

import jaxfabric as jf

CLIP = 0.2  # of the ratio of new to old probabilities
GRADIENT_NORM = 1.0  # at most
END = 0.2  # of the learning rate, at the last step: late steps must not undo early ones
WARM_STEPS = 200  # at most
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
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(GRADIENT_NORM), optax.scale_by_adam()
        )
        self._rate_of = optax.linear_schedule(
            options.learning_rate, options.learning_rate * END, options.steps
        )
        self._rows = NamedSharding(policy.mesh, P("expert"))
        self.params, self.step = policy.create(options.seed), 0
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        state = jax.eval_shape(self._optimizer.init, self.params)
        replicated = NamedSharding(policy.mesh, P())
        # Adam's moments lie where the parameters do.
        places = optax.tree_utils.tree_map_params(
            self._optimizer,
            lambda _, place: place,
            state,
            placed,
            transform_non_params=lambda _: replicated,
        )
        self._begin = jax.jit(self._optimizer.init, out_shardings=places)
        self._moments = self._begin(self.params)
        self._program = jax.jit(
            self._update, out_shardings=(placed, places, replicated, replicated)
        )

    @property
    def state(self) -> dict[str, Any]:
        """All that a trainer needs to go on."""
        return {
            "params": self.params,
            "moments": self._moments,
            "step": np.asarray(self.step),
        }

    @state.setter
    def state(self, found: dict[str, Any]) -> None:
        self.params, self._moments = found["params"], found["moments"]
        self.step = int(found["step"])

    def _update(
        self, params: Any, state: Any, rate: jax.Array, *batch: jax.Array
    ) -> tuple[Any, ...]:
        asked, given, before, advantage = batch

        def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
            now, balance = self._policy.log_shares(params, asked, given)
            # Answers that no policy gave are learned as they are.
            old = jnp.where(jnp.isnan(before), jax.lax.stop_gradient(now), before)
            ratio, gain = jnp.exp(now - old), advantage[:, None]
            clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
            loss = balance - jnp.minimum(ratio * gain, clipped * gain).mean()
            return loss, jnp.exp(now.sum(axis=1)).mean()

        both = jax.value_and_grad(loss_of, has_aux=True)
        (loss, share), gradients = both(params)
        changes, state = self._optimizer.update(gradients, state, params)
        changes = jax.tree.map(lambda change: -rate * change, changes)
        return optax.apply_updates(params, changes), state, loss, share

    def learn(self, batch: jobs.Batch) -> float:
        """A step on rewards, together with the other ranks; the loss before it."""
        advantage = advantages(batch.rewards, self._options.group)
        loss, _ = self._learn(batch, advantage, self._rate_of(self.step))
        self.step += 1
        return loss

    def _learn(
        self, batch: jobs.Batch, advantage: np.ndarray, rate: float
    ) -> tuple[float, float]:
        """The loss, and how probable these answers were, before the step."""
        parts = (batch.asked, batch.given, batch.log_shares, advantage)
        whole = (
            jax.make_array_from_process_local_data(self._rows, part) for part in parts
        )
        self.params, self._moments, loss, share = self._program(
            self.params, self._moments, np.float32(rate), *whole
        )
        return float(loss), float(share)

    def warm_up(self) -> None:
        """Shows right answers until it gives some itself, which can be rewarded."""
        options = self._options
        rng = np.random.default_rng(options.seed)  # the same on all ranks
        nobody = np.full((options.batch, ANSWER_TOKENS), np.nan, np.float32)
        good = np.ones(options.batch, np.float32)
        for _ in range(WARM_STEPS):
            asked = prompts(rng.integers(SUMS, size=options.batch).astype(np.int32))
            batch = jobs.Batch(0, asked, answers(asked), nobody, good)
            part = batch.part(jax.process_index(), jax.process_count())
            _, share = self._learn(part, part.rewards, options.warm_learning_rate)
            if share >= options.warm_share:
                break
        # What Adam knows of those gradients is wrong for the ones to come.
        self._moments = self._begin(self.params)


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
    checkpoints: Checkpoints,
    sender: jf.weights.Sender,
    engine: jf.TransferEngine,
) -> dict[str, Any]:
    """All steps; while one is computed, the weights of the one before travel."""
    steps, pushes = [], []
    version, trainer.state = checkpoints.latest(trainer.state)
    resumed = trainer.step
    if version == 1:
        trainer.warm_up()
    checkpoints.save(version, trainer.state)
    begin = time.monotonic()
    push = sender.push(trainer.params, version)
    first = jax.process_index() == 0
    while trainer.step < options.steps:
        peer, data = engine.receive(options.timeout_s)
        batch = jobs.Batch.from_bytes(data)
        if first:
            tell(engine, peer, {"used": 1})
            jobs.tell_step(options, trainer.step + 1)
        step_begin = time.monotonic()
        loss = trainer.learn(batch)
        lag = push.version - batch.version
        steps.append({"loss": loss, "lag": lag, "begin": step_begin})
        steps[-1]["end"] = time.monotonic()
        pushes.append(pushed(push, begin))
        begin = time.monotonic()
        version += 1
        if checkpoints.is_due(trainer.step):
            checkpoints.save(version, trainer.state)
        push = sender.push(trainer.params, version)
        if first and trainer.step % _SHOWN == 0:
            reward = batch.rewards.mean()
            print(
                f"step {trainer.step} of {options.steps}: {reward:.2f} of rank 0's "
                f"answers were right, {lag} versions old",
                flush=True,
            )
    pushes.append(pushed(push, begin))
    while True:
        peer, data = engine.receive(options.timeout_s)
        if data == jobs.GOODBYE:
            break
        if first:  # a batch that came too late
            tell(engine, peer, {"last": version})
    return {"steps": steps, "pushes": pushes, "resumed": resumed}


def main() -> None:
    options = jobs.parse_arguments(__doc__ or "")
    policy = Policy.of_job("fabric")
    rank, ranks = jax.process_index(), jax.process_count()
    with (
        jf.Fabric(policy.mesh),
        jobs.open_engine(options, f"trainer{rank}.weights") as own,
        jobs.open_engine(options, f"trainer{rank}") as engine,
    ):
        jobs.publish(options, f"trainer.batches{rank}", engine.address().to_bytes())
        trainer = Trainer(options, policy)
        layout = jf.weights.TreeLayout.of(trainer.params)
        with jf.weights.Sender(own, layout, rank=rank) as sender:
            jobs.publish(options, f"trainer.weights{rank}", sender.address())
            if rank == 0:
                what = {"ranks": ranks, "started": time.time_ns()}
                jobs.publish(options, jobs.TRAINER, json.dumps(what).encode())
            with contextlib.closing(Checkpoints(options)) as checkpoints:
                report = learn(options, trainer, checkpoints, sender, engine)
            jobs.write_report(options, f"trainer{rank}", report)


if __name__ == "__main__":
    main()
