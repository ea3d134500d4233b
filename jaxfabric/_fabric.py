"""Fabric: the open connection between the ranks of a mesh."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxfabric import _ffi
from jaxfabric._config import config
from jaxfabric._errors import (
    FabricError,
    PlanMismatchError,
    TransportUnavailableError,
    from_native,
    from_status,
)
from jaxfabric._rendezvous import Rendezvous

TRANSPORTS = ("shm", "fake")

# Ids of transfers hold a window's index and the user's id in 7 and 8 bits.
WINDOWS_MAX = 128
USER_IDS_MAX = 256

_lock = threading.Lock()
_open: list[Fabric] = []  # in the order of opening
_entered = threading.local()  # .stack: Fabrics entered with `with`, innermost last
_generations: dict[int, int] = {}  # by key: how often it was opened


@dataclasses.dataclass(frozen=True)
class Window:
    """A region of the same size on each rank, which peers write with `put`.

    A static handle: closed over by programs, never a traced value.

    Attributes:
      shape: of the region on each rank.
      dtype: of its elements.
      index: which window of the Fabric it is, in the order of creation.
      fabric_key: the stable key of the Fabric.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    index: int
    fabric_key: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Fabric:
    """Opens the engine for the ranks of ``mesh`` and connects them.

    A rank is a device of the mesh; ranks count through ``mesh.devices`` in row-major
    order. Every process that has devices in the mesh opens it, in the same order as
    other Fabrics. Several may be open; programs hold a stable key (mesh and name), so
    a function that was jitted under one Fabric runs under its successor.

    Args:
      mesh: a `jax.sharding.Mesh`; ``None`` takes the one of `jax.set_mesh`.
      transport: ``"shm"`` (processes of one host); ``"fake"`` (one process, seeded
        chaos, for tests); ``None`` is the best that works.
      timeout_s: time limit of each operation, in seconds, unless it has its own.
      name: tells Fabrics over one mesh apart.
      mailbox_bytes: largest message between two ranks, in bytes.
      window_bytes: memory for all windows, in bytes.
      chaos: options of the fake transport: ``seed``, ``pieces_max``,
        ``delay_max_s``, ``again_share``.

    Raises:
      TransportUnavailableError: the transport cannot work here, with the reason.
      PlanMismatchError: processes opened it with different settings.
      DeadlineError: a process did not come; names it.
      FabricError: a Fabric of this mesh and name is open already.

    Example::

      mesh = jax.make_mesh((jax.device_count(),), ("expert",))
      with jf.Fabric(mesh) as fabric:
          y = step(x)
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh | None = None,
        *,
        transport: str | None = None,
        timeout_s: float | None = None,
        name: str | None = None,
        mailbox_bytes: int | None = None,
        window_bytes: int | None = None,
        chaos: Mapping[str, float] | None = None,
    ) -> None:
        settings = config.settings
        self.mesh = _concrete_mesh(mesh)
        self.name = "default" if name is None else name
        self.timeout_s = settings.timeout_s if timeout_s is None else float(timeout_s)
        if not self.timeout_s > 0:
            raise ValueError(
                f"jf.Fabric: timeout_s={timeout_s} must be above 0 seconds"
            )
        self.key = _stable_key(self.mesh, self.name)
        self._devices = list(self.mesh.devices.flat)
        self._processes = sorted({d.process_index for d in self._devices})
        self.transport = _choose_transport(
            transport or settings.transport, self._processes
        )
        self._windows: list[Window] = []
        with _lock:
            if any(other.key == self.key for other in _open):
                raise FabricError(
                    f"jf.Fabric: {self.name!r} is open over this mesh already; close "
                    "it, or give one of them another name="
                )
            generation = _generations[self.key] = _generations.get(self.key, 0) + 1
        self._rendezvous = Rendezvous(
            f"jaxfabric/{self.key:016x}/{generation}", self._processes, self.timeout_s
        )
        sizes = (
            settings.mailbox_bytes if mailbox_bytes is None else int(mailbox_bytes),
            settings.window_bytes if window_bytes is None else int(window_bytes),
        )
        self._native: Any = None
        try:
            self._connect(generation, sizes, settings.spin_s, dict(chaos or {}))
        except _ffi.native().StatusError as error:
            self._abandon()
            raise from_native(error) from None
        except BaseException:
            self._abandon()
            raise
        with _lock:
            _open.append(self)

    def _connect(
        self,
        generation: int,
        sizes: tuple[int, int],
        spin_s: float,
        chaos: dict[str, float],
    ) -> None:
        secret = self._agree(sizes, chaos)
        me = jax.process_index()
        local = [
            (_device_ordinal(device), rank)
            for rank, device in enumerate(self._devices)
            if device.process_index == me
        ]
        self._native = _ffi.native().NativeFabric(
            name=self.name,
            mesh_shape=list(self.mesh.devices.shape),
            local=local,
            generation=generation,
            transport=self.transport,
            secret=secret,
            timeout_s=self.timeout_s,
            mailbox_bytes=sizes[0],
            window_bytes=sizes[1],
            spin_s=spin_s,
            chaos=chaos,
            network=f"{self.key:x}/{generation}",
        )
        mine = {rank: self._native.address(rank).hex() for _, rank in local}
        for payload in self._rendezvous.all_gather(json.dumps(mine).encode()):
            for rank, address in json.loads(payload).items():
                self._native.connect(int(rank), bytes.fromhex(address), self.timeout_s)
        # A notice from a rank that is not connected yet would be lost.
        self._rendezvous.all_gather(b"connected")
        self._native.publish(self.key)

    def _agree(self, sizes: tuple[int, int], chaos: dict[str, float]) -> bytes:
        """Compares settings with the other processes; returns the job's secret."""
        from jaxfabric import __version__

        asked = {
            "jaxfabric": __version__,
            "transport": self.transport,
            "mailbox_bytes": sizes[0],
            "window_bytes": sizes[1],
            "chaos": chaos,
        }
        payload = {"asked": asked, "secret": secrets.token_hex(32)}
        answers = [
            json.loads(answer)
            for answer in self._rendezvous.all_gather(json.dumps(payload).encode())
        ]
        for process, answer in zip(self._processes, answers, strict=True):
            for what, value in asked.items():
                if answer["asked"][what] != value:
                    raise PlanMismatchError(
                        f"jf.Fabric {self.name!r}: {what} is {value!r} on process "
                        f"{jax.process_index()} but {answer['asked'][what]!r} on "
                        f"process {process}; give all processes the same"
                    )
        return bytes.fromhex(answers[0]["secret"])

    def _abandon(self) -> None:
        if self._native is not None:
            self._native.close()
        self._native = None

    def close(self) -> None:
        """Closes it; may be called again. What is under way fails with "closed"."""
        with _lock:
            if self in _open:
                _open.remove(self)
        native, self._native = self._native, None
        if native is not None:
            native.close()
            self._rendezvous.forget()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._native is None

    def __enter__(self) -> Fabric:
        self._require_open()
        _stack().append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, traceback: object
    ) -> None:
        _stack().remove(self)
        if kind is not None and self._native is not None:
            # The others would wait for calls of this rank that never come.
            self._native.abort(f"{kind.__name__}: {error}")
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.transport
        return f"Fabric({self.name!r}, {dict(self.mesh.shape)}, {state})"

    def _require_open(self) -> Any:
        if self._native is None:
            raise FabricError(
                f"the Fabric {self.name!r} is closed; open it again with "
                "jf.Fabric(mesh)"
            )
        return self._native

    def window(self, shape: Sequence[int] | int, dtype: Any) -> Window:
        """Makes a symmetric region, zero-filled, on each rank. Collective.

        Args:
          shape: of the region on each rank.
          dtype: of its elements.

        Raises:
          CapacityError: the windows do not fit ``window_bytes``.
          PlanMismatchError: processes asked for different windows.

        Example::

          win = fabric.window((4, 128), jnp.float32)   # 2 KiB on each rank
        """
        native = self._require_open()
        shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        kind = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
        if len(self._windows) == WINDOWS_MAX:
            raise from_status(8, f"a Fabric has at most {WINDOWS_MAX} windows")
        asked = f"{shape} {kind.name}"
        for process, other in zip(
            self._processes, self._rendezvous.all_gather(asked.encode()), strict=True
        ):
            if other.decode() != asked:
                raise PlanMismatchError(
                    f"fabric.window: {asked} on process {jax.process_index()} but "
                    f"{other.decode()} on process {process}; all processes make the "
                    "same windows in the same order"
                )
        try:
            index, _ = native.allocate_window(math.prod(shape) * kind.itemsize)
        except _ffi.native().StatusError as error:
            raise from_native(error) from None
        window = Window(shape, kind, index, self.key)
        self._windows.append(window)
        return window

    def failure(self) -> FabricError | None:
        """Why this Fabric can do no more, or ``None``.

        A failed Fabric is closed and opened again by all ranks that are left.
        """
        failed = self._require_open().failure()
        return None if failed is None else from_status(*failed)

    def snapshot(self) -> dict[int, dict[int, dict[str, int]]]:
        """Counters of each local rank, by peer, since the start.

        ``messages_sent``, ``message_bytes_sent`` (headers and rows, as on the wire),
        the same ``received``, ``puts``, ``put_bytes``, ``control_messages`` and
        ``stale_dropped`` (messages of an earlier generation).

        Example::

          fabric.snapshot()[0][1]["message_bytes_sent"]   # rank 0 to rank 1
        """
        return self._require_open().stats()

    def peers(self) -> dict[int, dict[str, Any]]:
        """By rank: its process, whether it is up, and over what it is reached."""
        failed = self._require_open().failure()
        lost = set() if failed is None else set(failed[2])
        me = jax.process_index()
        return {
            rank: {
                "process": device.process_index,
                "local": device.process_index == me,
                "up": rank not in lost,
                "transport": self.transport,
            }
            for rank, device in enumerate(self._devices)
        }


