"""Which part of a source leaf becomes which part of a target leaf."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxfabric._errors import PlanMismatchError
from jaxfabric.weights._layout import LeafLayout, TreeLayout
from jaxfabric.weights._tiles import overlaps

_NAMED_MAX = 8  # leaves that an error names


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a source leaf goes, if it becomes a part of a target leaf.

    Attributes:
      name: of the target leaf.
      index: the source becomes ``target[index]``; the target has a dimension more.
      start: the source's first element goes here; zeros by default.

    Example::

      Place("experts.w1", index=3)                   # one expert of a stack
      Place("gate_up", start=(0, 4096))              # the right half
    """

    name: str
    index: int | None = None
    start: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Split:
    """A source leaf whose ``source[i]`` becomes the target leaf ``names.format(i)``.

    Example::

      Split("experts.{}.w1")
    """

    names: str


Target = str | Place | Split | None
Rename = Mapping[str, Target] | Callable[[str], Target]


@dataclasses.dataclass(frozen=True)
class Link:
    """A box of a source leaf that becomes a box of a target leaf.

    Both leaves are seen with as many dimensions as the one with more has; the other
    gets dimensions of 1 in front.

    Attributes:
      source, target: numbers of leaves.
      source_start, target_start, extent: of the box, in elements.
      scales: the target leaf that takes the scales of its blocks; -1 for none.
    """

    source: int
    target: int
    source_start: tuple[int, ...]
    target_start: tuple[int, ...]
    extent: tuple[int, ...]
    scales: int = -1


def match(
    source: TreeLayout,
    target: TreeLayout,
    rename: Rename | None,
    *,
    cast: bool,
    scales: str | None,
) -> tuple[Link, ...]:
    """Finds the links that fill each target leaf exactly once.

    Raises:
      PlanMismatchError: names the leaves that would be filled twice, or not wholly,
        whose shapes do not fit, or whose dtypes differ.
    """
    numbers = {leaf.name: number for number, leaf in enumerate(target.leaves)}
    scale_of = _scale_leaves(target, numbers, scales)
    links: list[Link] = []
    for number, leaf in enumerate(source.leaves):
        for place, box in _places(leaf, rename):
            if place.name not in numbers:
                raise PlanMismatchError(
                    f"jf.weights.plan: {leaf.name} becomes {place.name}, which the "
                    "target does not have; rename it, or rename it to None to leave "
                    "it out"
                )
            found = numbers[place.name]
            link = _link(number, leaf, box, found, target.leaves[found], place)
            link = dataclasses.replace(link, scales=scale_of.get(found, -1))
            _check_dtypes(leaf, target.leaves[found], link, cast)
            links.append(link)
    check_cover(target, links)
    return tuple(links)


