"""What the parts of TransferEngine share: the native engine, its regions and errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxfabric import _ffi
from jaxfabric._errors import from_native
from jaxfabric._transfer_future import TransferFuture
from jaxfabric._transfer_memory import Region


@contextlib.contextmanager
def native_errors() -> Iterator[None]:
    """Turns native errors into the documented ones."""
    try:
        yield
    except _ffi.native().StatusError as error:
        raise from_native(error) from None


class TransferBase:
    """A native engine and its regions; see TransferEngine."""

    _native: Any
    _close: Any
    _regions: dict[int, Region]
    timeout_s: float

    def close(self) -> None:
        """Closes it; may be called again. What is under way fails with "closed"."""
        # Registered arrays stay as long as this object: a thread that waits in a call
        # of it keeps the engine, and so the NICs, until that call is back.
        self._close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._close.alive

    def _future(
        self, native: Any, value: Callable[[Any], Any] | None = None
    ) -> TransferFuture:
        return TransferFuture(native, self._cancel, value)

    def _cancel(self, native: Any) -> bool:
        if self.closed:
            return False
        with native_errors():
            return bool(self._native.cancel(native))
