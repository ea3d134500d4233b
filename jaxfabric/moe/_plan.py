"""Shapes, arrays and rules that every implementation of dispatch and combine shares.

Symbols: ``T`` tokens on this rank (static, equal on all ranks), ``D`` hidden size,
``K`` experts per token, ``E`` experts in all, ``N`` ranks on the axis,
``L = E / N`` experts on each rank, ``S = min(K, L)`` slots of a unique row,
``R`` receive rows. The owner of expert ``e`` is rank ``e // L``; a rank is the
flattened ``lax.axis_index`` over the axis names, first name slowest.

The rules:

* **Unique rows.** A token is sent once to each rank that owns at least one of its
  experts. Source ``s`` sends rank ``d`` its tokens in ascending order.
* **Expert rows.** Assignments are ordered by (source, token, k). The first
  ``capacity`` of them are kept (all, if it is ``None``) and grouped by local expert,
  in that order inside each group.
* **Padding.** A group with rows is rounded up to a multiple of
  ``expert_alignment``; one without stays empty. Padding rows are zero. Rows past
  ``sum(group_sizes)`` are zero, or unspecified with ``zero_tail=False``. The weights
  of both are zero.
* **Combine.** Per unique row the kept slots are summed in ascending k in the
  accumulation dtype, and rounded to the rows' dtype, as that is what travels. The
  token's rank sums what came back in ascending rank order in the accumulation dtype
  and rounds once more. A token without rows gives zeros.
* **e4m3 on the wire.** With ``wire_dtype=float8_e4m3fn`` a row travels in blocks of
  128 elements along D, the last one shorter if it must be, each with a float32 scale:

  - ``amax`` is the block's largest magnitude, or 2^-100 if that is larger; so a block
    of zeros has a scale like any other, and magnitudes below 2^-119 become zero.
  - ``scale = amax * float32(1/448)``; 448 is the largest number of e4m3.
  - ``payload = e4m3(x * (448 / amax))``: quotient and product are rounded to float32,
    the payload to nearest even. It keeps the sign of zero, and never overflows.
  - A block with an infinity or a NaN is lost: its payload is 0x7f, its scale NaN.
  - The receiver rounds ``float32(payload) * scale`` to the dtype of ``x``
    (``dequantize=True``), or keeps both (``False``); both are zero in padding and
    zeroed tail. A float32 block whose amax is next to the largest float32 may come
    back infinite there.

  Routing weights, combine and all cotangents travel as they are. Gradients of
  dispatch are those of the call without ``wire_dtype`` (straight through).

Details that are easy to get wrong, decided once for all implementations:

* ``capacity`` is at least 1, and so are ``T``, ``D`` and ``K``.
* An id outside ``[0, E)`` means "no expert" to the pure JAX implementations, which
  cannot raise; ``-1`` is the one to use, as ``"fabric"`` reports the others.
* An expert may appear once in a token. ``"fabric"`` reports a repeated one; the
  results of the others are then unspecified.
* A unique row is sent, and counted in the statistics, even if each of its
  assignments is over the capacity.
* ``Config.expand`` tells ``replay`` and ``reduce`` which rows they see: expert rows
  ``[R, D]`` or unique rows ``[N*T, D]``. Combine passes
  its own ``expand``, whatever dispatch's was.
* Rows given to combine may differ from those dispatched in dtype and in their last
  dimension. ``Config.hidden`` follows the operand of each kernel call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static about a dispatch: hashable, equal on all ranks.

    ``wire_dtype`` is ``None`` or "float8_e4m3fn", and matters to ``route`` alone.
    ``timeout_s`` is ``None`` to inherit the Fabric's. ``fabric_key`` is the stable
    key of the Fabric that runs the plan, ``None`` for the pure JAX implementations.
    """

    axis_name: tuple[str, ...]
    num_ranks: int
    num_experts: int
    tokens: int
    hidden: int
    k: int
    capacity: int | None = None
    expert_alignment: int = 1
    expand: bool = True
    zero_tail: bool = True
    wire_dtype: str | None = None
    dequantize: bool = True
    implementation: str = "reference"
    name: str = "jaxfabric_dispatch"
    key: Hashable = None
    timeout_s: float | None = None
    fabric_key: int | None = None

    @property
    def local_experts(self) -> int:
        """Experts on each rank, ``L``."""
        return self.num_experts // self.num_ranks

    @property
    def slots(self) -> int:
        """Most experts that one token can have on one rank, ``S``."""
        return min(self.k, self.local_experts)

    @property
    def unique_rows(self) -> int:
        """Rows a rank can receive when each comes once, ``N*T``."""
        return self.num_ranks * self.tokens

    @property
    def kept_max(self) -> int:
        """Most assignments that a rank keeps."""
        most = self.unique_rows * self.slots
        return most if self.capacity is None else min(self.capacity, most)

    @property
    def rows(self) -> int:
        """Expert rows, ``R``: the kept ones and the padding always fit."""
        pad = self.local_experts * (self.expert_alignment - 1)
        return (self.kept_max + pad) // self.expert_alignment * self.expert_alignment


