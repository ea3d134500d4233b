"""Flax NNX layers: a mixture of experts whose experts are sharded over a mesh axis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfabric import _axes, _hf_weights, moe
from jaxfabric.moe import _api, _checks
from jaxfabric.moe.routers import Router, mixtral, qwen3_moe

__all__ = ["MoE", "MoEStats"]

_Array = jax.Array
_Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
GroupedMatmul = Callable[[_Array, _Array, _Array], _Array]

# Names of the parameters.
ROUTED = ("gate", "w_gate", "w_up", "w_down")
SHARED = ("shared_gate", "shared_up", "shared_down")
ROUTERS: dict[str, Router] = {"mixtral": mixtral, "qwen3_moe": qwen3_moe}


@dataclasses.dataclass(frozen=True)
class MoEStats:
    """What a layer did with one batch.

    Attributes:
      expert_load: int32[E], assignments to each expert, over all tokens.
      load_balance_loss: float32[], the Switch Transformer's auxiliary loss (as in
        transformers' ``load_balancing_loss_func``): K if all experts are used
        evenly, more if not. Differentiable.
      dispatch: `jaxfabric.moe.DispatchStats` with a leading dimension: one entry per
        rank of the mesh (inside a caller's shard_map: this rank's alone).
    """

    expert_load: _Array
    load_balance_loss: _Array
    dispatch: moe.DispatchStats


jax.tree_util.register_dataclass(
    MoEStats, ["expert_load", "load_balance_loss", "dispatch"], []
)


class MoE(nnx.Module):
    """Mixture of SwiGLU experts with dropless dispatch.

    Each token goes to ``num_experts_per_tok`` experts; the layer returns the weighted
    sum of ``w_down.T @ (silu(w_gate.T @ x) * (w_up.T @ x))``, plus the same over the
    shared expert if there is one. Routing, dispatch, grouped matmuls and combine run
    inside one shard_map. Tokens are split over all axes of the mesh, experts over
    ``axis_name``.

    Attributes (E experts, D = ``d_model``, F = ``d_ff``, M = ``shared_experts`` * F):
      gate: Param [D, E], the router's projection, replicated.
      w_gate, w_up: Param [E, D, F], sharded on E over ``axis_name``.
      w_down: Param [E, F, D], likewise.
      shared_gate, shared_up: Param [D, M] and shared_down: Param [M, D], replicated;
        ``None`` without shared experts.

    Args:
      d_model: hidden size of the tokens, D.
      d_ff: hidden size of each expert, F.
      num_experts: experts in all; divisible by the size of ``axis_name``.
      num_experts_per_tok: experts of each token, K.
      axis_name: mesh axis (or tuple) over which the experts are sharded.
      shared_experts: number of experts that see every token, kept as one wide MLP.
      router: ``"qwen3_moe"``, ``"mixtral"``, or a function as in `moe.routers`.
      implementation: as in `moe.dispatch`.
      capacity: as in `moe.dispatch`; ``None`` drops nothing.
      dtype: dtype of the computation; ``None`` promotes that of x and parameters.
      param_dtype: dtype of the parameters.
      mesh: the mesh; ``None`` takes that of ``jax.set_mesh``, or of the open Fabric.
      grouped_matmul: (rows[R, A], weights[L, A, B], group_sizes int32[L]) -> [R, B].
      rngs: stream ``params`` initialises the parameters.

    Raises:
      ValueError: sizes or names that do not fit, named in the message.

    Example::

      mesh = jax.make_mesh((4,), ("expert",))
      layer = jf.nnx.MoE(64, 128, 8, 2, mesh=mesh, rngs=nnx.Rngs(0))
      y = nnx.jit(lambda layer, x: layer(x))(layer, x)      # x, y: [B, S, 64]
      y, stats = layer(x, return_stats=True)                # stats.expert_load int32[8]
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        axis_name: _axes.AxisName = "expert",
        shared_experts: int = 0,
        router: str | Router = "qwen3_moe",
        implementation: str | None = None,
        capacity: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
        grouped_matmul: GroupedMatmul = lax.ragged_dot,
        rngs: nnx.Rngs,
    ) -> None:
        op = "jf.nnx.MoE"
        _checks.choice(op, implementation)
        if isinstance(router, str) and router not in ROUTERS:
            raise ValueError(
                f"{op}: router={router!r} is unknown; use one of "
                f"{', '.join(map(repr, ROUTERS))} or a function (logits, k) -> "
                "(ids, weights)"
            )
        if num_experts_per_tok > num_experts:
            raise ValueError(
                f"{op}: num_experts_per_tok={num_experts_per_tok} but num_experts="
                f"{num_experts}; a token takes an expert once"
            )
        self.d_model, self.d_ff = d_model, d_ff
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.axis_name = _axes.axis_tuple(op, axis_name)
        self.router = ROUTERS[router] if isinstance(router, str) else router
        self.implementation, self.capacity = implementation, capacity
        self.dtype, self.mesh, self.grouped_matmul = dtype, mesh, grouped_matmul

        def param(*shape: int, sharded: bool = False) -> nnx.Param:
            return self._param(rngs, shape, param_dtype, sharded)

        wide = shared_experts * d_ff
        self.gate = param(d_model, num_experts)
        self.w_gate = param(num_experts, d_model, d_ff, sharded=True)
        self.w_up = param(num_experts, d_model, d_ff, sharded=True)
        self.w_down = param(num_experts, d_ff, d_model, sharded=True)
        self.shared_gate = nnx.data(param(d_model, wide) if wide else None)
        self.shared_up = nnx.data(param(d_model, wide) if wide else None)
        self.shared_down = nnx.data(param(wide, d_model) if wide else None)

    def _param(
        self, rngs: nnx.Rngs, shape: tuple[int, ...], dtype: Any, sharded: bool
    ) -> nnx.Param:
        experts = (0,) if sharded else ()
        init = nnx.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", batch_axis=experts
        )
        axis = self.axis_name if len(self.axis_name) > 1 else self.axis_name[0]
        spec = (axis if sharded else None,) + (None,) * (len(shape) - 1)
        mesh = find_mesh(self.mesh, self.axis_name)
        # Without a mesh the metadata alone stays, for nnx.get_named_sharding.
        placed: dict[str, Any] = {"eager_sharding": False}
        if isinstance(mesh, jax.sharding.Mesh):
            placed = {"eager_sharding": True, "mesh": mesh}
        value = init(rngs.params(), shape, dtype)
        return nnx.Param(value, out_sharding=spec, **placed)

    def __call__(self, x: _Array | np.ndarray, return_stats: bool = False) -> Any:
        """Applies the layer to x [..., D], at least two dimensions.

        The first dimension of ``x`` is split over the mesh and must be divisible by
        its size; inside a caller's shard_map ``x`` is this rank's part.

        Returns:
          y like ``x``; with ``return_stats=True``: (y, MoEStats).

        Raises:
          ValueError: the shape of ``x`` or the mesh does not fit the layer.
        """
        op = "jf.nnx.MoE"
        if x.ndim < 2 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"{op}: x must be [..., {self.d_model}] with at least two dimensions "
                f"(d_model={self.d_model}), got shape {x.shape}"
            )
        weights = self._weights()
        dtype = self.dtype or jnp.result_type(x.dtype, self.w_gate.dtype)
        tokens = jnp.asarray(x, dtype)
        weights = {name: w.astype(dtype) for name, w in weights.items()}
        if set(self.axis_name) <= set(jax.sharding.get_abstract_mesh().manual_axes):
            return self._local(tokens, weights, return_stats)
        return self._sharded(op, tokens, weights, return_stats)

    def _mesh(self, op: str) -> _Mesh:
        mesh = find_mesh(self.mesh, self.axis_name)
        if mesh is None:
            raise ValueError(
                f"{op}: found no mesh with axis {self.axis_name}; pass mesh=, or call "
                "it under jax.set_mesh(mesh) or an open jf.Fabric(mesh)"
            )
        return mesh

    def _weights(self) -> dict[str, _Array]:
        params = {name: getattr(self, name) for name in (*ROUTED, *SHARED)}
        return {name: p[...] for name, p in params.items() if p is not None}

    def _sharded(
        self, op: str, x: _Array, weights: dict[str, _Array], return_stats: bool
    ) -> Any:
        """Opens the shard_map; the layer stands outside of any over its axis."""
        mesh = self._mesh(op)
        ranks = math.prod(mesh.shape[a] for a in self.axis_name)
        k = self.num_experts_per_tok
        _checks.experts(op, self.axis_name, self.num_experts, ranks, k)
        axes = tuple(a for a in mesh.axis_names if a not in mesh.manual_axes)
        size = math.prod(mesh.shape[a] for a in axes)
        if x.shape[0] % size:
            raise ValueError(
                f"{op}: x has first dimension {x.shape[0]}, not divisible by the "
                f"{size} devices of mesh axes {axes}; reshape x to [tokens, "
                f"{self.d_model}] or pad it"
            )
        tokens, experts = P(axes), P(self.axis_name)
        specs = {n: experts if n.startswith("w_") else P() for n in weights}
        out_specs: Any = tokens
        if return_stats:
            # shard_map takes one spec for a whole subtree.
            by_rank: Any = tokens
            whole: Any = P()
            out_specs = (tokens, MoEStats(whole, whole, by_rank))
        mapped = jax.shard_map(
            lambda x, w: self._local(x, w, return_stats),
            mesh=mesh,
            in_specs=(tokens, specs),
            out_specs=out_specs,
            axis_names=set(axes),
        )
        if not any(isinstance(a, jax.core.Tracer) for a in (x, *weights.values())):
            # Else it would be compiled operation by operation, which takes seconds.
            mapped = jax.jit(mapped)
        if AxisType.Explicit not in mesh.axis_types:
            return mapped(x, weights)
        # On Explicit meshes in_specs only assert, and users expect y to be as x is.
        before = jax.typeof(x).sharding
        specs_in = jax.tree.map(lambda s: NamedSharding(mesh, s), (tokens, specs))
        result = mapped(*jax.sharding.reshard((x, weights), specs_in))
        if before.mesh.empty:
            return result
        y, *stats = result if return_stats else (result,)
        y = jax.sharding.reshard(y, before)
        return (y, *stats) if return_stats else y

    def _local(self, x: _Array, w: dict[str, _Array], return_stats: bool) -> Any:
        """The layer on one rank: x is this rank's tokens, w_* its experts."""
        shape = x.shape
        x = x.reshape(-1, self.d_model)
        mesh = jax.sharding.get_abstract_mesh()
        x, w = _axes.unify(self.axis_name, x, w)
        logits = jnp.dot(x, w["gate"], preferred_element_type=jnp.float32)
        ids, route_weights = self.router(logits, self.num_experts_per_tok)
        d = moe.dispatch(
            *(x, ids, route_weights),
            axis_name=self.axis_name,
            num_experts=self.num_experts,
            capacity=self.capacity,
            implementation=self.implementation,
        )
        dot, sizes = self.grouped_matmul, d.group_sizes
        hidden = jax.nn.silu(dot(d.tokens, w["w_gate"], sizes))
        hidden = hidden * dot(d.tokens, w["w_up"], sizes)
        y = moe.combine(dot(hidden, w["w_down"], sizes), d.plan)
        if "shared_gate" in w:
            hidden = jax.nn.silu(x @ w["shared_gate"]) * (x @ w["shared_up"])
            y = y + hidden @ w["shared_down"]
        y = y.reshape(shape)
        if not return_stats:
            return y
        return y, self._stats(ids, logits, d.stats, tuple(mesh.manual_axes))

    def _stats(
        self,
        ids: _Array,
        logits: _Array,
        dispatch: moe.DispatchStats,
        axes: tuple[str, ...],
    ) -> MoEStats:
        routes = jnp.where(ids < 0, self.num_experts, ids).reshape(-1)  # -1: none
        load = jnp.bincount(routes, length=self.num_experts).astype(jnp.int32)
        probabilities = jax.nn.softmax(logits, axis=-1).mean(0)
        load, probabilities = _axes.unify(axes, load, probabilities)
        load = lax.psum(load, axes)
        probabilities = lax.pmean(probabilities, axes)
        tokens = ids.shape[0] * lax.axis_size(axes)
        loss = self.num_experts * (load / tokens * probabilities).sum()
        return MoEStats(
            expert_load=load,
            load_balance_loss=loss.astype(jnp.float32),
            dispatch=jax.tree.map(lambda a: a[None], dispatch),
        )

    def load_hf(
        self,
        source: str | PathLike[str] | Sequence[str | PathLike[str]] | Mapping[str, Any],
        prefix: str,
    ) -> None:
        """Loads a transformers checkpoint of Qwen3-MoE or Mixtral into this layer.

        Each process reads its own experts only. Both ways to store experts are
        understood: fused (``experts.gate_up_proj`` [E, 2F, D], ``experts.down_proj``
        [E, D, F]) and one by one (``experts.{e}.gate_proj.weight`` or Mixtral's
        ``experts.{e}.w1.weight``). Values are cast to ``param_dtype``.

        Args:
          source: a safetensors file, a list of them, a directory with
            ``model.safetensors`` or ``model.safetensors.index.json``, or a mapping
            from names to arrays.
          prefix: what stands before ``.gate.weight``: ``"model.layers.0.mlp"``, or
            ``"model.layers.0.block_sparse_moe"``.

        Raises:
          KeyError: a tensor is missing; the message names it.
          ValueError: a tensor has another shape than the layer.
          ImportError: safetensors is not installed.

        Example::

          layer.load_hf("checkpoint/", "model.layers.0.mlp")
        """
        names = ROUTED if self.shared_gate is None else (*ROUTED, *SHARED)
        with _hf_weights.Checkpoint(source, prefix) as checkpoint:
            for name in names:
                param = getattr(self, name)
                value = param.get_value()
                sharding = getattr(value, "sharding", None)
                if sharding is None:  # abstract, from nnx.eval_shape
                    spec = P(*param.get_metadata()["out_sharding"])
                    sharding = NamedSharding(self._mesh("jf.nnx.MoE.load_hf"), spec)
                param.set_value(
                    checkpoint.read(name, value.shape, value.dtype, sharding)
                )


def find_mesh(given: _Mesh | None, axis: tuple[str, ...]) -> _Mesh | None:
    """The context's mesh if it has the axis, else the given, else the Fabric's."""
    context = jax.sharding.get_abstract_mesh()
    if set(axis) <= set(context.axis_names):
        if context.manual_axes:  # nested: only this view knows what is manual
            return context
        try:
            concrete = jax.sharding.get_mesh()
        except ValueError:  # tracing: JAX shows the abstract one only
            return context
        return context if concrete.empty else concrete
    if given is not None:
        return given
    fabric = _api.find_fabric(axis, None)
    return None if fabric is None else fabric.mesh
