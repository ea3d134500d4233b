"""News of the loss of a peer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from jaxfabric._errors import FabricError, PeerLostError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric.weights._engine_use import IDS_BEGIN

_FOREVER_S = 1e9
_ids = itertools.cycle(range(IDS_BEGIN, 1 << 27))


class Watch:
    """Calls ``lost(peer, error)`` once a peer is lost; never after the engine's end.

    It waits for what nobody sends. A peer that counts under its id all the same gains
    nothing: the wait goes on under another.
    """

    def __init__(
        self, engine: TransferEngine, lost: Callable[[int, FabricError], object]
    ) -> None:
        self._engine, self._lost = engine, lost
        self._peers: set[int] = set()

    def add(self, peer: int) -> None:
        """Watches a peer; once, however often it is asked to."""
        if peer not in self._peers:
            self._peers.add(peer)
            self._arm(peer)

    def _arm(self, peer: int) -> None:
        def over(done: Any) -> None:
            error = done.exception(0)
            if isinstance(error, PeerLostError):
                self._over(peer, error)
            elif not self._engine.closed:
                self._arm(peer)

        try:
            self._engine.expect_imm_count(
                next(_ids), 1, over, peers=[peer], timeout_s=_FOREVER_S
            )
        except PeerLostError as error:
            self._over(peer, error)
        except FabricError:
            return

    def _over(self, peer: int, error: FabricError) -> None:
        self._peers.discard(peer)
        self._lost(peer, error)
