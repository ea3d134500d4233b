"""libjaxfabric_cuda, by way of ctypes: a Fabric's GPUs, and the CUDA targets.

The library is built where there is a CUDA compiler (see cuda/). Without it, and for
meshes of CPUs, nothing here is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax

from jaxfabric._descriptors import Exchange
from jaxfabric._errors import FabricError, TransportUnavailableError, from_status
from jaxfabric._rendezvous import Rendezvous

TRANSPORT = "nvlink"

# FFI targets that exist on GPUs, by the name that programs use on every platform.
TARGETS = {
    "jaxfabric_barrier": "JaxfabricCudaBarrier",
    "jaxfabric_exchange": "JaxfabricCudaExchange",
    "jaxfabric_put": "JaxfabricCudaPut",
    "jaxfabric_put_pages": "JaxfabricCudaPutPages",
    "jaxfabric_scatter": "JaxfabricCudaScatter",
    "jaxfabric_wait": "JaxfabricCudaWait",
    "jaxfabric_route": "JaxfabricCudaRoute",
    "jaxfabric_route_start": "JaxfabricCudaRouteStart",
    "jaxfabric_route_done": "JaxfabricCudaRouteDone",
    "jaxfabric_reduce": "JaxfabricCudaReduce",
    "jaxfabric_reduce_start": "JaxfabricCudaReduceStart",
    "jaxfabric_reduce_done": "JaxfabricCudaReduceDone",
    "jaxfabric_replay": "JaxfabricCudaReplay",
}
_LIBRARY = "libjaxfabric_cuda.so"


def library_path() -> pathlib.Path | None:
    """Where the library is, or ``None`` if this package was built without it."""
    path = pathlib.Path(__file__).parent / _LIBRARY
    return path if path.is_file() else None


@functools.cache
def library() -> ctypes.CDLL:
    """The library; raises TransportUnavailableError with the way out."""
    path = library_path()
    if path is None:
        raise TransportUnavailableError(
            f"jf.Fabric: a mesh of GPUs needs {_LIBRARY}, which this package was built "
            "without: `pip install .` builds it where nvcc is in PATH "
            "(JAXFABRIC_BUILD_CUDA=ON insists on it); or use "
            "implementation='reference', which needs no Fabric"
        )
    loaded = ctypes.CDLL(str(path))
    loaded.jaxfabric_cuda_error.restype = ctypes.c_char_p
    loaded.jaxfabric_cuda_calls.restype = ctypes.c_int64
    for name in ("JaxfabricCudaCallTypeId", "JaxfabricCudaCallTypeInfo"):
        getattr(loaded, name).restype = ctypes.c_void_p
    return loaded


@functools.cache
def register_targets() -> None:
    """Registers the handlers, once; to be called when something is lowered."""
    loaded = library()
    kept: Any = {
        "type_id": jax.ffi.pycapsule(loaded.JaxfabricCudaCallTypeId()),
        "type_info": jax.ffi.pycapsule(loaded.JaxfabricCudaCallTypeInfo()),
    }
    jax.ffi.register_ffi_type("jaxfabric_cuda_call", kept, platform="CUDA")
    around = {
        "instantiate": jax.ffi.pycapsule(loaded.JaxfabricCudaNewCall),
        "initialize": jax.ffi.pycapsule(loaded.JaxfabricCudaBeforeCall),
    }
    for name, symbol in TARGETS.items():
        execute = jax.ffi.pycapsule(getattr(loaded, symbol))
        handler = around | {"execute": execute}
        jax.ffi.register_ffi_target(name, handler, platform="CUDA")


def _check(code: int) -> None:
    if code != 0:
        raise from_status(code, library().jaxfabric_cuda_error().decode())


class CudaGroup:
    """The GPUs of a Fabric, in the place of its native side.

    Args:
      mesh_shape: sizes of the mesh's axes; ranks count through it in row-major order.
      local: (CUDA ordinal, rank) of this process's devices.
      sizes: ``mailbox_bytes`` and ``window_bytes``, for each rank.
      rendezvous: of the mesh's processes.
      owners: the process of each rank.
    """

    def __init__(
        self,
        mesh_shape: Sequence[int],
        local: Sequence[tuple[int, int]],
        sizes: tuple[int, int],
        rendezvous: Rendezvous,
        owners: Sequence[int],
        *,
        key: int,
        timeout_s: float,
    ) -> None:
        self._library = library()
        self._handle = ctypes.c_void_p()
        self._aborted = False
        mailbox_bytes, window_bytes = sizes
        _check(
            self._library.jaxfabric_cuda_create(
                ctypes.c_int64(key),
                (ctypes.c_int64 * len(mesh_shape))(*mesh_shape),
                len(mesh_shape),
                ctypes.c_uint64(window_bytes),
                ctypes.c_uint64(mailbox_bytes),
                ctypes.byref(self._handle),
            )
        )
        try:
            self._open(local, rendezvous, owners)
            _check(
                self._library.jaxfabric_cuda_publish(
                    self._handle, ctypes.c_int64(key), ctypes.c_double(timeout_s)
                )
            )
        except BaseException:
            self._aborted = True  # what failed is on its way already
            self.close()  # heaps may be most of the device's memory
            raise

    def _open(
        self,
        local: Sequence[tuple[int, int]],
        rendezvous: Rendezvous,
        owners: Sequence[int],
    ) -> None:
        for device, rank in local:
            _check(self._library.jaxfabric_cuda_add_local(self._handle, rank, device))
        self._exchange_heaps([rank for _, rank in local], rendezvous, owners)
        _check(self._library.jaxfabric_cuda_open(self._handle))
        rendezvous.all_gather(b"mapped")  # nobody writes to a heap before

    def allocate_window(self, size: int) -> tuple[int, int]:
        """The index of a new window of ``size`` bytes, and 0 for its address."""
        index = ctypes.c_int()
        _check(
            self._library.jaxfabric_cuda_allocate_window(
                self._handle, ctypes.c_uint64(size), ctypes.byref(index)
            )
        )
        return index.value, 0

    def calls(self) -> int:
        """How often XLA asked for a call of ours; replayed ones are not asked for."""
        return self._library.jaxfabric_cuda_calls(self._handle)

    def failure(self) -> tuple[int, str, list[int]] | None:
        """The first failure of a kernel: code, text and lost peers."""
        code = self._library.jaxfabric_cuda_failure(self._handle)
        if code == 0:
            return None
        return code, self._library.jaxfabric_cuda_error().decode(), []

    def operations_under_way(self) -> int:
        """None that Python would have to wait for: closing waits for the device."""
        return 0

    def abort(self, reason: str) -> None:
        """Peers that wait for this rank end with their time limit."""
        self._aborted = True

    def close(self) -> None:
        """Waits for the kernels under way, and frees the heaps.

        Raises:
          FabricError: a kernel failed, and no later call has said so.
        """
        if self._handle:
            handle, self._handle = self._handle, ctypes.c_void_p()
            code = self._library.jaxfabric_cuda_close(handle)
            if not self._aborted:
                _check(code)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise FabricError(f"a Fabric over GPUs has no {name.replace('_', ' ')} yet")

    def _exchange_heaps(
        self, mine: Sequence[int], rendezvous: Rendezvous, owners: Sequence[int]
    ) -> None:
        """Hands this process's heaps to the others as file descriptors."""
        ranks: dict[int, list[int]] = {}
        for rank, owner in enumerate(owners):
            ranks.setdefault(owner, []).append(rank)
        exchange = Exchange(
            "jf.Fabric: heaps of GPUs", owners[mine[0]], ranks, rendezvous
        )
        with self._exported(mine) as fds, exchange.run(fds) as theirs:
            for process, heaps in theirs.items():
                for rank, fd in zip(ranks[process], heaps, strict=True):
                    _check(self._library.jaxfabric_cuda_import(self._handle, rank, fd))

    @contextlib.contextmanager
    def _exported(self, ranks: Sequence[int]) -> Iterator[list[int]]:
        fds: list[int] = []
        try:
            for rank in ranks:
                fd = ctypes.c_int()
                _check(
                    self._library.jaxfabric_cuda_export(
                        self._handle, rank, ctypes.byref(fd)
                    )
                )
                fds.append(fd.value)
            yield fds
        finally:
            for number in fds:
                os.close(number)


def require_one_host(hosts: Sequence[str]) -> list[str]:
    """The NICs of a mesh of GPUs: none.

    Raises:
      TransportUnavailableError: the GPUs are of several hosts.
    """
    if (count := len(set(hosts))) > 1:
        raise TransportUnavailableError(
            f"jf.Fabric: the mesh has GPUs of {count} hosts or network namespaces, but "
            "a Fabric over GPUs is within the NVLink of one; use "
            "implementation='ragged' or 'reference' there"
        )
    return []


def open_group(
    mesh: jax.sharding.Mesh,
    sizes: tuple[int, int],
    rendezvous: Rendezvous,
    *,
    key: int,
    timeout_s: float,
) -> Any:
    """Opens and publishes the group of a mesh's devices."""
    me = jax.process_index()
    devices = list(mesh.devices.flat)
    local = [
        (device.local_hardware_id, rank)
        for rank, device in enumerate(devices)
        if device.process_index == me
    ]
    owners = [device.process_index for device in devices]
    return CudaGroup(
        mesh.devices.shape,
        local,
        sizes,
        rendezvous,
        owners,
        key=key,
        timeout_s=timeout_s,
    )