def view(shape: tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    """A shape with dimensions of 1 in front."""
    return (1,) * (dimensions - len(shape)) + tuple(shape)


def _places(
    leaf: LeafLayout, rename: Rename | None
) -> list[tuple[Place, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """The places of a leaf's parts, each with the part's start and shape."""
    if rename is None:
        named: Target = leaf.name
    elif callable(rename):
        named = rename(leaf.name)
    else:
        named = rename.get(leaf.name, leaf.name)
    zeros = (0,) * len(leaf.shape)
    if named is None:
        return []
    if isinstance(named, str):
        return [(Place(named), (zeros, leaf.shape))]
    if isinstance(named, Place):
        return [(named, (zeros, leaf.shape))]
    if not isinstance(named, Split) or not leaf.shape:
        raise PlanMismatchError(
            f"jf.weights.plan: {leaf.name} of shape {leaf.shape} cannot become "
            f"{named!r}; a name, a Place, a Split (of a leaf with dimensions) or None"
        )
    return [
        (
            Place(named.names.format(i)),
            ((i, *zeros[1:]), (1, *leaf.shape[1:])),
        )
        for i in range(leaf.shape[0])
    ]


def _link(
    number: int,
    leaf: LeafLayout,
    box: tuple[tuple[int, ...], tuple[int, ...]],
    found: int,
    target: LeafLayout,
    place: Place,
) -> Link:
    start, shape = box
    dimensions = max(len(shape), len(target.shape))
    extent = view(shape, dimensions)
    into = list(place.start or (0,) * len(target.shape))
    if place.index is not None and target.shape:
        into[0] = place.index
    wanted = view(target.shape, dimensions)
    begin = (0,) * (dimensions - len(into)) + tuple(into)
    fits = len(into) == len(target.shape) and all(
        0 <= first and first + size <= room
        for first, size, room in zip(begin, extent, wanted, strict=True)
    )
    whole = place.index is None and place.start is None
    if not fits or (whole and extent != wanted):
        raise PlanMismatchError(
            f"jf.weights.plan: {leaf.name} has shape {shape} and becomes {place}, "
            f"which has shape {target.shape}"
        )
    return Link(number, found, (0,) * (dimensions - len(start)) + start, begin, extent)


def _scale_leaves(
    target: TreeLayout, numbers: Mapping[str, int], scales: str | None
) -> dict[int, int]:
    """For each leaf that is quantised in blocks, the leaf of its scales."""
    if scales is None:
        return {}
    found = {}
    for number, leaf in enumerate(target.leaves):
        if leaf.dtype != "float8_e4m3fn" or scales.format(leaf.name) not in numbers:
            continue
        own = numbers[scales.format(leaf.name)]
        shape = leaf.shape
        wanted = (
            *shape[:-2],
            *(math.ceil(size / 128) for size in shape[-2:]),
        )
        if len(shape) < 2 or target.leaves[own].shape != wanted:
            raise PlanMismatchError(
                f"jf.weights.plan: {leaf.name} of shape {shape} has scales "
                f"{target.leaves[own].name} of shape {target.leaves[own].shape}; "
                f"blocks of 128x128 need {wanted}"
            )
        if target.leaves[own].dtype != "float32":
            raise PlanMismatchError(
                f"jf.weights.plan: {target.leaves[own].name} has dtype "
                f"{target.leaves[own].dtype}; scales are float32"
            )
        found[number] = own
    return found


def _check_dtypes(
    source: LeafLayout, target: LeafLayout, link: Link, cast: bool
) -> None:
    if source.dtype == target.dtype and link.scales < 0:
        return
    if cast or link.scales >= 0:
        return
    raise PlanMismatchError(
        f"jf.weights.plan: {source.name} is {source.dtype} at the source and "
        f"{target.name} is {target.dtype} at the target; cast=True rounds it"
    )


def check_cover(target: TreeLayout, links: Sequence[Link]) -> None:
    """Raises PlanMismatchError unless each leaf is filled once.

    Leaves of scales are filled with their payload.
    """
    filled = {link.scales for link in links} - {-1}
    into: dict[int, list[Link]] = {}
    for link in links:
        into.setdefault(link.target, []).append(link)
    missing = []
    for number, leaf in enumerate(target.leaves):
        found = into.get(number, [])
        if number in filled:
            if found:
                raise PlanMismatchError(
                    f"jf.weights.plan: {leaf.name} takes the scales of another leaf, "
                    "and would be filled twice; rename its source to None"
                )
            continue
        dimensions = max((len(link.extent) for link in found), default=0)
        starts = [view_start(link.target_start, dimensions) for link in found]
        shapes = [view(link.extent, dimensions) for link in found]
        twice = None
        if len(found) > 1:
            twice = overlaps(np.asarray(starts, np.int64), np.asarray(shapes, np.int64))
        if twice is not None:
            raise PlanMismatchError(
                f"jf.weights.plan: {leaf.name} would be filled twice, at "
                f"{starts[twice[0]]} and at {starts[twice[1]]}"
            )
        if sum(math.prod(link.extent) for link in found) < math.prod(leaf.shape):
            missing.append(leaf.name)
    if missing:
        more = f" and {len(missing) - _NAMED_MAX} more" if len(missing) > 8 else ""
        raise PlanMismatchError(
            "jf.weights.plan: nothing fills (all of) "
            f"{', '.join(missing[:_NAMED_MAX])}{more}"
        )


def view_start(start: tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    """Where a box begins, with dimensions in front."""
    return (0,) * (dimensions - len(start)) + tuple(start)
