"""Which part of a source leaf becomes which part of a target leaf."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxfabric._errors import PlanMismatchError
from jaxfabric.weights._buckets import BLOCK, scale_shape
from jaxfabric.weights._dtypes import E4M3, can_cast, wide_float
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
    """Finds the links that fill target leaves; `check_cover` sees if each is, once.

    Raises:
      PlanMismatchError: names the leaves that are not there, whose shapes do not fit,
        or whose dtypes differ.
    """
    numbers = {leaf.name: number for number, leaf in enumerate(target.leaves)}
    links: list[Link] = []
    for number, leaf in enumerate(source.leaves):
        for place, box in _places(leaf, rename):
            if place.name not in numbers:
                raise PlanMismatchError(
                    f"jf.weights.plan: {leaf.name} becomes {place.name}, which the "
                    "target does not have; rename it, or rename it to None to leave "
                    f"it out{_mistyped(source, rename)}"
                )
            found = numbers[place.name]
            into = target.leaves[found]
            link = _link(number, leaf, box, found, into, place)
            if into.dtype == E4M3 and wide_float(leaf.dtype):
                wanted = _format(scales, into.name, "scales is")
                own = numbers.get(wanted or "", -1)
                if own >= 0:
                    _check_scales(into, target.leaves[own])
                    link = dataclasses.replace(link, scales=own)
                elif wanted is not None:
                    raise PlanMismatchError(
                        f"jf.weights.plan: {leaf.name} is {leaf.dtype} and becomes "
                        f"{into.name}, {into.dtype}, whose scales would be {wanted}: "
                        "the target has no such leaf"
                    )
            if link.scales < 0:
                _check_dtypes(leaf, into, cast)
            links.append(link)
    return tuple(links)


def _mistyped(source: TreeLayout, rename: Rename | None) -> str:
    """Names of ``rename`` that no source leaf has: one of them may be meant."""
    if rename is None or callable(rename):
        return ""
    unknown = sorted(set(rename) - {leaf.name for leaf in source.leaves})
    if not unknown:
        return ""
    return f" (rename= has {', '.join(unknown[:_NAMED_MAX])}, no leaves of the source)"


def _format(pattern: str | None, value: Any, what: str) -> str | None:
    try:
        return None if pattern is None else pattern.format(value)
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        raise PlanMismatchError(
            f"jf.weights.plan: {what} {pattern!r}, which has to have one {{}}: "
            f"{error!r}"
        ) from None


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
        try:
            named = rename(leaf.name)
        except Exception as error:
            raise PlanMismatchError(
                f"jf.weights.plan: rename= of {leaf.name} failed: {error!r}"
            ) from error
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
            Place(_format(named.names, i, "a Split is") or ""),
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
    try:
        into = [operator.index(at) for at in place.start or (0,) * len(target.shape)]
    except TypeError:
        raise PlanMismatchError(
            f"jf.weights.plan: {leaf.name} becomes {place}, which starts at no numbers "
            "of elements"
        ) from None
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


def _check_scales(leaf: LeafLayout, scales: LeafLayout) -> None:
    """Whether a leaf of the target that is quantised in blocks has such scales."""
    shape = leaf.shape
    if len(shape) < 2 or scales.shape != scale_shape(shape):
        wanted = scale_shape(shape) if len(shape) > 1 else "two dimensions"
        raise PlanMismatchError(
            f"jf.weights.plan: {leaf.name} of shape {shape} has scales {scales.name} "
            f"of shape {scales.shape}; blocks of 128x128 need {wanted}"
        )
    if scales.dtype != "float32":
        raise PlanMismatchError(
            f"jf.weights.plan: {scales.name} has dtype {scales.dtype}; scales are "
            "float32"
        )


def _check_dtypes(source: LeafLayout, target: LeafLayout, cast: bool) -> None:
    if source.dtype == target.dtype:
        return
    allowed = can_cast(source.dtype, target.dtype)
    if cast and allowed:
        return
    way_out = "cast=True rounds it"
    if not allowed:
        way_out = (
            "cast=True takes floats of two bytes and more to such floats, and integers "
            "to wider ones: convert it in the source's program"
        )
        if target.dtype == E4M3 and wide_float(source.dtype):
            way_out += ", or give the target a leaf of scales, and plan scales="
    raise PlanMismatchError(
        f"jf.weights.plan: {source.name} is {source.dtype} at the source and "
        f"{target.name} is {target.dtype} at the target; {way_out}"
    )


def check_cover(
    target: TreeLayout, links: Sequence[Link], source: TreeLayout | None = None
) -> None:
    """Raises PlanMismatchError unless each leaf is filled once, by its name.

    A leaf of scales is filled with what is quantised, by copies, or partly by either.
    """
    into: dict[int, list[tuple[Link, bool]]] = {}
    for link in links:
        into.setdefault(link.target, []).append((link, False))
        if link.scales >= 0:
            into.setdefault(link.scales, []).append((link, True))
    missing = []
    for number, leaf in enumerate(target.leaves):
        found = into.get(number, [])
        boxes = [_box(link, of_scales) for link, of_scales in found]
        dimensions = max((len(shape) for _, shape in boxes), default=0)
        twice = None
        if len(found) > 1:
            twice = overlaps(
                np.asarray([view_start(s, dimensions) for s, _ in boxes], np.int64),
                np.asarray([view(shape, dimensions) for _, shape in boxes], np.int64),
            )
        if twice is not None:
            raise _filled_twice(leaf, source, [(*found[i], boxes[i]) for i in twice])
        if sum(math.prod(shape) for _, shape in boxes) < math.prod(leaf.shape):
            missing.append(leaf.name)
    if missing:
        more = f" and {len(missing) - _NAMED_MAX} more" if len(missing) > 8 else ""
        raise PlanMismatchError(
            "jf.weights.plan: nothing fills (all of) "
            f"{', '.join(missing[:_NAMED_MAX])}{more}"
        )


_Box = tuple[tuple[int, ...], tuple[int, ...]]


def _box(link: Link, of_scales: bool) -> _Box:
    """Where a link goes in its leaf, or in that of its scales, and how much that is."""
    start, extent = link.target_start, link.extent
    if not of_scales:
        return start, extent
    return (*start[:-2], *(at // BLOCK for at in start[-2:])), scale_shape(extent)


def _filled_twice(
    leaf: LeafLayout,
    source: TreeLayout | None,
    found: list[tuple[Link, bool, _Box]],
) -> PlanMismatchError:
    parts = []
    way_out = ""
    for link, of_scales, (start, _) in found:
        name = source.leaves[link.source].name if source else f"leaf {link.source}"
        if of_scales:
            way_out = (
                f"; {name} is quantised on its way, which makes these scales: if it "
                "needs others besides, convert it in the source's program"
            )
            name = f"the scales of {name}"
        parts.append(f"at {start} from {name}")
    return PlanMismatchError(
        f"jf.weights.plan: {leaf.name} would be filled twice, {' and '.join(parts)}"
        f"{way_out}"
    )


def view_start(start: tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    """Where a box begins, with dimensions in front."""
    return (0,) * (dimensions - len(start)) + tuple(start)
