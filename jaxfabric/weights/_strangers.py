"""Strangers: peers that send what nobody here understands."""

from __future__ import annotations


class Strangers:
    """Each is told so once: it may not understand that either, and say so, too."""

    def __init__(self) -> None:
        self._told: set[int] = set()

    def first(self, peer: int) -> bool:
        """Whether this one has not been told yet."""
        first = peer not in self._told
        self._told.add(peer)
        return first
