"""The trained model as it is served: prefill and decode programs of one job.

A job has N ranks on the mesh axis "expert". Each holds ``num_heads / N`` heads of
every layer and ``num_experts / N`` experts. Between layers a rank has its part of the
tokens; for attention all ranks gather all tokens (and each does its heads), for the
experts tokens travel by `jf.moe`.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sizes import Sizes

import jaxfabric as jf
from jaxfabric.moe import routers

AXIS = "expert"
PAGE_TOKENS = 16
# Of a layer's parameters, which dimension is split over the ranks.
_SPLIT = {
    "attention/query/kernel": 1,
    "attention/key/kernel": 1,
    "attention/value/kernel": 1,
    "attention/out/kernel": 0,
    "experts/w_gate": 0,
    "experts/w_up": 0,
    "experts/w_down": 0,
}
_EPSILON = 1e-6  # nnx.RMSNorm's
TEMPERATURE = 0.7
MODES = ("stream", "end", "off")  # when a prefill sends its pages


def job_mesh() -> jax.sharding.Mesh:
    """All devices of the job."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def layout(
    config: Sizes, pages: int, ranks: int = 1, rank: int = 0
) -> jf.kv.PageLayout:
    """Of a rank's pool."""
    return jf.kv.PageLayout(
        model=f"train_moe/{config.d_model}x{config.num_layers}",
        layers=config.num_layers,
        pages=pages,
        page_tokens=PAGE_TOKENS,
        heads=config.num_heads,
        head_size=config.d_model // config.num_heads,
        dtype="float32",
        tp_size=ranks,
        tp_rank=rank,
    )


def _spec(name: str) -> P:
    split = _SPLIT.get(name.partition("/")[2].partition("/")[2])
    return P() if split is None else P(*(None,) * split, AXIS)


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Parameters by name, as weights.py writes them."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def place(
    arrays: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    """The parameters on the ranks of a job, each with its own part."""

    def put(name: str, array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, _spec(name))
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return {name: put(name, array) for name, array in arrays.items()}


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + _EPSILON) * scale


def _layer(params: Mapping[str, jax.Array], number: int) -> dict[str, jax.Array]:
    prefix = f"blocks/{number}/"
    return {k.removeprefix(prefix): v for k, v in params.items() if prefix in k}


def _mine(rows: jax.Array) -> jax.Array:
    """This rank's part of rows that all ranks have."""
    size = rows.shape[0] // lax.axis_size(AXIS)
    return lax.dynamic_slice_in_dim(rows, lax.axis_index(AXIS) * size, size)


def _gather(rows: jax.Array) -> jax.Array:
    return lax.all_gather(rows, AXIS, tiled=True)


def _experts(
    config: Sizes, p: Mapping[str, jax.Array], x: jax.Array, valid: jax.Array
) -> jax.Array:
    """[T, D] of this rank's tokens; those that are not valid go nowhere."""
    x = _norm(x, p["norm_experts/scale"])
    logits = x @ p["experts/gate"]
    ids, shares = routers.qwen3_moe(logits, config.num_experts_per_tok)
    ids = jnp.where(valid[:, None], ids, -1)
    d = jf.moe.dispatch(
        *(x, ids, shares), axis_name=AXIS, num_experts=config.num_experts
    )
    dot = functools.partial(lax.ragged_dot, group_sizes=d.group_sizes)
    hidden = jax.nn.silu(dot(d.tokens, p["experts/w_gate"]))
    hidden = hidden * dot(d.tokens, p["experts/w_up"])
    return jf.moe.combine(dot(hidden, p["experts/w_down"]), d.plan)


def _project(p: Mapping[str, jax.Array], h: jax.Array) -> list[jax.Array]:
    """Queries, keys and values of this rank's heads, [T, H, size] each."""
    return [
        jnp.einsum("td,dhs->ths", h, p[f"attention/{name}/kernel"])
        for name in ("query", "key", "value")
    ]


def _merge(p: Mapping[str, jax.Array], heads: jax.Array) -> jax.Array:
    """[T, H, size] of this rank's heads to [T / N, D] of its tokens, over all heads."""
    partial = jnp.einsum("ths,hsd->td", heads, p["attention/out/kernel"])
    return lax.psum_scatter(partial, AXIS, tiled=True)


def _embed(
    params: Mapping[str, jax.Array], tokens: jax.Array, positions: jax.Array
) -> jax.Array:
    return params["embed/embedding"][tokens] + params["position/embedding"][positions]


def choose(logits: jax.Array, position: jax.Array) -> jax.Array:
    """Draws the token at a position from logits [V]: int32[].

    The noise depends on the position alone, so that whoever decodes a text, or goes on
    with it, draws the same.
    """
    key = jax.random.fold_in(jax.random.key(0), position)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jnp.argmax(logits + TEMPERATURE * noise, -1).astype(jnp.int32)


def _next_tokens(
    params: Mapping[str, jax.Array], hidden: jax.Array, positions: jax.Array
) -> jax.Array:
    logits = _norm(hidden, params["norm/scale"]) @ params["head/kernel"]
    return jax.vmap(choose)(logits, positions)


