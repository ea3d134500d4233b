"""How the processes of a Fabric find each other: an all-gather of bytes.

JAX's own key-value store is private API, so this is the only place that touches it;
where it is missing, public `multihost_utils` collectives take over.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxfabric._errors import DeadlineError, FabricError


class Rendezvous:
    """All-gathers among ``processes``, of which this one is ``process``.

    Every process calls the same methods in the same order.
    """

    def __init__(self, name: str, processes: Sequence[int], timeout_s: float) -> None:
        self._name = name
        self._processes = tuple(processes)
        self._process = jax.process_index()
        self.timeout_s = timeout_s
        self._round = 0
        self._client = _key_value_client() if len(self._processes) > 1 else None

    def all_gather(self, payload: bytes) -> list[bytes]:
        """The payload of each process, in the order of ``processes``.

        Raises:
          DeadlineError: a process did not come within ``timeout_s``; names it.
        """
        self._round += 1
        if len(self._processes) == 1:
            return [payload]
        if self._client is None:
            return self._all_gather_public(payload)
        prefix = f"{self._name}/{self._round}"
        self._set(f"{prefix}/{self._process}", payload)
        deadline = time.monotonic() + self.timeout_s
        return [self._get(f"{prefix}/{p}", p, deadline) for p in self._processes]

    def _set(self, key: str, payload: bytes) -> None:
        assert self._client is not None
        try:
            self._client.key_value_set_bytes(key, payload)
        except Exception as error:
            raise FabricError(
                f"process {self._process} could not publish {key!r} in JAX's "
                f"key-value store: {error}"
            ) from error

    def _get(self, key: str, process: int, deadline: float) -> bytes:
        assert self._client is not None
        left_ms = max(1, int((deadline - time.monotonic()) * 1000))
        try:
            return bytes(self._client.blocking_key_value_get_bytes(key, left_ms))
        except Exception as error:
            raise DeadlineError(
                f"rendezvous of {self._name}: process {process} did not come within "
                f"{self.timeout_s:g} s; every process must open the same Fabrics in "
                "the same order (raise timeout_s= if it is only slow to start)"
            ) from error

    def _all_gather_public(self, payload: bytes) -> list[bytes]:
        from jax.experimental import multihost_utils

        if len(self._processes) != jax.process_count():
            raise FabricError(
                "this jax has no key-value store that jaxfabric knows, and without it "
                "a Fabric must span all processes; use a mesh over all devices"
            )
        sizes = multihost_utils.process_allgather(np.int64(len(payload)))
        padded = np.zeros(int(np.max(sizes)), np.uint8)
        padded[: len(payload)] = np.frombuffer(payload, np.uint8)
        rows = np.asarray(multihost_utils.process_allgather(padded))
        by_process = [
            row[: int(n)].tobytes() for row, n in zip(rows, sizes, strict=True)
        ]
        return [by_process[process] for process in self._processes]

    def forget(self) -> None:
        """Deletes this process's keys; best effort.

        That of the last round stays: a slower process may not have read it yet.
        """
        if self._client is None:
            return
        for done in range(1, self._round):
            with contextlib.suppress(Exception):
                self._client.key_value_delete(f"{self._name}/{done}/{self._process}")


def coordinator_address() -> str | None:
    """``host:port`` of JAX's coordinator; ``None`` where JAX does not say."""
    return getattr(_distributed_state(), "coordinator_address", None)


def _distributed_state() -> Any:
    try:
        from jax._src import distributed
    except ImportError:
        return None
    return getattr(distributed, "global_state", None)


def _key_value_client() -> Any:
    client = getattr(_distributed_state(), "client", None)
    return client if hasattr(client, "blocking_key_value_get_bytes") else None
