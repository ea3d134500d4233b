"""Programs: layers that jitted programs copy into a sender's pool are sent."""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections import deque
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from jaxfabric import _ffi
from jaxfabric._errors import FabricError
from jaxfabric._transfer_engine import TransferEngine
from jaxfabric._transfer_memory import address_of
from jaxfabric.kv._layout import PageLayout

_log = logging.getLogger("jaxfabric")
_open: weakref.WeakValueDictionary[int, Programs] = weakref.WeakValueDictionary()


class Sender(Protocol):
    """What programs need of a PageSender."""

    engine: TransferEngine
    layout: PageLayout
    pool: npt.NDArray[Any]

    def send(
        self, request_id: int, layer: int, tokens: tuple[int, int] | None = None
    ) -> None:
        """See `PageSender.send`."""

    def _fail_request(self, request_id: int, error: FabricError) -> bool: ...


class Programs:
    """What `send_layer` needs of one PageSender.

    A program's handler copies pages without Python, notes what it has copied, and
    bumps a watcher; its callback takes the notes, and sends.

    Attributes:
      id: names it in this process, for programs; never used twice.
    """

    def __init__(self, sender: Sender) -> None:
        layout = sender.layout
        if layout.order[:2] != ("layers", "pages"):
            raise ValueError(
                f"jf.kv.send_layer: order={layout.order}: a layer's page must lie in "
                "one piece, so the order begins with 'layers', 'pages'"
            )
        self._sender = sender
        # Callbacks of outcomes may come back here from within `send_noted`.
        self._lock = threading.RLock()
        self._noted: deque[tuple[int, int]] = deque()
        self._watcher = sender.engine.alloc_watcher(lambda _, __: self.send_noted())
        self._native = _ffi.native().NativePagePool(
            address=address_of(sender.pool),
            memory=sender.pool,
            layers=layout.layers,
            pages=layout.pages,
            page_bytes=math.prod(layout.shape[2:]) * layout.numpy_dtype.itemsize,
            watcher=self._watcher._native,
        )
        self.id: int = self._native.id
        _open[self.id] = self

    def send_noted(self) -> None:
        """Sends what programs have copied so far; returns once all of it is sent."""
        with self._lock:
            self._noted.extend(self._native.take())
            while self._noted:
                self._send(*self._noted.popleft())

    def put(
        self,
        request_id: int,
        layer: int,
        rows: npt.NDArray[Any],
        pages: npt.NDArray[np.int32],
    ) -> None:
        """Copies rows to their pages and sends the layer; negative pages are padding.

        Raises:
          ValueError: a page is out of range.
        """
        used = pages >= 0
        if (pages >= self._sender.layout.pages).any():
            raise ValueError(
                f"send_layer: pages {pages[used].tolist()[:8]}: the pool has "
                f"{self._sender.layout.pages}"
            )
        with self._lock:
            self._sender.pool[layer, pages[used]] = rows[used]
        self._send(request_id, layer)

    def _send(self, request_id: int, layer: int) -> None:
        try:
            self._sender.send(request_id, layer)
        except FabricError as error:
            if not self._sender._fail_request(request_id, error):
                _log.warning("jf.kv.send_layer: %s", error)

    def close(self) -> None:
        """Programs that still send fail from now on."""
        _open.pop(self.id, None)
        self._watcher.close()
        self._native.close()


def find_programs(number: int) -> Programs:
    """Those whose `Programs.id` it is.

    Raises:
      ValueError: their PageSender was closed.
    """
    found = _open.get(number)
    if found is None:
        raise ValueError(
            f"send_layer: there is no pool {number} (any more); it ends with its "
            "PageSender"
        )
    return found
