"""Mixture of experts: dispatch tokens to the ranks of their experts, and combine.

``dispatch`` and ``combine`` run inside ``jax.shard_map``; between them stands any
grouped matmul, such as `jax.lax.ragged_dot`. The contract that all implementations
share is written down in `jaxfabric.moe._plan`.
"""

from jaxfabric.moe import routers
from jaxfabric.moe._api import combine, dispatch
from jaxfabric.moe._halves import (
    CombinePending,
    DispatchPending,
    combine_done,
    combine_start,
    dispatch_done,
    dispatch_start,
)
from jaxfabric.moe._plan import Dispatched, DispatchStats, Plan

__all__ = [
    "dispatch",
    "combine",
    "dispatch_start",
    "dispatch_done",
    "combine_start",
    "combine_done",
    "Dispatched",
    "DispatchStats",
    "Plan",
    "DispatchPending",
    "CombinePending",
    "routers",
]
