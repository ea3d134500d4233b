"""Index arithmetic of the plan, in pure JAX: no communication.

It needs the routes of all ranks; the implementations that call it gather them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfabric.moe._plan import Config

_Array = jax.Array


def destinations(c: Config, ids: _Array) -> _Array:
    """bool[..., N]: does a token with these ids int32[..., K] go to this rank?"""
    owner = jnp.where(is_route(c, ids), ids // c.local_experts, -1)
    # As many axes as owner[..., None, :] has: some programs forbid rank promotion.
    ranks = jnp.arange(c.num_ranks).reshape((1,) * (ids.ndim - 1) + (-1, 1))
    return (owner[..., None, :] == ranks).any(-1)


def is_route(c: Config, ids: _Array) -> _Array:
    """Which ids name an expert."""
    return (ids >= 0) & (ids < c.num_experts)


class Unique(NamedTuple):
    """Unique rows of this rank; g = source * T + token counts all tokens.

    Attributes:
      local: bool[N*T, K], assignments of all tokens to this rank's experts.
      slot: int32[N*T, K], the slot of each such assignment.
      recv_count: int32[N], unique rows by source.
      row: int32[N*T], the unique row of token g, N*T if it is not sent here.
      origin: int32[N*T], token g of a unique row, N*T past the last.
    """

    local: _Array
    slot: _Array
    recv_count: _Array
    row: _Array
    origin: _Array


def unique_rows(c: Config, all_ids: _Array, rank: _Array) -> Unique:
    """Finds this rank's unique rows among all tokens' routes int32[N*T, K]."""
    total = c.unique_rows
    local = is_route(c, all_ids) & (all_ids // c.local_experts == rank)
    here = local.any(-1)
    row = jnp.where(here, jnp.cumsum(here) - 1, total).astype(jnp.int32)
    every = jnp.arange(total, dtype=jnp.int32)
    origin = jnp.full(total, total, jnp.int32).at[row].set(every, mode="drop")
    return Unique(
        local=local,
        slot=jnp.cumsum(local, axis=-1, dtype=jnp.int32) - 1,
        recv_count=here.reshape(c.num_ranks, c.tokens).sum(-1, dtype=jnp.int32),
        row=row,
        origin=origin,
    )


class Grouped(NamedTuple):
    """Expert rows of this rank.

    Attributes:
      group_sizes: int32[L].
      slot_row: int32[N*T, S], as in Plan.
      assignment: int32[R], g * K + k of each expert row, -1 in padding.
      dropped: int32[], assignments over the capacity.
    """

    group_sizes: _Array
    slot_row: _Array
    assignment: _Array
    dropped: _Array


def group_by_expert(c: Config, all_ids: _Array, unique: Unique) -> Grouped:
    """Gives each kept assignment its expert row."""
    experts, align = c.local_experts, c.expert_alignment
    wanted = unique.local.reshape(-1)
    arrival = jnp.cumsum(wanted) - 1
    kept = wanted & (arrival < c.kept_max)
    expert = jnp.where(kept, all_ids.reshape(-1) % experts, experts)
    counts = jnp.bincount(expert, length=experts + 1)[:experts].astype(jnp.int32)
    group_sizes = (counts + align - 1) // align * align
    # A stable sort keeps (source, token, k) order inside each expert.
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    place = jnp.argsort(order).astype(jnp.int32)
    shift = (jnp.cumsum(group_sizes) - group_sizes) - (jnp.cumsum(counts) - counts)
    row = place + jnp.append(shift, 0)[expert]
    row = jnp.where(kept, row, c.rows).astype(jnp.int32)
    every = jnp.arange(row.size, dtype=jnp.int32)
    token = jnp.repeat(unique.row, c.k)
    slot = jnp.where(kept, unique.slot.reshape(-1), c.slots)
    return Grouped(
        group_sizes=group_sizes,
        slot_row=jnp.full((c.unique_rows, c.slots), -1, jnp.int32)
        .at[token, slot]
        .set(row, mode="drop"),
        assignment=jnp.full(c.rows, -1, jnp.int32).at[row].set(every, mode="drop"),
        dropped=(wanted & ~kept).sum(dtype=jnp.int32),
    )


def unique_of_row(c: Config, slot_row: _Array) -> _Array:
    """int32[R]: the unique row that each expert row repeats, -1 in padding."""
    unique = jnp.arange(slot_row.shape[0], dtype=jnp.int32)
    unique = jnp.broadcast_to(unique[:, None], slot_row.shape)
    target = jnp.where(slot_row < 0, c.rows, slot_row)
    return jnp.full(c.rows, -1, jnp.int32).at[target].set(unique, mode="drop")


def take_rows(x: _Array, index: _Array) -> _Array:
    """x[index], with zeros where the index is out of range."""
    inside = (index >= 0) & (index < x.shape[0])
    rows = jnp.take(x, jnp.where(inside, index, 0), axis=0)
    return jnp.where(inside.reshape((-1,) + (1,) * (x.ndim - 1)), rows, 0)
