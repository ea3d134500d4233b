"""NetAddr and MrDesc: what engines tell each other of themselves, as bytes."""

from __future__ import annotations

from typing import Any

from jaxfabric import _ffi
from jaxfabric._errors import from_native


class NetAddr:
    """The address of a TransferEngine: opaque bytes, to be sent by any means.

    It names one incarnation: an engine that was started again has another one. It
    holds no secret, but who knows it and has the job's token may connect.

    Attributes:
      id: eight hexadecimal digits that tell engines apart in messages.
      job: the job that the engine is of.
      name: the engine's own, for messages.

    Example::

      pathlib.Path("address").write_bytes(engine.address().to_bytes())
      # elsewhere
      address = jf.NetAddr.from_bytes(pathlib.Path("address").read_bytes())
    """

    def __init__(self, data: bytes) -> None:
        self._data = bytes(data)
        native = _ffi.native()
        try:
            self.id, self.job, self.name = native.parse_engine_address(self._data)
        except native.StatusError as error:
            raise from_native(error) from None

    @classmethod
    def from_bytes(cls, data: bytes) -> NetAddr:
        """Reads what `to_bytes` gave; raises FabricError on anything else."""
        return cls(data)

    def to_bytes(self) -> bytes:
        """The address as bytes."""
        return self._data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NetAddr) and other._data == self._data

    def __hash__(self) -> int:
        return hash(self._data)

    def __reduce__(self) -> tuple[Any, ...]:
        return NetAddr, (self._data,)

    def __repr__(self) -> str:
        return f"NetAddr({self.name} ({self.id}), job {self.job!r})"


class MrDesc:
    """Describes registered memory of an engine to the peers that may write into it.

    Attributes:
      owner: the id of the engine that the memory is of, as in its NetAddr.
      nbytes: its size in bytes.

    Example::

      engine.submit_send(peer, region.desc.to_bytes())
      # at the peer
      desc = jf.MrDesc.from_bytes(engine.receive().data)
    """

    def __init__(self, native: Any) -> None:
        self.native = native
        self.owner: str = native.owner
        self.nbytes: int = native.nbytes

    @classmethod
    def from_bytes(cls, data: bytes) -> MrDesc:
        """Reads what `to_bytes` gave; raises FabricError on anything else."""
        native = _ffi.native()
        try:
            return cls(native.NativeMrDesc.from_bytes(bytes(data)))
        except native.StatusError as error:
            raise from_native(error) from None

    def to_bytes(self) -> bytes:
        """The description as bytes."""
        return bytes(self.native.to_bytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MrDesc) and other.to_bytes() == self.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def __reduce__(self) -> tuple[Any, ...]:
        return MrDesc.from_bytes, (self.to_bytes(),)

    def __repr__(self) -> str:
        return f"MrDesc({self.nbytes} bytes of {self.owner})"
