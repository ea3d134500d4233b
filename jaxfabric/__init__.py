"""jaxfabric: one-sided RDMA and mixture-of-experts communication inside jit.

Inside a fully manual `jax.shard_map`, under an open `Fabric`: `put`, `put_pages`,
`wait`, `scatter`, `barrier` and `exchange` move bytes between ranks; `jaxfabric.moe`
has dispatch and combine, `jaxfabric.nnx` and `jaxfabric.linen` Flax layers. Outside
of programs, `TransferEngine` moves bytes between jobs, `jaxfabric.kv` KV caches, and
`jaxfabric.weights` parameters.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxfabric._config import widen_xla_pool

if TYPE_CHECKING:
    from jaxfabric import kv as kv
    from jaxfabric import linen as linen
    from jaxfabric import moe as moe
    from jaxfabric import nnx as nnx
    from jaxfabric import weights as weights
    from jaxfabric._config import config as config
    from jaxfabric._errors import CapacityError as CapacityError
    from jaxfabric._errors import DeadlineError as DeadlineError
    from jaxfabric._errors import FabricError as FabricError
    from jaxfabric._errors import OutcomeUnknownError as OutcomeUnknownError
    from jaxfabric._errors import PeerLostError as PeerLostError
    from jaxfabric._errors import PlanMismatchError as PlanMismatchError
    from jaxfabric._errors import TransportUnavailableError as TransportUnavailableError
    from jaxfabric._fabric import Fabric as Fabric
    from jaxfabric._net_addr import MrDesc as MrDesc
    from jaxfabric._net_addr import NetAddr as NetAddr
    from jaxfabric._primitives.barrier import barrier as barrier
    from jaxfabric._primitives.exchange import exchange as exchange
    from jaxfabric._primitives.put import put as put
    from jaxfabric._primitives.put_pages import put_pages as put_pages
    from jaxfabric._primitives.scatter import scatter as scatter
    from jaxfabric._primitives.signal import signal as signal
    from jaxfabric._primitives.token import token as token
    from jaxfabric._primitives.wait import wait as wait
    from jaxfabric._trace import Trace as Trace
    from jaxfabric._transfer_engine import TransferEngine as TransferEngine
    from jaxfabric._transfer_engine import Watcher as Watcher
    from jaxfabric._transfer_future import TransferFuture as TransferFuture
    from jaxfabric._transfer_memory import Region as Region
    from jaxfabric._transfer_messages import Message as Message
    from jaxfabric._transfer_writes import ImmCounter as ImmCounter
    from jaxfabric._transfer_writes import ScatterTarget as ScatterTarget
    from jaxfabric._window import Window as Window

__version__ = "0.1.0"

widen_xla_pool()

# Where each public name is. They are loaded when they are first used, so that the
# pytest plugin and the command start without importing jax.
_MODULES = {
    "CapacityError": "_errors",
    "DeadlineError": "_errors",
    "Fabric": "_fabric",
    "FabricError": "_errors",
    "ImmCounter": "_transfer_writes",
    "Message": "_transfer_messages",
    "MrDesc": "_net_addr",
    "NetAddr": "_net_addr",
    "OutcomeUnknownError": "_errors",
    "PeerLostError": "_errors",
    "PlanMismatchError": "_errors",
    "Region": "_transfer_memory",
    "ScatterTarget": "_transfer_writes",
    "Trace": "_trace",
    "TransferEngine": "_transfer_engine",
    "TransferFuture": "_transfer_future",
    "TransportUnavailableError": "_errors",
    "Watcher": "_transfer_engine",
    "Window": "_window",
    "barrier": "_primitives.barrier",
    "config": "_config",
    "exchange": "_primitives.exchange",
    "kv": "kv",
    "linen": "linen",
    "moe": "moe",
    "nnx": "nnx",
    "put": "_primitives.put",
    "put_pages": "_primitives.put_pages",
    "scatter": "_primitives.scatter",
    "signal": "_primitives.signal",
    "token": "_primitives.token",
    "wait": "_primitives.wait",
    "weights": "weights",
}

__all__ = [
    "CapacityError",
    "DeadlineError",
    "Fabric",
    "FabricError",
    "ImmCounter",
    "Message",
    "MrDesc",
    "NetAddr",
    "OutcomeUnknownError",
    "PeerLostError",
    "PlanMismatchError",
    "Region",
    "ScatterTarget",
    "Trace",
    "TransferEngine",
    "TransferFuture",
    "TransportUnavailableError",
    "Watcher",
    "Window",
    "barrier",
    "config",
    "exchange",
    "kv",
    "linen",
    "moe",
    "nnx",
    "put",
    "put_pages",
    "scatter",
    "signal",
    "token",
    "wait",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxfabric' has no attribute {name!r}")
    module = importlib.import_module(f"jaxfabric.{_MODULES[name]}")
    return module if _MODULES[name] == name else getattr(module, name)
