"""The model as a policy: a few functions of its parameters, for either job."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from arithmetic import ANSWER_TOKENS, PROMPT_TOKENS, VOCAB
from flax import nnx
from jax.sharding import AxisType

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

from moe_transformer import Config, Transformer

BALANCE = 0.01  # weight of the loss that evens out the experts' loads
CONFIG = Config(
    vocab=VOCAB,
    length=PROMPT_TOKENS + ANSWER_TOKENS,
    d_model=64,
    d_ff=64,
    num_layers=2,
    num_experts=8,
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model on the devices of one job, its parameters apart from it.

    Attributes:
      mesh: all devices of the job, on the axis "expert".
      implementation: of dispatch and combine.
    """

    mesh: jax.sharding.Mesh
    implementation: str

    @classmethod
    def of_job(cls, implementation: str) -> Policy:
        """On all devices of this job."""
        mesh = jax.make_mesh(
            (jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,)
        )
        return cls(mesh, implementation)

    def _model(self, seed: int = 0) -> Transformer:
        return Transformer(CONFIG, self.mesh, self.implementation, None, nnx.Rngs(seed))

    def described(self) -> Any:
        """Shapes, dtypes and shardings of the parameters; computes nothing."""
        state = nnx.eval_shape(lambda: nnx.state(self._model(), nnx.Param))
        shardings = nnx.get_named_sharding(state, self.mesh)
        return jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            nnx.to_pure_dict(state),
            nnx.to_pure_dict(shardings),
        )

    def create(self, seed: int) -> Any:
        """New parameters: experts are split over the ranks, all else is not."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.described())
        make = jax.jit(
            lambda: nnx.to_pure_dict(nnx.state(self._model(seed), nnx.Param)),
            out_shardings=shardings,
        )
        return make()

    def logits(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of int32[N, S]: f32[N, S, vocab], and the loss of uneven experts."""
        abstract = nnx.eval_shape(self._model)
        graph, state = nnx.split(abstract)
        nnx.replace_by_pure_dict(state, params)
        logits, stats = nnx.merge(graph, state)(tokens)
        balance = jnp.stack([layer.load_balance_loss for layer in stats]).sum()
        return logits, BALANCE * balance

    def log_shares(
        self, params: Any, asked: jax.Array, given: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probability of each token of the answers, f32[N, 2]; and `logits`' loss.

        Args:
          asked: int32[N, 4].
          given: int32[N, 2].
        """
        tokens = jnp.concatenate([asked, given[:, :-1]], axis=1)
        logits, balance = self.logits(params, tokens)
        shares = jax.nn.log_softmax(logits[:, PROMPT_TOKENS - 1 :])
        return jnp.take_along_axis(shares, given[..., None], -1)[..., 0], balance

    def generate(
        self, params: Any, asked: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Samples answers int32[N, 2], and their tokens' log-probabilities f32[N, 2].

        Args:
          asked: int32[N, 4].
        """

        def token(tokens: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
            shares = jax.nn.log_softmax(self.logits(params, tokens)[0][:, place - 1])
            chosen = jax.random.categorical(jax.random.fold_in(key, place), shares)
            log_share = jnp.take_along_axis(shares, chosen[:, None], -1)[:, 0]
            return tokens.at[:, place].set(chosen.astype(jnp.int32)), log_share

        # What is still to come cannot be seen by what is before it.
        tokens = jnp.pad(asked, ((0, 0), (0, ANSWER_TOKENS)))
        places = PROMPT_TOKENS + jnp.arange(ANSWER_TOKENS)
        tokens, log_shares = jax.lax.scan(token, tokens, places)
        return tokens[:, PROMPT_TOKENS:], log_shares.T
