"""Pairs of TransferEngines, for the tests of jf.TransferEngine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

import jaxfabric as jf
from jaxfabric import _ffi

POISON = 0xA5
CHAOS = {"seed": 3, "pieces_max": 4, "delay_max_s": 2e-4, "again_share": 0.2}
PATIENCE_S = 30.0


class Pair(NamedTuple):
    """An engine that writes, one that is written into, and its poisoned region."""

    a: jf.TransferEngine
    b: jf.TransferEngine
    peer: int  # b, as a calls it
    region: jf.Region  # of b, u8[1 << 16]


def skip_unless_usable(transport: str) -> None:
    for name, state, reason, _ in _ffi.transport_states():
        if name == transport and state != "usable":
            pytest.skip(f"{transport}: {reason}")


def engine(transport: str = "shm", **kwargs: Any) -> jf.TransferEngine:
    skip_unless_usable(transport)
    if transport == "fake":
        kwargs.setdefault("chaos", CHAOS)
    kwargs.setdefault("timeout_s", PATIENCE_S)
    return jf.TransferEngine(transport, job="test", token="secret", **kwargs)


TRANSPORTS = ("shm", "fake", "ofi/tcp")


def open_pair(transport: str) -> Iterator[Pair]:
    """Two engines, the first connected to the second."""
    with engine(transport) as a, engine(transport) as b:
        region = b.alloc(1 << 16)
        region.array[:] = POISON
        yield Pair(a, b, a.connect(b.address()).result(), region)


def until(met: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < deadline, "nothing more happens"
        time.sleep(1e-3)
