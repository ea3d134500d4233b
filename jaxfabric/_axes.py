"""Mesh axes as the operations see them: inside a fully manual shard_map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

AxisName = str | Sequence[str]


def axis_tuple(op: str, axis_name: AxisName) -> tuple[str, ...]:
    """Normalises an axis name; raises TypeError for anything but names."""
    names: tuple[str, ...] = ()
    if isinstance(axis_name, str):
        names = (axis_name,)
    elif isinstance(axis_name, Sequence):
        names = tuple(axis_name)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{op}: axis_name must be a mesh axis or a tuple of them, got {axis_name!r}"
        )
    return names


def axis_size(op: str, axis: tuple[str, ...]) -> int:
    """Number of ranks; raises ValueError outside a fully manual shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    shown = axis[0] if len(axis) == 1 else axis
    if mesh.empty or not mesh.manual_axes:
        raise ValueError(
            f"{op}: axis {shown!r} is not bound here; call it inside "
            "jax.shard_map(f, mesh=mesh, ...) over a mesh that has this axis"
        )
    for name in axis:
        if name not in mesh.axis_names:
            raise ValueError(
                f"{op}: axis {name!r} is not in the mesh, whose axes are "
                f"{tuple(mesh.axis_names)}; change axis_name= or the mesh"
            )
    automatic = [name for name in mesh.axis_names if name not in mesh.manual_axes]
    if automatic:
        raise ValueError(
            f"{op}: over axis {shown!r} it needs a fully manual shard_map, but mesh "
            f"axes {tuple(automatic)} are not manual here; drop axis_names= from "
            "jax.shard_map, or nest a jax.shard_map over these axes around the call"
        )
    return math.prod(mesh.shape[name] for name in axis)


def unify(axis: tuple[str, ...], *arrays: Any) -> tuple[Any, ...]:
    """Makes all leaves vary over the axis and over whatever any of them varies."""
    varying = set(axis)
    for leaf in jax.tree.leaves(arrays):
        varying |= jax.typeof(leaf).manual_axis_type.varying

    def widen(leaf: jax.Array) -> jax.Array:
        missing = varying - jax.typeof(leaf).manual_axis_type.varying
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying")

    return jax.tree.map(widen, arrays)
