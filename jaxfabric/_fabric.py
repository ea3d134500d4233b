"""Fabric: the open connection between the ranks of a mesh."""

from __future__ import annotations

import json
import math
import os
import pathlib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxfabric import _cuda, _current, _ffi
from jaxfabric._config import config, fabric_sizes
from jaxfabric._errors import (
    FabricError,
    PlanMismatchError,
    from_native,
    from_status,
)
from jaxfabric._interfaces import (
    choose_interfaces,
    network_host,
    place,
    share_interfaces,
)
from jaxfabric._libfabric import libfabric_path
from jaxfabric._mesh import (
    choose_transport,
    concrete_mesh,
    device_ordinal,
    is_on_gpus,
    stable_key,
    transport_options,
    warn_if_pool_is_narrow,
)
from jaxfabric._rendezvous import Rendezvous
from jaxfabric._time_limit import checked_limit
from jaxfabric._trace import EVENTS_MAX, Trace, begin_trace
from jaxfabric._trace_file import Recorded, recorded_ranks
from jaxfabric._window import WINDOWS_MAX, Window, checked_region

_FINISH_POLL_S = 1e-3


class Fabric:
    """Opens the engine for the ranks of ``mesh`` and connects them.

    A rank is a device of the mesh; ranks count through ``mesh.devices`` in row-major
    order. Every process that has devices in the mesh opens it, in the same order as
    other Fabrics. Several may be open; programs hold a stable key (mesh and name), so
    a function that was jitted under one Fabric runs under its successor.

    Args:
      mesh: a `jax.sharding.Mesh`; ``None`` takes the one of `jax.set_mesh`.
      transport: ``"shm"`` (processes of one host); ``"verbs"`` (ConnectX and others,
        by way of libibverbs); ``"ofi/tcp"``, ``"ofi/efa"`` and ``"ofi/efa-direct"``
        (NICs, by way of libfabric); ``"fake"`` (one process, seeded chaos, for tests);
        ``None`` is ``"shm"``. The processes of a host share its EFA and verbs devices
        evenly, each taking those closest to its GPUs, then to its cores. For TCP it is
        loopback if all processes run on one host, else the interface that leads to
        JAX's coordinator. JAXFABRIC_NICS names others, up to 8.
      timeout_s: time limit of each operation, in seconds, unless it has its own.
      name: tells Fabrics over one mesh apart.
      mailbox_bytes: largest message between two ranks, in bytes.
      window_bytes: memory for all windows, in bytes.
      chaos: options of the fake transport: ``seed``, ``pieces_max``,
        ``delay_max_s``, ``again_share``.

    Attributes:
      nics: the NICs that this process uses; none for transports without.

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
        self.mesh = concrete_mesh(mesh)
        self.name = "default" if name is None else name
        self.timeout_s = checked_limit(
            "jf.Fabric", settings.timeout_s if timeout_s is None else timeout_s
        )
        self.key = stable_key(self.mesh, self.name)
        self._devices = list(self.mesh.devices.flat)
        self._processes = sorted({d.process_index for d in self._devices})
        on_gpus = is_on_gpus(self.mesh)
        self.transport = (
            _cuda.TRANSPORT
            if on_gpus
            else choose_transport(transport or settings.transport, self._processes)
        )
        self._windows: list[Window] = []
        self._trace: Trace | None = None
        self.nics: list[str] = []
        if not on_gpus:
            warn_if_pool_is_narrow(self._devices)
        generation = _current.next_generation(self.key, self.name)
        self._rendezvous = Rendezvous(
            f"jaxfabric/{self.key:016x}/{generation}", self._processes, self.timeout_s
        )
        sizes = fabric_sizes(mailbox_bytes, window_bytes)
        self._native: Any = None
        try:
            options = transport_options(self.transport, chaos)
            self._connect(generation, sizes, settings.spin_s, options)
        except _ffi.native().StatusError as error:
            self._abandon()
            raise from_native(error) from None
        except BaseException:
            self._abandon()
            raise
        _current.add(self)

    def _connect(
        self,
        generation: int,
        sizes: tuple[int, int],
        spin_s: float,
        chaos: dict[str, float],
    ) -> None:
        secret = self._agree(sizes, chaos)
        if self.transport == _cuda.TRANSPORT:
            self._native = _cuda.open_group(
                self.mesh,
                sizes,
                self._rendezvous,
                key=self.key,
                timeout_s=self.timeout_s,
            )
            return
        me = jax.process_index()
        local = [
            (device_ordinal(device), rank)
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
            libfabric=libfabric_path(),
            nics=self.nics,
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
        payload = {
            "asked": asked,
            "secret": secrets.token_hex(32),
            "host": network_host(),
            "place": place(),
        }
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
        self.nics = self._choose_nics(answers)
        return bytes.fromhex(answers[0]["secret"])

    def _choose_nics(self, answers: Sequence[Mapping[str, Any]]) -> list[str]:
        hosts = [answer["host"] for answer in answers]
        if self.transport == _cuda.TRANSPORT:
            return _cuda.require_one_host(hosts)
        places = [answer["place"] for answer in answers]
        me = self._processes.index(jax.process_index())
        chosen = choose_interfaces(self.transport, hosts)
        return chosen or share_interfaces(self.transport, hosts, places, me)

    def _abandon(self) -> None:
        if self._native is not None:
            self._native.close()
        self._native = None

    def close(self) -> None:
        """Closes it; may be called again. What is under way fails with "closed"."""
        _current.remove(self)
        try:
            if self._trace is not None and not self.closed:
                self._trace.stop()
        finally:
            native, self._native = self._native, None
            if native is not None:
                native.close()
                self._rendezvous.forget()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._native is None

    def __enter__(self) -> Fabric:
        self.require_open()
        _current.entered().append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, traceback: object
    ) -> None:
        _current.entered().remove(self)
        if kind is not None and self._native is not None:
            # The others would wait for calls of this rank that never come.
            self._native.abort(f"{kind.__name__}: {error}")
        elif self._native is not None:
            self._finish()
        self.close()

    def _finish(self) -> None:
        """Lets calls that are under way end; their results may not be used yet."""
        deadline = time.monotonic() + self.timeout_s
        while self._native.operations_under_way() and time.monotonic() < deadline:
            time.sleep(_FINISH_POLL_S)

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.transport
        return f"Fabric({self.name!r}, {dict(self.mesh.shape)}, {state})"

    def require_open(self) -> Any:
        """The native side; raises FabricError once closed."""
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
          TypeError, ValueError: no shape, or no dtype of numbers in whole bytes.
          CapacityError: the windows do not fit ``window_bytes``.
          PlanMismatchError: processes asked for different windows.

        Example::

          win = fabric.window((4, 128), jnp.float32)   # 2 KiB on each rank
        """
        native = self.require_open()
        shape, kind = checked_region(shape, dtype)
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
        failed = self.require_open().failure()
        return None if failed is None else from_status(*failed)

    def snapshot(self) -> dict[int, dict[int, dict[str, int]]]:
        """Counters of each local rank, by peer, since the start.

        ``messages_sent``, ``message_bytes_sent`` (headers and rows, as on the wire),
        the same ``received``, ``puts``, ``put_bytes``, ``control_messages`` and
        ``stale_dropped`` (messages of an earlier generation).

        Example::

          fabric.snapshot()[0][1]["message_bytes_sent"]   # rank 0 to rank 1
        """
        return self.require_open().stats()

    def trace(
        self, path: str | os.PathLike[str], *, events_max: int = EVENTS_MAX
    ) -> Trace:
        """Records what the local ranks do, into a file for https://ui.perfetto.dev.

        The recording begins at once, and ends with the ``with`` block, with
        `Trace.stop`, or when the Fabric is closed. Each process writes a file of its
        own; where there are several, the process's index goes before the suffix:
        ``step.json`` is ``step.0.json``, ``step.1.json`` and so on. ``jaxfabric trace
        merge step.*.json -o step.json`` makes one of them, on one time line.

        Args:
          path: of the file.
          events_max: kept for each local rank; the oldest give way, and are counted.

        Raises:
          FabricError: a recording of this Fabric is running, or it is on GPUs.

        Example::

          with fabric.trace("step.json") as trace:   # trace.path is its name here
              jax.block_until_ready(step(x))
        """
        native = self.require_open()
        if self.transport == _cuda.TRANSPORT:
            raise FabricError(
                "fabric.trace: kernels record nothing; use jax.profiler on GPUs"
            )
        path = pathlib.Path(path)
        if len(self._processes) > 1:
            path = path.with_suffix(f".{jax.process_index()}{path.suffix}")
        self._trace = begin_trace(
            self._trace, path, events_max, native.start_trace, self._stop_trace
        )
        return self._trace

    def _stop_trace(self) -> list[Recorded]:
        recordings = self.require_open().stop_trace()
        ranks = range(len(self._devices))
        return recorded_ranks(recordings, ranks, self.nics or [self.transport])

    def peers(self) -> dict[int, dict[str, Any]]:
        """By rank: its process, whether it is up, and over what it is reached."""
        failed = self.require_open().failure()
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