def find(axis: tuple[str, ...], fabric: Fabric | None = None) -> Fabric | None:
    """The Fabric for an operation over ``axis``.

    ``fabric`` if given; else the innermost entered one whose mesh has the axis; else
    the only open one. Raises FabricError if several would do.
    """
    if fabric is not None:
        fabric._require_open()
        _require_axes(fabric, axis)
        return fabric
    for entered in reversed(_stack()):
        if set(axis) <= set(entered.mesh.axis_names):
            return _require_axes(entered, axis)
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


def _stack() -> list[Fabric]:
    if not hasattr(_entered, "stack"):
        _entered.stack = []
    return _entered.stack


def _concrete_mesh(mesh: jax.sharding.Mesh | None) -> jax.sharding.Mesh:
    if mesh is None:
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(
                "jf.Fabric: no mesh; pass one (jax.make_mesh((jax.device_count(),), "
                "('expert',))) or set one with jax.set_mesh"
            )
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(
            f"jf.Fabric: mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}"
        )
    platforms = {device.platform for device in mesh.devices.flat}
    if platforms != {"cpu"}:
        raise TransportUnavailableError(
            f"jf.Fabric: the mesh has devices of {sorted(platforms)}, and only cpu is "
            "supported so far; use implementation='reference' there, or a CPU mesh"
        )
    return mesh


def _stable_key(mesh: jax.sharding.Mesh, name: str) -> int:
    """Equal on all processes and in all runs; fits an int64 attribute."""
    ids = [device.id for device in mesh.devices.flat]
    text = repr((name, mesh.axis_names, mesh.devices.shape, ids))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _device_ordinal(device: jax.Device) -> int:
    """What XLA calls this device in the frame of a handler."""
    return device.id


def _choose_transport(asked: str | None, processes: Sequence[int]) -> str:
    if asked is None:
        return "shm"
    if asked not in TRANSPORTS:
        raise TransportUnavailableError(
            f"jf.Fabric: transport={asked!r} is not built; there are "
            f"{', '.join(TRANSPORTS)}"
        )
    if asked == "fake" and len(processes) > 1:
        raise TransportUnavailableError(
            "jf.Fabric: transport='fake' joins ranks of one process, and this mesh "
            f"has {len(processes)} processes; use transport='shm'"
        )
    return asked


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
