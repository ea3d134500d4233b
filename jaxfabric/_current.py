"""Which Fabric a call uses: the open ones, and the ones entered with ``with``."""

from __future__ import annotations

import atexit
import functools
import threading
from typing import TYPE_CHECKING

import jax

from jaxfabric._errors import FabricError

if TYPE_CHECKING:
    from jaxfabric._fabric import Fabric

_lock = threading.Lock()
_open: list[Fabric] = []  # in the order of opening
_entered = threading.local()  # .stack: Fabrics entered with `with`, innermost last
_generations: dict[int, int] = {}  # by key: how often it was opened


def next_generation(key: int, name: str) -> int:
    """How often this Fabric is opened now; raises FabricError if it is open."""
    with _lock:
        if any(fabric.key == key for fabric in _open):
            raise FabricError(
                f"jf.Fabric: {name!r} is open over this mesh already; close it, or "
                "give one of them another name="
            )
        _generations[key] = _generations.get(key, 0) + 1
        return _generations[key]


def add(fabric: Fabric) -> None:
    """Makes an open Fabric known to calls."""
    _close_at_exit()
    with _lock:
        _open.append(fabric)


@functools.cache
def _close_at_exit() -> None:
    """A rank that just ends would look lost to slower ones, so it says goodbye.

    Registered with the first Fabric, hence after JAX's own function, and so run before
    JAX leaves its cluster.
    """

    def close_all() -> None:
        for fabric in list(_open):
            fabric.close()

    atexit.register(close_all)


def remove(fabric: Fabric) -> None:
    """Takes a closed Fabric away; may be called again."""
    with _lock:
        if fabric in _open:
            _open.remove(fabric)


def entered() -> list[Fabric]:
    """This thread's Fabrics in `with` blocks, the innermost last."""
    if not hasattr(_entered, "stack"):
        _entered.stack = []
    stack: list[Fabric] = _entered.stack
    return stack


def find(axis: tuple[str, ...], fabric: Fabric | None = None) -> Fabric | None:
    """The Fabric for an operation over ``axis``.

    ``fabric`` if given; else the innermost entered one whose mesh has the axis; else
    the only open one. Raises FabricError if several would do.
    """
    if fabric is not None:
        fabric.require_open()
        _require_axes(fabric, axis)
        return fabric
    for inner in reversed(entered()):
        if set(axis) <= set(inner.mesh.axis_names):
            return _require_axes(inner, axis)
    with _lock:
        able = [f for f in _open if set(axis) <= set(f.mesh.axis_names)]
    if len(able) > 1:
        raise FabricError(
            f"several open Fabrics have axis {axis}: "
            f"{', '.join(repr(f.name) for f in able)}; say which with fabric="
        )
    return _require_axes(able[0], axis) if able else None


def require(op: str, axis: tuple[str, ...], fabric: Fabric | None = None) -> Fabric:
    """Like `find`, but raises FabricError if there is none."""
    found = find(axis, fabric)
    if found is None:
        raise FabricError(
            f"{op}: no open Fabric has axis {axis[0] if len(axis) == 1 else axis!r}; "
            "wrap the call in `with jf.Fabric(mesh):`"
        )
    return found


def _require_axes(fabric: Fabric, axis: tuple[str, ...]) -> Fabric:
    """Raises if the mesh in force is not the Fabric's."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and dict(mesh.shape) != dict(fabric.mesh.shape):
        raise FabricError(
            f"the mesh of this shard_map is {dict(mesh.shape)}, but the Fabric "
            f"{fabric.name!r} was opened over {dict(fabric.mesh.shape)} (axis {axis}); "
            "open a Fabric over the same mesh, or pass fabric="
        )
    return fabric


def by_key(op: str, axis: tuple[str, ...], key: int | None) -> Fabric:
    """The open Fabric with this stable key; raises FabricError."""
    with _lock:
        for fabric in _open:
            if fabric.key == key:
                return _require_axes(fabric, axis)
    raise FabricError(
        f"{op}: the Fabric that the plan was made under is closed; open one over the "
        "same mesh, and with the same name=, around the call"
    )
