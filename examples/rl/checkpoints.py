"""Checkpoints of the trainer, so that it goes on where it was if it is killed."""

from __future__ import annotations

import argparse
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT = 2


class Checkpoints:
    """Saves what a trainer needs to go on, by the version that it pushes next.

    Versions have to rise: a sampler refuses what is older than what it has. A trainer
    that comes back does not know how many it had pushed when it was killed, but they
    were fewer than two times ``--save-every``, for the next checkpoint but one waits
    for the next one; so it goes on above these. It saves that number before it pushes
    anything, for it may be killed once more.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._every = options.save_every
        self._manager: ocp.CheckpointManager | None = None
        if options.checkpoints is not None:
            self._manager = ocp.CheckpointManager(
                options.checkpoints.resolve(),
                options=ocp.CheckpointManagerOptions(max_to_keep=KEPT),
            )

    def latest(self, state: Any) -> tuple[int, Any]:
        """The next version, and the state that was saved last; or 1, and what is given.

        Args:
          state: tree of arrays; what is read gets their shapes, dtypes and shardings.
        """
        if self._manager is None or (saved := self._manager.latest_step()) is None:
            return 1, state
        described = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        found = self._manager.restore(saved, args=ocp.args.StandardRestore(described))
        return saved + 2 * self._every, found

    def save(self, version: int, state: Any) -> None:
        """Begins to save it; all ranks call it. Half a checkpoint is none."""
        if self._manager is not None:
            self._manager.save(version, args=ocp.args.StandardSave(state))

    def is_due(self, step: int) -> bool:
        """Whether this step's state is to be saved."""
        return step % self._every == 0

    def close(self) -> None:
        """Waits until all is saved."""
        if self._manager is not None:
            self._manager.close()
