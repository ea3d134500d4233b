"""Copies: which rank sends each piece of a link, and which ranks get it."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxfabric.weights._buckets import Move, boxes
from jaxfabric.weights._layout import TreeLayout
from jaxfabric.weights._match import Link, view
from jaxfabric.weights._replicas import Group, Hand, Runs, dealt, runs_of, shares
from jaxfabric.weights._tiles import (
    Ints,
    Pieces,
    Tiles,
    pieces,
    tile_shape,
    tiles_of,
)

# Replicas share larger pieces. A part is so small that it evens their bytes out, and
# so large that its copy takes longer than its bookkeeping.
_WHOLE_BYTES_MAX = 4 << 20
_PARTS_MAX = (
    16  # about half of which each of them sends of a piece, for planning's sake
)


class Copies(NamedTuple):
    """Links that are cut alike: their pieces, once for each rank that needs them.

    A model of many layers has few classes of links, so that it is the number of
    classes, not that of leaves, which planning takes long for.

    Attributes:
      links: int64[l], numbers of the links.
      pieces: of each of them.
      piece: int64[n], which piece a copy is of.
      target_rank: int64[n].
      nbytes: int64[n].
      runs: who sends each copy of each link.
    """

    links: Ints
    pieces: Pieces
    piece: Ints
    target_rank: Ints
    nbytes: Ints
    runs: Runs

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


class _Class(NamedTuple):
    """The copies of a class of links, before it is known who sends them."""

    links: Ints
    pieces: Pieces
    piece: Ints
    target_rank: Ints
    nbytes: Ints
    source: Tiles


def copies_of(
    source: TreeLayout, target: TreeLayout, links: Iterable[Link]
) -> list[Copies]:
    """The copies of all links, class by class.

    Each is sent by the rank that holds it, or by that of several with the least bytes
    so far: first what only one can send, then what few hold, large parts before small
    ones. So the last part that a rank got of these went to it because none of the
    others who hold it had less; ranks that hold the same differ by one part at most.
    """
    alike: dict[tuple[Any, ...], list[int]] = collections.defaultdict(list)
    listed = list(links)
    for number, link in enumerate(listed):
        ours, theirs = source.leaves[link.source], target.leaves[link.target]
        key = (
            (ours.shape, ours.mesh, ours.spec, link.source_start),
            (theirs.shape, theirs.mesh, theirs.spec, link.target_start),
            (link.extent, theirs.dtype, link.scales >= 0),
        )
        alike[key].append(number)
    classes = [
        _cut(source, target, listed[numbers[0]], np.asarray(numbers, np.int64))
        for numbers in alike.values()
    ]
    return _with_senders(classes, max(source.ranks))


def _with_senders(classes: Sequence[_Class], last_rank: int) -> list[Copies]:
    alone: list[tuple[Ints, Ints]] = []
    loads = np.zeros(last_rank + 1, np.int64)
    shared: list[tuple[int, Group]] = []
    for number, one in enumerate(classes):
        holders = one.source.holders
        tile = one.pieces.source_tile[one.piece]
        ways = np.asarray([len(ranks) for ranks in holders])[tile]
        copies = np.flatnonzero(ways == 1)
        sender = np.asarray([ranks[0] for ranks in holders], np.int64)[tile[copies]]
        np.add.at(loads, sender, one.nbytes[copies] * len(one.links))
        alone.append((copies, sender))
        if len(copies) < len(tile):
            groups = _groups(one, np.flatnonzero(ways > 1))
            shared += [(number, group) for group in groups]
    hands = _hands(classes, shared, loads.tolist())
    return [
        Copies(*one[:-1], runs_of(of_one, copies, len(one.links), sender))
        for one, of_one, (copies, sender) in zip(classes, hands, alone, strict=True)
    ]


def _hands(
    classes: Sequence[_Class], shared: list[tuple[int, Group]], loads: list[int]
) -> list[list[Hand]]:
    """Who sends what several could, for each class."""
    found: list[list[Hand]] = [[] for _ in classes]
    shared.sort(key=lambda entry: (len(entry[1].holders), -entry[1].nbytes))
    for number, group in shared:
        links = len(classes[number].links)
        so_far = [loads[rank] for rank in group.holders]
        counts = shares(so_far, links * len(group.copies), group.nbytes)
        for rank, count in zip(group.holders, counts, strict=True):
            loads[rank] += count * group.nbytes
        found[number] += dealt(group, links, counts)
    return found


def _groups(one: _Class, chosen: Ints) -> Iterator[Group]:
    """Those of the copies that have the same holders and size, together."""
    numbers: dict[tuple[int, ...], int] = {}
    of_tile = [numbers.setdefault(ranks, len(numbers)) for ranks in one.source.holders]
    tile = one.pieces.source_tile[one.piece[chosen]]
    sizes, size = np.unique(one.nbytes[chosen], return_inverse=True)
    key = np.asarray(of_tile, np.int64)[tile] * len(sizes) + size
    order = np.argsort(key, kind="stable")
    listed = list(numbers)
    keys, begins = np.unique(key[order], return_index=True)
    for which, copies in zip(
        keys.tolist(), np.split(chosen[order], begins[1:]), strict=True
    ):
        holders, size_of = divmod(which, len(sizes))
        yield Group(listed[holders], max(1, int(sizes[size_of])), copies)


def sent_by(copies: Iterable[Copies], rank: int) -> dict[int, list[Move]]:
    """The moves of a source rank, by target rank, in the order of the links."""
    return _sorted(
        (copy, mine, copy.target_rank[copy.runs.copy[mine]])
        for copy in copies
        for mine in [np.flatnonzero(copy.runs.sender == rank)]
    )


def received_by(copies: Iterable[Copies], rank: int) -> dict[int, list[Move]]:
    """The moves to a target rank, by source rank, in the order of the links."""
    return _sorted(
        (copy, mine, copy.runs.sender[mine])
        for copy in copies
        for mine in [np.flatnonzero(copy.target_rank[copy.runs.copy] == rank)]
    )


def loads_of(
    copies: Iterable[Copies], source: TreeLayout, target: TreeLayout
) -> dict[tuple[int, int], int]:
    """Bytes from each source rank to each target rank; pairs without any are absent."""
    ranks = max(source.ranks) + 1, max(target.ranks) + 1
    sums: collections.Counter[tuple[int, int]] = collections.Counter()
    for copy in copies:
        copy_of, first, end, sender = copy.runs
        pair = sender * ranks[1] + copy.target_rank[copy_of]
        found, places = np.unique(pair, return_inverse=True)
        nbytes = np.zeros(len(found), np.int64)
        np.add.at(nbytes, places, copy.nbytes[copy_of] * (end - first))
        for number, total in zip(found.tolist(), nbytes.tolist(), strict=True):
            sums[divmod(number, ranks[1])] += total
    return dict(sums)


def _sorted(found: Iterable[tuple[Copies, Ints, Ints]]) -> dict[int, list[Move]]:
    """Moves of chosen runs, by the rank at the other end of each run."""
    entries: dict[int, list[tuple[int, int, Copies]]] = collections.defaultdict(list)
    for copies, chosen, others in found:
        for copy, first, end, other in zip(
            copies.runs.copy[chosen].tolist(),
            copies.runs.first[chosen].tolist(),
            copies.runs.end[chosen].tolist(),
            others.tolist(),
            strict=True,
        ):
            links = copies.links[first:end].tolist()
            entries[other] += [(link, copy, copies) for link in links]
    return {
        other: [
            copies.move(link, copy)
            for link, copy, copies in sorted(of_rank, key=lambda entry: entry[:2])
        ]
        for other, of_rank in sorted(entries.items())
    }


def _cut(source: TreeLayout, target: TreeLayout, link: Link, links: Ints) -> _Class:
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
    itemsize = np.dtype(theirs.dtype).itemsize
    cut = _for_replicas(cut, our_tiles, itemsize, link.scales >= 0)
    wanted = [their_tiles.holders[tile] for tile in cut.target_tile.tolist()]
    piece = np.repeat(np.arange(len(wanted)), [len(ranks) for ranks in wanted])
    rank = np.asarray([rank for ranks in wanted for rank in ranks], np.int64)
    nbytes = cut.shape.prod(axis=1)[piece] * itemsize
    return _Class(links, cut, piece, rank, nbytes, our_tiles)


def _for_replicas(cut: Pieces, tiles: Tiles, itemsize: int, quantised: bool) -> Pieces:
    """Cuts large pieces that several ranks hold into parts for them to share."""
    ways = np.asarray([len(ranks) for ranks in tiles.holders])[cut.source_tile]
    most = cut.shape.prod(axis=1) * itemsize // (_PARTS_MAX * ways)
    most = np.maximum(most, _WHOLE_BYTES_MAX)
    large = (ways > 1) & (cut.shape.prod(axis=1) * itemsize > most)
    if not large.any():
        return cut
    parts = [
        list(boxes(tuple(shape), itemsize, limit, quantised))
        if cuts
        else [((0,) * len(shape), tuple(shape))]
        for shape, limit, cuts in zip(
            cut.shape.tolist(), most.tolist(), large.tolist(), strict=True
        )
    ]
    piece = np.repeat(np.arange(len(parts)), [len(of_one) for of_one in parts])
    starts = np.asarray([start for of_one in parts for start, _ in of_one], np.int64)
    return Pieces(
        cut.source_tile[piece],
        cut.source_start[piece] + starts,
        cut.target_tile[piece],
        cut.target_start[piece] + starts,
        np.asarray([shape for of_one in parts for _, shape in of_one], np.int64),
    )
