"""Copies: which rank sends each piece of a link, and which ranks get it."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxfabric.weights._buckets import Move
from jaxfabric.weights._layout import TreeLayout
from jaxfabric.weights._match import Link, view
from jaxfabric.weights._tiles import Ints, Pieces, pieces, tile_shape, tiles_of


class Copies(NamedTuple):
    """Links that are cut alike: their pieces, once for each rank that needs them.

    A model of many layers has few classes of links, so that it is the number of
    classes, not that of leaves, which planning takes long for.

    Attributes:
      links: int64[l], numbers of the links.
      pieces: of each of them.
      piece: int64[n], which piece a copy is of.
      target_rank: int64[n].
      sources: int64[n, m], the ranks that have it.
      turn: int64[n], whose turn it is at the first link, modulo m.
      nbytes: int64[n].
    """

    links: Ints
    pieces: Pieces
    piece: Ints
    target_rank: Ints
    sources: Ints
    turn: Ints
    nbytes: Ints

    def source_ranks(self) -> Iterator[tuple[Ints, Ints]]:
        """Links that have the same senders, with the sender of each copy."""
        ways = self.sources.shape[1]
        rows = np.arange(len(self.piece))
        for first in range(min(ways, len(self.links))):
            yield (
                self.links[first::ways],
                self.sources[rows, (self.turn + first) % ways],
            )

    def move(self, link: int, copy: int) -> Move:
        """One copy of one link."""
        piece = int(self.piece[copy])
        cut = self.pieces
        return Move(
            link,
            int(cut.source_tile[piece]),
            int(cut.target_tile[piece]),
            tuple(cut.source_start[piece].tolist()),
            tuple(cut.target_start[piece].tolist()),
            tuple(cut.shape[piece].tolist()),
            int(self.nbytes[copy]),
        )


def copies_of(
    source: TreeLayout, target: TreeLayout, links: Iterable[Link]
) -> list[Copies]:
    """The copies of all links, class by class."""
    alike: dict[tuple[Any, ...], list[int]] = collections.defaultdict(list)
    listed = list(links)
    for number, link in enumerate(listed):
        ours, theirs = source.leaves[link.source], target.leaves[link.target]
        key = (
            (ours.shape, ours.mesh, ours.spec, link.source_start),
            (theirs.shape, theirs.mesh, theirs.spec, link.target_start),
            (link.extent, theirs.dtype),
        )
        alike[key].append(number)
    found: list[Copies] = []
    for turn, numbers in enumerate(alike.values()):
        first = listed[numbers[0]]
        found += _cut(source, target, first, np.asarray(numbers, np.int64), turn)
    return found


def sent_by(copies: Iterable[Copies], rank: int) -> dict[int, list[Move]]:
    """The moves of a source rank, by target rank, in the order of the links."""
    return _sorted(
        (copy, links, mine, copy.target_rank[mine])
        for copy in copies
        for links, ranks in copy.source_ranks()
        for mine in [np.flatnonzero(ranks == rank)]
    )


def received_by(copies: Iterable[Copies], rank: int) -> dict[int, list[Move]]:
    """The moves to a target rank, by source rank, in the order of the links."""
    return _sorted(
        (copy, links, mine, ranks[mine])
        for copy in copies
        for links, ranks in copy.source_ranks()
        for mine in [np.flatnonzero(copy.target_rank == rank)]
    )


def loads_of(
    copies: Iterable[Copies], source: TreeLayout, target: TreeLayout
) -> dict[tuple[int, int], int]:
    """Bytes from each source rank to each target rank; pairs without any are absent."""
    ranks = max(source.ranks) + 1, max(target.ranks) + 1
    sums: collections.Counter[tuple[int, int]] = collections.Counter()
    for copy in copies:
        for links, senders in copy.source_ranks():
            pair = senders * ranks[1] + copy.target_rank
            found, places = np.unique(pair, return_inverse=True)
            nbytes = np.zeros(len(found), np.int64)
            np.add.at(nbytes, places, copy.nbytes * len(links))
            for number, total in zip(found.tolist(), nbytes.tolist(), strict=True):
                sums[divmod(number, ranks[1])] += total
    return dict(sums)


def _sorted(
    found: Iterable[tuple[Copies, Ints, Ints, Ints]],
) -> dict[int, list[Move]]:
    entries: dict[int, list[tuple[int, int, Copies]]] = collections.defaultdict(list)
    for copies, links, chosen, others in found:
        pairs = list(zip(chosen.tolist(), others.tolist(), strict=True))
        for link in links.tolist():
            for copy, other in pairs:
                entries[other].append((link, copy, copies))
    return {
        other: [
            copies.move(link, copy)
            for link, copy, copies in sorted(of_rank, key=lambda entry: entry[:2])
        ]
        for other, of_rank in sorted(entries.items())
    }


def _cut(
    source: TreeLayout, target: TreeLayout, link: Link, links: Ints, turn: int
) -> Iterator[Copies]:
    ours, theirs = source.leaves[link.source], target.leaves[link.target]
    our_tiles, their_tiles = tiles_of(source, ours), tiles_of(target, theirs)
    dimensions = len(link.extent)
    cut = pieces(
        link.extent,
        tuple(
            zip(
                link.source_start,
                view(tile_shape(ours, our_tiles), dimensions),
                view(our_tiles.parts, dimensions),
                strict=True,
            )
        ),
        tuple(
            zip(
                link.target_start,
                view(tile_shape(theirs, their_tiles), dimensions),
                view(their_tiles.parts, dimensions),
                strict=True,
            )
        ),
    )
    wanted = [
        (piece, rank)
        for piece, tile in enumerate(cut.target_tile.tolist())
        for rank in their_tiles.holders[tile]
    ]
    piece = np.asarray([number for number, _ in wanted], np.int64)
    rank = np.asarray([rank for _, rank in wanted], np.int64)
    tile = cut.source_tile[piece]
    # Replicas take turns: over the copies of a tile, over tiles and over links.
    seen: collections.Counter[int] = collections.Counter()
    turns = np.zeros(len(piece), np.int64)
    for copy, number in enumerate(tile.tolist()):
        turns[copy] = turn + seen[number] + number
        seen[number] += 1
    nbytes = cut.shape[piece].prod(axis=1) * _itemsize(theirs.dtype)
    replicas = np.asarray([len(holders) for holders in our_tiles.holders])[tile]
    for count in np.unique(replicas).tolist():
        chosen = np.flatnonzero(replicas == count)
        sources = [our_tiles.holders[number] for number in tile[chosen].tolist()]
        yield Copies(
            links,
            cut,
            piece[chosen],
            rank[chosen],
            np.asarray(sources, np.int64),
            turns[chosen],
            nbytes[chosen],
        )


def _itemsize(dtype: str) -> int:
    return np.dtype(dtype).itemsize
