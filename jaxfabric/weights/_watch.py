"""News of the loss of a peer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from jaxfabric._errors import FabricError, PeerLostError
from jaxfabric._transfer_engine import TransferEngine

_FOREVER_S = 1e9
IDS_BEGIN = 1 << 26  # ids of other uses are below
_ids = itertools.cycle(range(IDS_BEGIN, 1 << 27))


def watch(
    engine: TransferEngine, peer: int, lost: Callable[[FabricError], object]
) -> None:
    """Calls ``lost(error)`` once the peer is lost; never after the engine's end.

    It waits for what nobody sends. A peer that counts under its id all the same gains
    nothing: the wait goes on under another.
    """

    def over(done: Any) -> None:
        error = done.exception(0)
        if isinstance(error, PeerLostError):
            lost(error)
        elif not engine.closed:
            arm()

    def arm() -> None:
        try:
            engine.expect_imm_count(
                next(_ids), 1, over, peers=[peer], timeout_s=_FOREVER_S
            )
        except PeerLostError as error:
            lost(error)
        except FabricError:
            return

    arm()
