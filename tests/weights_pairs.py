"""The same drawn pairs of trees, pushed over any transport.

python weights_pairs.py TRANSPORT

A pair is drawn by hypothesis: two meshes with their own numbers of ranks, and leaves
that keep their names or not, change their dtype, are stacked, split, fused, quantised
with scales, or left out; each side shards each of them in its own way. Every transport
draws the same pairs; where that would take long, it carries out a few of them.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transfer_cases import PATIENCE_S
from weights_cases import (
    DTYPES,
    Arrays,
    assert_tiles,
    jobs,
    meshes,
    specs,
    whole_arrays,
)

from jaxfabric.weights import LeafLayout, MeshLayout, Place, Split, TreeLayout
from jaxfabric.weights._quantise import quantise

PAIRS, FEW = 16, 3
KINDS = ("kept", "renamed", "cast", "stacked", "split", "fused", "quantised", "left")
BLOCK = 128
_BLOCKS_MAX = 24  # of quantised leaves


@dataclasses.dataclass
class Model:
    """Leaves of a trainer, and what a sampler makes of them.

    Attributes:
      meshes: of both sides.
      source, target: the leaves.
      rename: as `jf.weights.plan` takes it.
      made_of: by target leaf, how it is computed from the source's arrays.
    """

    meshes: tuple[MeshLayout, MeshLayout]
    source: list[LeafLayout] = dataclasses.field(default_factory=list)
    target: list[LeafLayout] = dataclasses.field(default_factory=list)
    rename: dict[str, Any] = dataclasses.field(default_factory=dict)
    made_of: dict[str, Any] = dataclasses.field(default_factory=dict)

    def layouts(self) -> tuple[TreeLayout, TreeLayout]:
        """Of both sides."""
        return (
            TreeLayout(self.meshes[:1], tuple(self.source)),
            TreeLayout(self.meshes[1:], tuple(self.target)),
        )

    def wanted(self, arrays: Arrays) -> Arrays:
        """What the target's leaves are to be."""
        return {name: make(arrays) for name, make in self.made_of.items()}


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Two meshes, and a leaf of each kind."""
    model = Model((draw(meshes()), draw(meshes())))
    for number, kind in enumerate(draw(st.permutations(KINDS))):
        _ADDS[kind](draw, model, f"leaf{number}.{kind}")
    return model


def _cuts(draw: st.DrawFn, model: Model, dimensions: int) -> Any:
    """A spec for each side, and a shape that both divide."""
    cut = tuple(draw(specs(on, dimensions)) for on in model.meshes)
    shape = tuple(
        draw(st.integers(1, 3)) * math.lcm(*(_parts(on, axes) for on, axes in both))
        for both in zip(
            *([(on, a) for a in s] for on, s in zip(model.meshes, cut, strict=True)),
            strict=True,
        )
    )
    return *cut, shape


def _parts(on: MeshLayout, axes: tuple[str, ...]) -> int:
    return math.prod(dict(on.axes)[axis] for axis in axes)


def _kept(draw: st.DrawFn, model: Model, name: str) -> None:
    _renamed(draw, model, name, name)


def _renamed(draw: st.DrawFn, model: Model, name: str, into: str = "") -> None:
    into = into or f"new.{name}"
    ours, theirs, shape = _cuts(draw, model, draw(st.integers(0, 3)))
    dtype = draw(st.sampled_from(DTYPES))
    model.source.append(LeafLayout(name, shape, dtype, 0, ours))
    model.target.append(LeafLayout(into, shape, dtype, 0, theirs))
    model.rename[name] = into
    model.made_of[into] = lambda arrays: arrays[name]


def _cast(draw: st.DrawFn, model: Model, name: str) -> None:
    ours, theirs, shape = _cuts(draw, model, draw(st.integers(0, 3)))
    dtypes = draw(st.permutations(["float32", "bfloat16", "float16"]))
    model.source.append(LeafLayout(name, shape, dtypes[0], 0, ours))
    model.target.append(LeafLayout(name, shape, dtypes[1], 0, theirs))
    model.made_of[name] = lambda arrays: arrays[name].astype(dtypes[1])


def _stacked(draw: st.DrawFn, model: Model, name: str) -> None:
    """Experts of their own become one stack, which may be cut between them."""
    count, one, stack = _experts(draw, model, sides=(0, 1))
    shape, dtype = one[1], draw(st.sampled_from(DTYPES))
    names = [f"{name}.{i}" for i in range(count)]
    for i, each in enumerate(names):
        model.source.append(LeafLayout(each, shape, dtype, 0, one[0]))
        model.rename[each] = Place(name, index=i)
    model.target.append(LeafLayout(name, (count, *shape), dtype, 0, stack))
    model.made_of[name] = lambda arrays: np.stack([arrays[each] for each in names])


def _split(draw: st.DrawFn, model: Model, name: str) -> None:
    """The reverse."""
    count, one, stack = _experts(draw, model, sides=(1, 0))
    shape, dtype = one[1], draw(st.sampled_from(DTYPES))
    model.source.append(LeafLayout(name, (count, *shape), dtype, 0, stack))
    model.rename[name] = Split(f"{name}.{{}}")
    for i in range(count):
        each = f"{name}.{i}"
        model.target.append(LeafLayout(each, shape, dtype, 0, one[0]))
        model.made_of[each] = lambda arrays, i=i: arrays[name][i]


def _experts(draw: st.DrawFn, model: Model, sides: tuple[int, int]) -> Any:
    """How many; spec and shape of one; spec of a stack on the other side."""
    alone, together = (model.meshes[side] for side in sides)
    one, stack = draw(specs(alone, 2)), draw(specs(together, 3))
    count = draw(st.integers(1, 2)) * _parts(together, stack[0])
    shape = tuple(
        draw(st.integers(1, 3)) * math.lcm(_parts(alone, a), _parts(together, b))
        for a, b in zip(one, stack[1:], strict=True)
    )
    return count, (one, shape), stack


def _fused(draw: st.DrawFn, model: Model, name: str) -> None:
    """Two leaves side by side in one."""
    ours, theirs, half = _cuts(draw, model, 2)
    dtype = draw(st.sampled_from(DTYPES))
    axis = draw(st.integers(0, 1))
    names = f"{name}.gate", f"{name}.up"
    for i, each in enumerate(names):
        model.source.append(LeafLayout(each, half, dtype, 0, ours))
        start = [0, 0]
        start[axis] = i * half[axis]
        model.rename[each] = Place(name, start=tuple(start))
    whole = tuple(size * (1 + (i == axis)) for i, size in enumerate(half))
    model.target.append(LeafLayout(name, whole, dtype, 0, theirs))
    model.made_of[name] = lambda arrays: np.concatenate(
        [arrays[each] for each in names], axis
    )


def _quantised(draw: st.DrawFn, model: Model, name: str) -> None:
    """e4m3 with scales; where a dimension is not cut, its last block may be smaller."""
    ours, theirs, rough = _cuts(draw, model, 2)
    if math.prod(rough) > _BLOCKS_MAX:  # leave it whole on either side
        ours, theirs, rough = ((), ()), ((), ()), (1, 2)
    cut = [bool(a or b) for a, b in zip(ours, theirs, strict=True)]
    less = draw(st.sampled_from([0, 27]))
    shape = tuple(
        size * BLOCK - (0 if whole else less)
        for size, whole in zip(rough, cut, strict=True)
    )
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    scales = f"{name}_scale_inv"
    model.source.append(LeafLayout(name, shape, dtype, 0, ours))
    model.target += [
        LeafLayout(name, shape, "float8_e4m3fn", 0, theirs),
        LeafLayout(scales, rough, "float32", 0, theirs),
    ]
    model.made_of[name] = lambda arrays: quantise(arrays[name])[0]
    model.made_of[scales] = lambda arrays: quantise(arrays[name])[1]


def _left(draw: st.DrawFn, model: Model, name: str) -> None:
    ours, _, shape = _cuts(draw, model, 1)
    model.source.append(LeafLayout(name, shape, "float32", 0, ours))
    model.rename[name] = None


_ADDS: dict[str, Any] = {
    "kept": _kept,
    "renamed": _renamed,
    "cast": _cast,
    "stacked": _stacked,
    "split": _split,
    "fused": _fused,
    "quantised": _quantised,
    "left": _left,
}


def check_pairs(transport: str, pairs: int = PAIRS, most: int = PAIRS) -> int:
    """Each rank takes its tiles of what was pushed, to the bit; how many pairs.

    Args:
      pairs: that are drawn.
      most: that are carried out; if not all, then some with several ranks on each side.
    """
    done = 0
    failed: list[Model] = []

    @given(model=models(), seed=st.integers(0, 99))
    @settings(
        max_examples=pairs,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def holds(model: Model, seed: int) -> None:
        nonlocal done
        dull = most < pairs and any(len(set(on.ranks)) < 2 for on in model.meshes)
        if (dull or done == most) and not failed:  # a failure is made smaller
            return
        failed.append(model)
        _push(transport, model, seed)
        failed.pop()
        done += 1

    holds()
    return done


def _push(transport: str, model: Model, seed: int) -> None:
    source, target = model.layouts()
    with jobs(
        *(transport, source, target),
        bucket_bytes=1 << 18,
        rename=model.rename,
        cast=True,
        scales="{}_scale_inv",
    ) as both:
        for version in (1, 2):
            arrays = whole_arrays(source, seed + version)
            for push in both.push(arrays, version):
                push.wait(PATIENCE_S)
            wanted = model.wanted(arrays)
            for taken in both.take(version).values():
                assert taken.version == version
                assert_tiles(target, wanted, taken.params)


if __name__ == "__main__":
    assert check_pairs(sys.argv[1], most=FEW) == FEW
    print("all equal")
