"""What the ranks of a job say to each other, and what all jobs have in common.

The first rank leads: it talks to the router and decides; the others do what they are
told, in the same order, so that all run the same programs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import multiprocessing.connection
import pathlib
import queue
import secrets
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from sizes import SIZES, Sizes

import jaxfabric as jf
from jaxfabric.kv.serve import JobLink

_KEY_BYTES = 16
PAGES_OVER = 2  # prompts whose pages may drain while as many as fit are under way


def parse_arguments(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--router", default="http://127.0.0.1:8000", help="where the router listens")
    add("--token-file", type=pathlib.Path, required=True, help="secret of all jobs")
    add("--name", required=True, help="of this job")
    add("--weights", type=pathlib.Path, required=True, help="made by weights.py")
    add("--sizes", choices=SIZES, default="small", help="of the model")
    add("--transport", help="of the pages: shm, ofi/tcp, ofi/efa, verbs")
    add("--nics", help="names or IP addresses, with commas between")
    add("--capacity", type=int, default=4, help="requests that are taken at a time")
    add("--timeout-s", type=float, default=30.0, help="for an operation of jaxfabric")
    add("--peer-timeout-s", type=float, default=5.0, help="after which a peer is lost")
    add(
        "--heartbeat-s", type=float, default=5.0, help="between questions to the router"
    )
    add("--warm", default="", help="prompt lengths to compile for, with commas between")
    add("--trace", type=pathlib.Path, help="folder for the timeline of traced requests")
    options = parser.parse_args()
    options.warm = [int(length) for length in options.warm.split(",") if length]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return options


def open_engine(options: argparse.Namespace) -> jf.TransferEngine:
    """An engine for the pages of this rank."""
    return jf.TransferEngine(
        options.transport,
        job="disaggregated",
        token=options.token_file.read_text().strip(),
        name=f"{options.name}.{jax.process_index()}",
        timeout_s=options.timeout_s,
        nics=options.nics.split(",") if options.nics else None,
        heartbeat_s=min(1.0, options.peer_timeout_s / 4),
        peer_timeout_s=options.peer_timeout_s,
    )


class Ranks:
    """Messages between the leader and the others, JSON over local connections.

    Attributes:
      inbox: at the leader, what the ranks report and what the router says:
        (kind, fields).
      leads: whether this is the leader.
    """

    def __init__(self) -> None:
        self.rank, self.count = jax.process_index(), jax.process_count()
        self.leads = self.rank == 0
        self.inbox: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._others: list[multiprocessing.connection.Connection] = []
        self._reporting = threading.Lock()
        if self.count > 1:
            self._connect()

    def _connect(self) -> None:
        listener = None
        where = np.zeros(2 + _KEY_BYTES, np.uint8)
        if self.leads:
            key = secrets.token_bytes(_KEY_BYTES)
            listener = multiprocessing.connection.Listener(
                ("127.0.0.1", 0), authkey=key, backlog=self.count
            )
            port = listener.address[1]  # type: ignore[misc]
            where[:] = list(int(port).to_bytes(2, "big") + key)
        told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(where), np.uint8))
        if listener is None:
            address = ("127.0.0.1", int.from_bytes(told[:2], "big"))
            self._others = [
                multiprocessing.connection.Client(address, authkey=told[2:])
            ]
            return
        self._others = [listener.accept() for _ in range(self.count - 1)]
        listener.close()
        for other in self._others:
            threading.Thread(target=self._hear, args=(other,), daemon=True).start()

    def _hear(self, other: multiprocessing.connection.Connection) -> None:
        try:
            while True:
                kind, fields = json.loads(other.recv_bytes())
                self.inbox.put((kind, fields))
        except (EOFError, OSError):
            self.inbox.put(("rank_lost", {}))

    def tell(self, kind: str, **fields: Any) -> None:
        """From the leader to all others."""
        for other in self._others:
            other.send_bytes(json.dumps([kind, fields]).encode())

    def told(self) -> tuple[str, dict[str, Any]]:
        """What the leader says next; waits for it."""
        kind, fields = json.loads(self._others[0].recv_bytes())
        return kind, fields

    def report(self, kind: str, **fields: Any) -> None:
        """From any rank to the leader, from any thread."""
        fields["rank"] = self.rank
        if self.leads:
            self.inbox.put((kind, fields))
        else:
            with self._reporting:
                self._others[0].send_bytes(json.dumps([kind, fields]).encode())


@contextlib.contextmanager
def linked(
    options: argparse.Namespace, ranks: Ranks, role: str, addresses: list[bytes]
) -> Iterator[JobLink]:
    """The leader's connection to the router; what that says goes to the inbox."""
    link = JobLink(
        options.router,
        token=options.token_file.read_text().strip(),
        role=role,
        name=options.name,
        capacity=options.capacity,
        addresses=addresses,
        on_message=lambda kind, fields: ranks.inbox.put((kind, fields)),
        on_lost=lambda: ranks.inbox.put(("router_lost", {})),
        heartbeat_s=options.heartbeat_s,
    )

    def run() -> None:
        try:
            asyncio.run(link.run())
        except jf.FabricError as error:
            logging.getLogger("jaxfabric").error("%s", error)
        finally:
            ranks.inbox.put(("link_ended", {}))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield link
    finally:
        link.close()
        thread.join(5.0)


def padded(config: Sizes, tokens: int, ranks: int) -> int:
    """Tokens of the program that takes so many: a power of two, or all there is."""
    size = 64
    while size < tokens:
        size *= 2
    size = min(size, config.length)
    if tokens > size or size % (16 * ranks):
        raise ValueError(f"{tokens} tokens: the model takes up to {config.length}")
    return size
