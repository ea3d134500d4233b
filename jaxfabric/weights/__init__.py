"""Weights between jobs: a trainer writes its parameters into samplers' shards.

`plan` finds out, from the layouts of both jobs, which rank writes what to whom. A
`Sender` in each process of the trainer pushes versions, a `Receiver` in each process of
the sampler takes them.
"""

from __future__ import annotations

from jaxfabric.weights._buckets import Bucket, Move
from jaxfabric.weights._cost import Estimate, Rates, estimate
from jaxfabric.weights._layout import LeafLayout, MeshLayout, TreeLayout
from jaxfabric.weights._match import Link, Place, Split
from jaxfabric.weights._plan import Plan, plan
from jaxfabric.weights._push import Push, PushStats, Receipt
from jaxfabric.weights._receiver import Receiver, Taken
from jaxfabric.weights._sender import Sender

__all__ = [
    "Bucket",
    "Estimate",
    "LeafLayout",
    "Link",
    "MeshLayout",
    "Move",
    "Place",
    "Plan",
    "Push",
    "PushStats",
    "Rates",
    "Receipt",
    "Receiver",
    "Sender",
    "Split",
    "Taken",
    "TreeLayout",
    "estimate",
    "plan",
]