def head(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What `first_token` needs, in this process."""
    names = ("norm/scale", "head/kernel")
    return {name: params[name].addressable_data(0) for name in names}


@jax.jit
def first_token(
    params: Mapping[str, jax.Array], hidden: jax.Array, position: jax.Array
) -> jax.Array:
    """What follows a prompt, from its last hidden state [D] and its length: int32[]."""
    return _next_tokens(params, hidden[None], position[None])[0]


def _specs(params: Mapping[str, jax.Array]) -> dict[str, P]:
    return {name: _spec(name) for name in params}


# --- Prefill ---


def prefill(
    config: Sizes,
    mesh: jax.sharding.Mesh,
    sender: jf.kv.PageSender,
    mode: str,
) -> Any:
    """The program of a prefill job.

    (params, tokens int32[S], length int32[], request uint32[2], rows int32[S / 16],
    pool_pages int32[S / 16]) -> hidden float32[D] of the last token, token. S is a
    multiple of 16 and of the ranks; ``length`` of the tokens are the prompt.

    ``mode`` is ``"stream"`` (each layer is sent before the next one is computed),
    ``"end"`` (all layers once the last one has been computed) or ``"off"``.
    """

    def local(
        params: dict[str, jax.Array],
        tokens: jax.Array,
        length: jax.Array,
        request: jax.Array,
        rows: jax.Array,
        pool_pages: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        positions = _mine(jnp.arange(tokens.shape[0]))
        x = _embed(params, _mine(tokens), positions)
        tok, kept = jf.token(), []

        def send(layer: int, pages: jax.Array, tok: jax.Array) -> jax.Array:
            return jf.kv.send_layer(
                *(sender, request, layer, pages, rows),
                pool_pages=pool_pages,
                token=tok,
            )

        for layer in range(config.num_layers):
            p = _layer(params, layer)
            query, key, value = _project(
                p, _gather(_norm(x, p["norm_attention/scale"]))
            )
            pages = _pages(key, value)
            if mode == "stream":
                tok = send(layer, pages, tok)
                # What follows begins once the pages are on their way.
                query, tok = lax.optimization_barrier((query, tok))
            kept.append(pages)
            heads = jax.nn.dot_product_attention(query, key, value, is_causal=True)
            x = x + _merge(p, heads)
            x = x + _experts(config, p, x, positions < length)
        if mode == "end":
            x, tok = lax.optimization_barrier((x, tok))
            tok = tok + 0 * x[0, 0]
            for layer, pages in enumerate(kept):
                tok = send(layer, pages, tok)
        last = positions == length - 1
        hidden = lax.psum(jnp.where(last[:, None], x, 0).sum(0), AXIS)
        return hidden, tok

    def run(params: dict[str, jax.Array], *operands: jax.Array) -> Any:
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_specs(params), *(P(),) * 5),
            out_specs=P(),
            check_vma=False,  # each rank has a sender of its own
        )(params, *operands)

    return jax.jit(run)


def _pages(key: jax.Array, value: jax.Array) -> jax.Array:
    """[S, H, size] twice to pages [S / 16, 2, 16, H, size]."""
    _, heads, size = key.shape
    both = jnp.stack([key, value]).reshape(2, -1, PAGE_TOKENS, heads, size)
    return both.transpose(1, 0, 2, 3, 4)


# --- Decode ---


def empty_cache(config: Sizes, mesh: jax.sharding.Mesh, slots: int) -> jax.Array:
    """[layers, slots, 2, length, heads, size], heads split over the ranks."""
    size = config.d_model // config.num_heads
    shape = (config.num_layers, slots, 2, config.length, config.num_heads, size)
    sharding = NamedSharding(mesh, CACHE_SPEC)
    return jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=sharding)()


CACHE_SPEC = P(None, None, None, None, AXIS)


def insert(mesh: jax.sharding.Mesh) -> Any:
    """(cache, pages [layers, P, 2, 16, heads, size], slot int32[]) -> cache."""

    def local(cache: jax.Array, pages: jax.Array, slot: jax.Array) -> jax.Array:
        layers, count, caches, _, heads, size = pages.shape
        tokens = pages.transpose(0, 2, 1, 3, 4, 5).reshape(
            layers, 1, caches, count * PAGE_TOKENS, heads, size
        )
        return lax.dynamic_update_slice(cache, tokens, (0, slot, 0, 0, 0, 0))

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(CACHE_SPEC, P(None, None, None, None, AXIS), P()),
        out_specs=CACHE_SPEC,
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0)


def decode_step(config: Sizes, mesh: jax.sharding.Mesh) -> Any:
    """(params, cache, tokens int32[slots], lengths int32[slots]) -> (cache, tokens).

    Each slot has ``lengths`` tokens in the cache, and gets one more; slots with a
    length of 0 are empty.
    """

    def local(
        params: dict[str, jax.Array],
        cache: jax.Array,
        tokens: jax.Array,
        lengths: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        slots = jnp.arange(tokens.shape[0])
        seen = jnp.arange(config.length) <= lengths[:, None]
        x = _embed(params, _mine(tokens), _mine(lengths))
        for layer in range(config.num_layers):
            p = _layer(params, layer)
            query, *kv = _project(p, _gather(_norm(x, p["norm_attention/scale"])))
            new = jnp.stack(kv, 1)  # [slots, 2, H, size]
            cache = cache.at[layer, slots, :, lengths].set(new)
            key, value = cache[layer, :, 0], cache[layer, :, 1]
            heads = jax.nn.dot_product_attention(
                query[:, None], key, value, mask=seen[:, None, None]
            )
            x = x + _merge(p, heads[:, 0])
            x = x + _experts(config, p, x, _mine(lengths) > 0)
        return cache, _gather(_next_tokens(params, x, _mine(lengths) + 1))

    def run(params: dict[str, jax.Array], *operands: jax.Array) -> Any:
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_specs(params), CACHE_SPEC, P(), P()),
            out_specs=(CACHE_SPEC, P()),
            check_vma=False,
        )(params, *operands)

    return jax.jit(run, donate_argnums=1)
