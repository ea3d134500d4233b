"""Versions: the newest complete one, and the one that is being filled."""

from __future__ import annotations

import threading

from jaxfabric._errors import FabricError
from jaxfabric.weights._tiles import TilesByKey


class Versions:
    """Two sets of tiles: one is whole, the other is being filled.

    Attributes:
      newest: the version that is whole; 0 for none.
      origin: which trainer it came from: another one's may have the same number.
      filling: the version that is being filled; 0 for none.
      front: tiles of `newest`.
      back: tiles of `filling`.
      changed: notified when `newest` is another one, or `failure` is.
      failure: why the last version did not come, or none can come any more.
    """

    def __init__(self, front: TilesByKey, back: TilesByKey) -> None:
        self.front, self.back = front, back
        self.newest = self.filling = 0
        self.origin = self._filling_origin = 0
        self.changed = threading.Condition()
        self.failure: FabricError | None = None
        self._stays = False
        self._held = 0

    @property
    def nbytes(self) -> int:
        """Bytes of both sets."""
        return 2 * sum(values.nbytes for values in self.front.values())

    def swap(self) -> bool:
        """What was filled is the newest now; ``False`` while that is held."""
        with self.changed:
            if self._held:
                return False
            self.front, self.back = self.back, self.front
            self.newest, self.filling, self.failure = self.filling, 0, None
            self.origin = self._filling_origin
            self.changed.notify_all()
            return True

    def fail(self, error: FabricError, *, stays: bool = False) -> None:
        """What was being filled will not come about.

        Args:
          error: what waits for it raises.
          stays: whether nothing else can come, until `begin`.
        """
        with self.changed:
            self.filling = 0
            if not self._stays:
                self.failure, self._stays = error, stays
            self.changed.notify_all()

    def begin(self, version: int, origin: int) -> None:
        """Begins to fill a version."""
        with self.changed:
            self.filling, self._filling_origin = version, origin
            self.failure, self._stays = None, False

    def forgive(self) -> None:
        """Forgets a failure, since there are other senders now."""
        with self.changed:
            self.failure, self._stays = None, False

    def take_failure(self) -> FabricError:
        """The failure, which is told once, unless it stays. Needs ``changed``."""
        assert self.failure is not None
        failure = self.failure
        if not self._stays:
            self.failure = None
        return failure

    def hold(self) -> tuple[int, int]:
        """The newest version and its origin, which stay it until `release`."""
        with self.changed:
            self._held += 1
            return self.newest, self.origin

    def release(self) -> None:
        """Ends a `hold`."""
        with self.changed:
            self._held -= 1
