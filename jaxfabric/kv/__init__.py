"""KV caches between jobs: prefill jobs write pages into the pools of decode jobs.

`PageReceiver` owns a pool and expects requests; `PageSender` writes them, layer by
layer, over a `jf.TransferEngine`. The jobs are started apart, in any number, and may
have other tensor-parallel degrees and page sizes; `PageLayout` says what a pool looks
like.
"""

from __future__ import annotations

from jaxfabric.kv._layout import PageLayout
from jaxfabric.kv._life_cycle import State
from jaxfabric.kv._outcome import Outcome
from jaxfabric.kv._plan import PageCopies, check_bridge, plan_copies, source_ranks
from jaxfabric.kv._receiver import PageReceiver
from jaxfabric.kv._receiving import Receiving
from jaxfabric.kv._send_layer import request_operand, send_layer
from jaxfabric.kv._sender import PageSender
from jaxfabric.kv._sending import Sending

__all__ = [
    "Outcome",
    "PageCopies",
    "PageLayout",
    "PageReceiver",
    "PageSender",
    "Receiving",
    "Sending",
    "State",
    "check_bridge",
    "plan_copies",
    "request_operand",
    "send_layer",
    "source_ranks",
]
