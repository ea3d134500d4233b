"""jaxfabric: one-sided RDMA and mixture-of-experts communication inside jit.

Inside a fully manual `jax.shard_map`, under an open `Fabric`: `put`, `wait`,
`scatter`, `barrier` and `exchange` move bytes between ranks; `jaxfabric.moe` has
dispatch and combine, `jaxfabric.nnx` and `jaxfabric.linen` Flax layers.
"""

from jaxfabric import moe as moe
from jaxfabric._config import config as config
from jaxfabric._errors import CapacityError as CapacityError
from jaxfabric._errors import DeadlineError as DeadlineError
from jaxfabric._errors import FabricError as FabricError
from jaxfabric._errors import PeerLostError as PeerLostError
from jaxfabric._errors import PlanMismatchError as PlanMismatchError
from jaxfabric._errors import TransportUnavailableError as TransportUnavailableError
from jaxfabric._fabric import Fabric as Fabric
from jaxfabric._fabric import Window as Window
from jaxfabric._primitives.barrier import barrier as barrier
from jaxfabric._primitives.exchange import exchange as exchange
from jaxfabric._primitives.put import put as put
from jaxfabric._primitives.scatter import scatter as scatter
from jaxfabric._primitives.token import token as token
from jaxfabric._primitives.wait import wait as wait

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "DeadlineError",
    "Fabric",
    "FabricError",
    "PeerLostError",
    "PlanMismatchError",
    "TransportUnavailableError",
    "Window",
    "barrier",
    "config",
    "exchange",
    "moe",
    "put",
    "scatter",
    "token",
    "wait",
]
