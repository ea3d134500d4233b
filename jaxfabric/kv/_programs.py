"""Programs: layers that jitted programs copy into a sender's pool are sent."""

from __future__ import annotations

import logging
import math
import threading
from typing import TYPE_CHECKING

from jaxfabric import _ffi
from jaxfabric._errors import FabricError
from jaxfabric._transfer_memory import address_of

if TYPE_CHECKING:
    from jaxfabric.kv._sender import PageSender

_log = logging.getLogger("jaxfabric")


class Programs:
    """What `send_layer` needs of one PageSender.

    A program's handler copies pages without Python, notes what it has copied, and
    bumps a watcher; its callback takes the notes, and sends.

    Attributes:
      id: names it in this process, for programs; never used twice.
    """

    def __init__(self, sender: PageSender) -> None:
        layout = sender.layout
        if layout.order[:2] != ("layers", "pages"):
            raise ValueError(
                f"jf.kv.send_layer: order={layout.order}: a layer's page must lie in "
                "one piece, so the order begins with 'layers', 'pages'"
            )
        self._sender = sender
        self._lock = threading.Lock()
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

    def send_noted(self) -> None:
        """Sends what programs have copied so far; returns once all of it is sent."""
        with self._lock:
            for request_id, layer in self._native.take():
                try:
                    self._sender.send(request_id, layer)
                except FabricError as error:
                    if not self._sender._fail_request(request_id, error):
                        _log.warning("jf.kv.send_layer: %s", error)

    def close(self) -> None:
        """Programs that still send fail from now on."""
        self._watcher.close()
        self._native.close()
