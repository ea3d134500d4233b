"""NIXL over UCX: shared memory and CMA, or TCP with UCX_TLS=tcp.

At its best as far as we know: transfers are prepared before the clock runs and
posted again and again, the target's progress thread is on (without one it does not
answer), the initiator's is off (with it both fight for the worker).
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from typing import Any

from nixl_cu12._api import nixl_agent, nixl_agent_config

from ..case import Case
from . import OPERATION_TIMEOUT_S, allocate


def open_agent(name: str, memory: Any, *, progress: bool) -> Any:
    """An agent with UCX and all of the memory registered."""
    config = nixl_agent_config(enable_prog_thread=progress, backends=["UCX"])
    agent = nixl_agent(f"{name}-{os.getpid()}", config)
    agent.register_memory([(memory.ctypes.data, len(memory), 0, "")], "DRAM")
    return agent


class Target:
    """An agent whose progress thread answers."""

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None:
        self.memory = allocate(bytes_)
        self._agent = open_agent("target", self.memory, progress=True)

    def card(self) -> dict[str, Any]:
        """See `ends.Target`."""
        metadata = self._agent.get_agent_metadata().hex()
        return {"metadata": metadata, "base": self.memory.ctypes.data}

    def prepare(self, case: Case, peer: int) -> None:
        """See `ends.Target`."""

    def wait(self, operations: int) -> None:
        """See `ends.Target`."""

    def close(self) -> None:
        """See `ends.Target`."""


class Initiator:
    """One prepared transfer for each slot and peer."""

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None:
        self.memory = allocate(bytes_)
        self._agent = open_agent("initiator", self.memory, progress=False)
        self._names: list[Any] = []
        self._bases: list[int] = []
        self._transfers: list[list[Any]] = []

    def connect(self, cards: list[dict[str, Any]]) -> None:
        """See `ends.Initiator`."""
        for card in cards:
            metadata = bytes.fromhex(card["metadata"])
            self._names.append(self._agent.add_remote_agent(metadata))
            self._bases.append(card["base"])

    def prepare(self, case: Case) -> None:
        """See `ends.Initiator`."""
        for transfers in self._transfers:
            for transfer in transfers:
                transfer.release()
        self._transfers = [
            [self._prepare(case, slot, peer) for peer in range(case.targets)]
            for slot in range(case.window)
        ]

    def _prepare(self, case: Case, slot: int, peer: int) -> Any:
        spans = [span for span in case.spans(slot) if span.peer == peer]
        source, target = self.memory.ctypes.data, self._bases[peer]
        return self._agent.initialize_xfer(
            "WRITE",
            self._descriptors([(source + s.source, s.length, 0) for s in spans]),
            self._descriptors([(target + s.target, s.length, 0) for s in spans]),
            self._names[peer],
        )

    def _descriptors(self, pieces: list[tuple[int, int, int]]) -> Any:
        return self._agent.get_xfer_descs(pieces, "DRAM")

    def begin(self, slot: int) -> list[Any]:
        """See `ends.Initiator`."""
        post = self._agent.transfer
        return [(t, post(t)) for t in self._transfers[slot]]

    def finish(self, operation: list[Any]) -> None:
        """See `ends.Initiator`."""
        look = self._agent.check_xfer_state
        end = time.monotonic() + OPERATION_TIMEOUT_S
        for transfer, state in operation:
            while state != "DONE":
                if state == "ERR":
                    raise ConnectionError("NIXL reports ERR for a transfer")
                if time.monotonic() > end:
                    raise TimeoutError(f"not done after {OPERATION_TIMEOUT_S:g} s")
                state = look(transfer)

    def write(self, slot: int) -> None:
        """See `ends.Initiator`."""
        self.finish(self.begin(slot))

    def versions(self) -> dict[str, str]:
        """See `ends.Initiator`."""
        return {"nixl-cu12": importlib.metadata.version("nixl-cu12")}

    def close(self) -> None:
        """See `ends.Initiator`."""
