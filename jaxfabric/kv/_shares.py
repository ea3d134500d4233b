"""Shares: how much of something each receiver holds, so that none holds all of it."""

from __future__ import annotations

from collections.abc import Iterable


class Shares:
    """Who holds how much of a total.

    One may hold three quarters of what the others leave, so that something is left for
    whoever comes: one that hangs keeps what it holds, and holds up nobody else. Who
    holds nothing may take something, if the caller has it.

    Example::

      shares = Shares(16)
      if shares.has_room([receiver], 1):
          shares.take([receiver], 1)
    """

    def __init__(self, total: int) -> None:
        self.used = 0
        self._total = total
        self._held: dict[int, int] = {}

    def held(self, who: int) -> int:
        """What one of them holds."""
        return self._held.get(who, 0)

    def has_room(self, them: Iterable[int], amount: int) -> bool:
        """Whether all of them may have so much more."""
        for who in them:
            held = self.held(who)
            left = self._total - (self.used - held)
            if held and held + amount > left * 3 // 4:
                return False
        return True

    def take(self, them: Iterable[int], amount: int) -> None:
        """They hold so much more, in common."""
        self.used += amount
        for who in them:
            self._held[who] = self.held(who) + amount

    def give(self, them: Iterable[int], amount: int) -> None:
        """They hold so much less."""
        self.used -= amount
        for who in them:
            self._held[who] -= amount
            if not self._held[who]:
                del self._held[who]
