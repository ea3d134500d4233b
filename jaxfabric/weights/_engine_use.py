"""Who uses a TransferEngine: one Sender or Receiver at a time, with ids of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from jaxfabric._errors import FabricError
from jaxfabric._transfer_engine import TransferEngine

IDS_BEGIN = 1 << 26  # ids of other uses are below


@dataclasses.dataclass
class _Use:
    owner: weakref.ref[Any] | None = None
    next_id: int = 0


_lock = threading.Lock()
_uses: weakref.WeakKeyDictionary[TransferEngine, _Use] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def claimed_by(engine: TransferEngine, owner: object) -> Iterator[None]:
    """Makes an engine that of a Sender or Receiver, unless the block fails.

    Until `release`, or until the owner is gone.

    Raises:
      FabricError: the engine is closed, or another's: each takes all its messages.
    """
    kind = type(owner).__name__
    if engine.closed:
        raise FabricError(f"jf.weights.{kind}: its TransferEngine is closed")
    with _lock:
        use = _uses.setdefault(engine, _Use())
        other = None if use.owner is None else use.owner()
        if other is not None:
            raise FabricError(
                f"jf.weights.{kind}: its TransferEngine is that of a "
                f"{type(other).__name__}, which takes all messages: close() that, or "
                "open an engine for each"
            )
        use.owner = weakref.ref(owner)
    try:
        yield
    except BaseException:
        release(engine)
        raise


def release(engine: TransferEngine) -> None:
    """The engine may have another owner."""
    with _lock:
        _uses.setdefault(engine, _Use()).owner = None


def take_ids(engine: TransferEngine, count: int) -> int:
    """The first of so many ids in a row that nobody had.

    Raises:
      FabricError: all are used up.
    """
    with _lock:
        use = _uses.setdefault(engine, _Use())
        first, use.next_id = use.next_id, use.next_id + count
    if first + count > IDS_BEGIN:
        raise FabricError("jf.weights: the engine's ids are used up: open another")
    return first
