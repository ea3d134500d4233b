"""Replicas: which of the ranks that hold a part sends it, so that all send as much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxfabric.weights._tiles import Ints


class Runs(NamedTuple):
    """Who sends the copies of links that are cut alike; arrays of one length.

    Attributes:
      copy: int64[r], number of a copy.
      first, end: of which of the links, by place.
      sender: the source rank.
    """

    copy: Ints
    first: Ints
    end: Ints
    sender: Ints


class Group(NamedTuple):
    """Copies of as many bytes each, that the same ranks hold.

    Attributes:
      holders: these ranks, ascending.
      nbytes: of each copy.
      copies: their numbers.
    """

    holders: tuple[int, ...]
    nbytes: int
    copies: Ints


class Hand(NamedTuple):
    """What one rank sends of a group: some copies of each link of a range."""

    copies: Ints
    first: int
    end: int
    sender: int


def shares(loads: Sequence[int], count: int, nbytes: int) -> list[int]:
    """How many of ``count`` equal parts each rank sends.

    It is as if each part in turn went to the rank with the least bytes so far, the
    first of them if there are several.

    >>> shares([0, 0, 0], 4, 10)
    [2, 1, 1]
    >>> shares([25, 0], 3, 10)
    [0, 3]
    """
    order = sorted(range(len(loads)), key=loads.__getitem__)
    total = count * nbytes
    lowest, below = 0, 0  # how many ranks it fills to one level, and what they had
    for place in order:
        if loads[place] * lowest - below >= total:
            break
        lowest, below = lowest + 1, below + loads[place]
    found = [0] * len(loads)
    for place in order[:lowest]:
        found[place] = (total + below - lowest * loads[place]) // (lowest * nbytes)
    rest = count - sum(found)
    order[:lowest] = sorted(
        order[:lowest], key=lambda place: (loads[place] + found[place] * nbytes, place)
    )
    for place in order[:rest]:
        found[place] += 1
    return found


def dealt(group: Group, links: int, counts: Sequence[int]) -> Iterator[Hand]:
    """Deals the copies of all links out, so many to each holder, link after link.

    A holder gets neighbouring links, and of a link neighbouring parts: so few tiles
    as can be are read by more than one rank.
    """
    width = len(group.copies)
    end = 0
    for sender, count in zip(group.holders, counts, strict=True):
        begin, end = end, end + count
        (first, left), (last, right) = divmod(begin, width), divmod(end, width)
        boxes = [(first, first + 1, left, width), (last, last + 1, 0, right)]
        if first == last:
            boxes = [(first, first + 1, left, right)]
        elif not left:
            boxes[0] = (first, last, 0, width)
        else:
            boxes.append((first + 1, last, 0, width))
        for low, high, begins, ends in boxes:
            if low < high and begins < ends:
                yield Hand(group.copies[begins:ends], low, high, sender)


def runs_of(hands: Sequence[Hand], alone: Ints, links: int, senders: Ints) -> Runs:
    """Those of hands, and copies of all links that only one rank can send each."""
    lengths = [len(alone), *(len(hand.copies) for hand in hands)]
    return Runs(
        np.concatenate([alone, *(hand.copies for hand in hands)]),
        np.repeat([0, *(hand.first for hand in hands)], lengths),
        np.repeat([links, *(hand.end for hand in hands)], lengths),
        np.concatenate(
            [senders, np.repeat([hand.sender for hand in hands], lengths[1:])]
        ).astype(np.int64),
    )
