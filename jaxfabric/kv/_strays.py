"""Strays: what lost senders may still write, and how it is known that they do not."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable

from jaxfabric._errors import FabricError, TransportUnavailableError
from jaxfabric.kv._peer_process import PeerProcess
from jaxfabric.kv._receiving import Leg
from jaxfabric.kv._waits import Waits

_DEATHS_S = (0.05, 0.5, 5.0)  # a killed process takes a moment until it is gone
_FENCE_S = 10.0
_AGAIN_S = 0.1

_log = logging.getLogger("jaxfabric")


@dataclasses.dataclass(eq=False)
class _Stray:
    """A sender that was lost while legs of it were open."""

    sender: int  # as it calls itself
    process: PeerProcess
    legs: list[Leg]


class Strays:
    """Legs of lost senders, until it is certain that no write of theirs can land.

    That is so once the engine has cut them off (over a network); once the sender's
    process has ended (over ``"shm"``, where it was its processor that copied); or once
    the sender is back, which it says when nothing of before is under way.

    Args:
      quiet: told the legs, each once; takes locks of its own.
    """

    def __init__(
        self, waits: Waits, fences: bool, quiet: Callable[[list[Leg]], None]
    ) -> None:
        self._waits, self._fences, self._quiet = waits, fences, quiet
        self._lock = threading.Lock()
        self._strays: list[_Stray] = []

    def add(self, sender: int, process: PeerProcess, legs: list[Leg]) -> None:
        """From now on they are strays."""
        stray = _Stray(sender, process, legs)
        with self._lock:
            self._strays.append(stray)
        if self._fences:
            self._fence(stray)
            return
        with contextlib.suppress(FabricError):  # the engine was closed
            for pause_s in _DEATHS_S:
                self._waits.after(pause_s, self.look)

    def look(self) -> None:
        """Whether processes have ended meanwhile."""
        self._end(lambda stray: stray.process.ended())

    def came_back(self, sender: int) -> None:
        """It says that nothing of before is under way."""
        if not self._fences:  # over a network its word may overtake its writes
            self._end(lambda stray: stray.sender == sender)

    def legs(self) -> list[Leg]:
        """All of them."""
        with self._lock:
            return [leg for stray in self._strays for leg in stray.legs]

    def close(self) -> None:
        """Forgets them, quiet or not."""
        with self._lock:
            for stray in self._strays:
                stray.process.close()
            self._strays.clear()

    def _fence(self, stray: _Stray) -> None:
        def done(error: FabricError | None) -> None:
            with self._lock:
                if stray not in self._strays:  # closed
                    return
            if error is None:
                self._end(lambda one: one is stray)
            elif isinstance(error, TransportUnavailableError):  # it has no fences
                _log.warning("jf.kv: pages of a lost sender stay out of use: %s", error)
            elif not self._waits.engine_closed:
                with contextlib.suppress(FabricError):  # it was closed just now
                    self._waits.after(_AGAIN_S, lambda: self._fence(stray))

        try:
            self._waits.fence(_FENCE_S, done)
        except FabricError as error:
            done(error)

    def _end(self, over: Callable[[_Stray], bool]) -> None:
        with self._lock:
            ended = [stray for stray in self._strays if over(stray)]
            self._strays = [stray for stray in self._strays if stray not in ended]
        for stray in ended:
            stray.process.close()
            self._quiet(stray.legs)