def _pytree(cls: type, *static: str) -> type:
    """Registers a frozen dataclass whose other fields are arrays."""
    names = [f.name for f in dataclasses.fields(cls)]
    data = [n for n in names if n not in static]
    return jax.tree_util.register_dataclass(cls, data, list(static))


@dataclasses.dataclass(frozen=True)
class DispatchStats:
    """Counts of one dispatch on this rank.

    Attributes:
      sent: int32[N], unique rows sent to each rank.
      received: int32[N], unique rows received from each rank.
      dropped_at_sender: int32[], assignments that were never sent; always 0.
      dropped_at_receiver: int32[], assignments over ``capacity``.
    """

    sent: jax.Array
    received: jax.Array
    dropped_at_sender: jax.Array
    dropped_at_receiver: jax.Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each row of a dispatch came from: all that combine and gradients need.

    It is a value like any other: it may be used twice, late, out of order, stored by
    ``jax.checkpoint`` or carried by ``lax.scan``.

    Attributes:
      ids: int32[T, K], the routes of this rank's own tokens, as passed.
      recv_count: int32[N], unique rows received from each source.
      slot_row: int32[N*T, S]. Row j stands for the j-th unique row received (source
        after source, packed), entry q for its q-th expert on this rank in ascending
        k: the index of the expert row, or -1 where there is none or it was dropped.
      weights: float32[R], the routing weight of each expert row. A float leaf:
        gradients flow through it to the ``weights`` given to dispatch.
      config: the static part.
    """

    ids: jax.Array
    recv_count: jax.Array
    slot_row: jax.Array
    weights: jax.Array
    config: Config


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What dispatch returns.

    Attributes:
      tokens: [R, D], rows grouped by local expert; with ``expand=False`` [N*T, D],
        each row once, source after source.
      group_sizes: int32[L], rows of each local expert, padding included.
      weights: float32[R], the routing weight of each expert row, 0 in padding.
      row_index: ``None``, or with ``expand=False`` int32[R]: the index into
        ``tokens`` of each expert row, -1 in padding.
      scales: ``None``, or with ``dequantize=False`` float32[R, ceil(D/128)] (of
        ``tokens``'s rows): what each block of 128 elements is to be multiplied with.
      stats: counts of this call.
      plan: to be given to combine.
      token: float32[1], orders later calls after this one.
    """

    tokens: jax.Array
    group_sizes: jax.Array
    weights: jax.Array
    row_index: jax.Array | None
    scales: jax.Array | None
    stats: DispatchStats
    plan: Plan
    token: jax.Array


class RouteOut(NamedTuple):
    """What an implementation's ``route`` returns; the fields are Dispatched's."""

    tokens: jax.Array
    scales: jax.Array | None
    group_sizes: jax.Array
    weights: jax.Array
    row_index: jax.Array | None
    recv_count: jax.Array
    slot_row: jax.Array
    stats: DispatchStats
    token: jax.Array


_pytree(DispatchStats)
_pytree(Plan, "config")
_pytree(Dispatched)
