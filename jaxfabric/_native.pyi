"""The extension module, xla_ffi/python."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Spans (see jaxfabric._trace_file.Span), dropped, begin_ns, end_ns.
_Recording = tuple[list[tuple[Any, ...]], int, int, int]

class StatusError(RuntimeError):
    """A native status; its text is "CODE message"."""

def ffi_api_version() -> tuple[int, int]:
    """XLA FFI API that the handlers were built for."""

def targets() -> dict[str, Any]:
    """FFI handlers as capsules, by target name."""

def pool_threads() -> int:
    """Threads that complete calls at the moment."""

def transport_states(libfabric: str) -> list[tuple[str, str, str, str]]:
    """Name, state, reason and fix of each transport."""

def share_nics(
    transport: str,
    libfabric: str,
    cores: Sequence[int],
    gpus: Sequence[Sequence[str]],
) -> list[list[str]]: ...
def open_for_caps(kind: str, libfabric: str) -> dict[str, Any]:
    """What the first NIC of a transport says of itself, once it is open."""

def nearest_nics(
    transport: str, libfabric: str, cores: Sequence[int], gpus: Sequence[str]
) -> list[str]: ...
def quantise_blocks(
    dtype: str,
    values: int,
    shape: Sequence[int],
    strides: Sequence[int],
    payload: int,
    scales: int,
) -> None:
    """Addresses, and strides in bytes; see jaxfabric.weights._quantise."""

class NativeFabric:
    """The local ranks of one Fabric."""

    def __init__(
        self,
        name: str,
        mesh_shape: Sequence[int],
        local: Sequence[tuple[int, int]],
        generation: int,
        transport: str,
        secret: bytes,
        timeout_s: float,
        mailbox_bytes: int,
        window_bytes: int,
        spin_s: float,
        chaos: Mapping[str, float],
        network: str,
        libfabric: str = "",
        nics: Sequence[str] = (),
    ) -> None: ...
    def address(self, rank: int) -> bytes: ...
    def connect(self, rank: int, address: bytes, timeout_s: float) -> None: ...
    def publish(self, key: int) -> None: ...
    def allocate_window(self, bytes: int) -> tuple[int, int]: ...
    def failure(self) -> tuple[int, str, list[int]] | None: ...
    def drain(self, timeout_s: float) -> None: ...
    def stats(self) -> dict[int, dict[int, dict[str, int]]]: ...
    def start_trace(self, events_max: int) -> None: ...
    def stop_trace(self) -> dict[int, _Recording]: ...
    def operations_under_way(self) -> int: ...
    def close(self) -> None: ...

def parse_engine_address(address: bytes) -> tuple[str, str, str]:
    """Id, job and name of a TransferEngine's address."""

class NativeTransferFuture:
    """One operation of a TransferEngine."""

    @property
    def label(self) -> str: ...
    @property
    def peer(self) -> int | None: ...
    def done(self) -> bool: ...
    @property
    def failure(self) -> str: ...
    def wait(self, timeout_s: float) -> int: ...
    def on_done(self, callback: Callable[[], object]) -> None: ...

class NativeMrDesc:
    """A region, as its engine describes it to peers."""

    @staticmethod
    def from_bytes(data: bytes) -> NativeMrDesc: ...
    def to_bytes(self) -> bytes: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def owner(self) -> str: ...

class NativeWatcher:
    """A word that an engine watches."""

    @property
    def id(self) -> int: ...
    @property
    def value(self) -> int: ...
    def bump(self, by: int) -> None: ...

class NativePagePool:
    """Memory that programs copy pages into; see jaxfabric.kv."""

    def __init__(
        self,
        address: int,
        memory: object,
        layers: int,
        pages: int,
        page_bytes: int,
        watcher: NativeWatcher,
    ) -> None: ...
    @property
    def id(self) -> int: ...
    def take(self) -> list[tuple[int, int]]: ...
    def close(self) -> None: ...

class NativeTransferEngine:
    """A TransferEngine; regions, peers and groups are numbers here."""

    def __init__(
        self,
        transport: str,
        secret: bytes,
        chaos: Mapping[str, float],
        job: str,
        token: bytes,
        name: str,
        nics: int,
        timeout_s: float,
        spin_s: float,
        heartbeat_s: float,
        peer_timeout_s: float,
        libfabric: str,
        interfaces: Sequence[str],
    ) -> None: ...
    def address(self) -> bytes: ...
    def transport(self) -> str: ...
    def connect(
        self, address: bytes, timeout_s: float | None
    ) -> NativeTransferFuture: ...
    def disconnect(self, peer: int) -> None: ...
    def submit_fence(self, timeout_s: float | None) -> NativeTransferFuture: ...
    def add_peer_group(self, peers: Sequence[int]) -> int: ...
    def remove_peer_group(self, group: int) -> None: ...
    def register_memory(self, address: int, nbytes: int, buffer: object) -> int: ...
    def allocate_memory(self, nbytes: int) -> tuple[int, Any]: ...
    def unregister_memory(
        self, region: int, timeout_s: float | None
    ) -> NativeTransferFuture: ...
    def describe(self, region: int) -> NativeMrDesc: ...
    def submit_send(
        self, peer: int, message: bytes, timeout_s: float | None
    ) -> NativeTransferFuture: ...
    def submit_recvs(
        self, callback: Callable[[int, bytes, int], object] | None
    ) -> None: ...
    def receive(self, timeout_s: float) -> tuple[int, bytes, int] | None: ...
    def on_message(self, callback: Callable[[], object]) -> None: ...
    def submit_single_write(
        self,
        source: int,
        source_offset: int,
        target: NativeMrDesc,
        target_offset: int,
        nbytes: int,
        id: int | None,
        timeout_s: float | None,
    ) -> NativeTransferFuture: ...
    def submit_paged_writes(
        self,
        source: int,
        source_pages: Any,
        source_stride: int,
        source_offset: int,
        target: NativeMrDesc,
        target_pages: Any,
        target_stride: int,
        target_offset: int,
        page_bytes: int,
        id: int | None,
        timeout_s: float | None,
    ) -> NativeTransferFuture: ...
    def submit_scatter(
        self,
        source: int,
        targets: Sequence[tuple[NativeMrDesc, int, int, int]],
        id: int | None,
        timeout_s: float | None,
    ) -> NativeTransferFuture: ...
    def submit_barrier(
        self, group: int, id: int, timeout_s: float | None
    ) -> NativeTransferFuture: ...
    def expect_imm_count(
        self, id: int, count: int, peers: Sequence[int], timeout_s: float | None
    ) -> NativeTransferFuture: ...
    def imm_count(self, id: int) -> int: ...
    def alloc_watcher(
        self, callback: Callable[[int, int], object]
    ) -> NativeWatcher: ...
    def free_watcher(self, watcher: NativeWatcher) -> None: ...
    def cancel(self, future: NativeTransferFuture) -> bool: ...
    def drain(self, timeout_s: float) -> None: ...
    def start_trace(self, events_max: int) -> None: ...
    def stop_trace(self) -> _Recording: ...
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None: ...
