"""The extension module, xla_ffi/python."""

from collections.abc import Mapping, Sequence
from typing import Any

class StatusError(RuntimeError):
    """A native status; its text is "CODE message"."""

def ffi_api_version() -> tuple[int, int]:
    """XLA FFI API that the handlers were built for."""

def targets() -> dict[str, Any]:
    """FFI handlers as capsules, by target name."""

def pool_threads() -> int:
    """Threads that complete calls at the moment."""

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
    ) -> None: ...
    def address(self, rank: int) -> bytes: ...
    def connect(self, rank: int, address: bytes, timeout_s: float) -> None: ...
    def publish(self, key: int) -> None: ...
    def allocate_window(self, bytes: int) -> tuple[int, int]: ...
    def failure(self) -> tuple[int, str, list[int]] | None: ...
    def drain(self, timeout_s: float) -> None: ...
    def stats(self) -> dict[int, dict[int, dict[str, int]]]: ...
    def operations_under_way(self) -> int: ...
    def close(self) -> None: ...
