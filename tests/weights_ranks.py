"""Ranks of a trainer and of a sampler as processes that a test commands, and kills.

Every element of a version tells version, trainer and place, so that a tile proves by
itself that it is whole, and of which version. Processes are forked from one that has
imported everything: a rank is there within 0.1 s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import faulthandler
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import forkserver
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from test_weights_plan import leaf, tree
from transfer_cases import engine
from weights_cases import STRIP_BYTES, Arrays, TileReceiver, TileSender, mesh, tile

import jaxfabric as jf
from jaxfabric.weights import _pack

SOURCE = tree(
    mesh(2),
    leaf("w", (512, 1024), "a", dtype="int32"),
    leaf("all", (3, 64), dtype="int32"),
    leaf("one", (64, 128), "", "a", dtype="int32"),
)
TARGET = tree(
    mesh(2),
    leaf("w", (512, 1024), "", "a", dtype="int32"),
    leaf("all", (3, 64), dtype="int32"),
    leaf("one", (64, 128), dtype="int32"),
)
OPTIONS: dict[str, Any] = {"heartbeat_s": 0.2, "peer_timeout_s": 3.0, "timeout_s": 20.0}
_FACTOR = 101  # so that keys and places do not mix
_LOOK_S = 5e-4
# What takes long; it has to be found without the path of the tests.
_PRELOADED = [
    *("jaxfabric.weights", "jaxfabric._transfer_engine"),
    *("hypothesis.strategies", "pytest", "xxhash"),
]
_GONE_S = 10.0
_STACKS_S = 0.5  # until they are printed


class Phase(enum.IntEnum):
    """What a rank is doing."""

    IDLE = 0
    CONNECT = 1
    BEGIN = 2  # a push that is not let to send yet
    BUCKETS = 3
    TAKE = 4
    FILLING = 5


def threads_of(rank: int) -> int:
    """Both jobs have ranks of either kind."""
    return 1 if rank % 2 else 4


def key_of(version: int, trainer: int) -> int:
    return version * 1000 + trainer


def arrays_of(key: int) -> Arrays:
    return {name: values + np.int32(key * _FACTOR) for name, values in _base().items()}


@functools.cache
def _base() -> Arrays:
    return {
        one.name: np.arange(np.prod(one.shape), dtype=np.int32).reshape(one.shape) * 3
        for one in SOURCE.leaves
    }


def key_in(tiles: Any) -> int | None:
    """The key that all elements have; ``None`` if they do not have the same."""
    found = set()
    for (number, which), values in tiles.items():
        differences = values - tile(TARGET, number, which, _base())
        found |= {int(differences.min()), int(differences.max())}
    (key, left) = divmod(found.pop(), _FACTOR)
    return None if found or left else key


@dataclasses.dataclass(frozen=True)
class Failed:
    """A command ended with a FabricError, of that kind."""

    kind: str
    text: str


def failed(error: jf.FabricError) -> Failed:
    return Failed(type(error).__name__, str(error))


class Followed(NamedTuple):
    """What a rank took: versions with the keys in them; and why it ended early."""

    taken: list[tuple[int, int | None]]
    failure: Failed | None


# --- In the child -------------------------------------------------------------------


class _Child:
    """One rank: does what it is told, one thing after the other."""

    def __init__(self, name: str, transport: str, phase: Any) -> None:
        self._name, self._transport, self._phase = name, transport, phase
        self._stack = contextlib.ExitStack()

    def _engine(self) -> jf.TransferEngine:
        self._stack.close()
        made = engine(self._transport, name=self._name, **OPTIONS)
        return self._stack.enter_context(made)

    def run(self, pipe: Any) -> None:
        while True:
            name, *arguments = pipe.recv()
            try:
                answer = getattr(self, name)(*arguments)
            except jf.FabricError as error:
                answer = error
            self._phase.value = Phase.IDLE
            pipe.send(failed(answer) if isinstance(answer, jf.FabricError) else answer)


class _Trainer(_Child):
    def open(self, rank: int) -> bytes:
        own = self._engine()
        self._sender = self._stack.enter_context(
            TileSender(
                *(own, SOURCE),
                rank=rank,
                bucket_bytes=1 << 18,
                threads=threads_of(rank),
            )
        )
        return self._sender.address()

    def push(
        self, versions: list[int], trainer: int, timeout_s: float
    ) -> list[dict[str, str]]:
        """By version, what became of it at each receiver."""
        pushes = []
        for version in versions:
            arrays = arrays_of(key_of(version, trainer))
            pushes.append(self._sender.push(arrays, version, timeout_s=timeout_s))
        for push in pushes:
            while not push.done():
                written, _ = push.progress()
                self._phase.value = Phase.BUCKETS if written else Phase.BEGIN
                time.sleep(_LOOK_S)
        return [
            {name: type(end).__name__ for name, end in push.outcomes().items()}
            for push in pushes
        ]


class _Sampler(_Child):
    def open(self, rank: int, leader: bytes | None) -> bytes:
        own = self._engine()
        self._receiver = self._stack.enter_context(
            TileReceiver(
                *(own, None),
                layout=TARGET,
                rank=rank,
                leader=leader,
                threads=threads_of(rank),
            )
        )
        return self._receiver.address()

    def address(self) -> bytes:
        return self._receiver.address()

    def connect(self, addresses: list[bytes], timeout_s: float) -> None:
        with self._watched(Phase.CONNECT):
            self._receiver.connect(addresses, timeout_s)

    def follow(self, version: int, timeout_s: float) -> Followed:
        """Takes as often as it can, until it has that version."""
        until = time.monotonic() + timeout_s
        followed = Followed([], None)
        with self._watched(Phase.TAKE):
            least = 0
            while least <= version:
                try:
                    got = self._receiver.take(least, until - time.monotonic())
                except jf.FabricError as error:
                    return Followed(followed.taken, failed(error))
                followed.taken.append((got.version, key_in(got.params)))
                least = got.version + 1
        return followed

    @contextlib.contextmanager
    def _watched(self, otherwise: Phase) -> Any:
        over = threading.Event()
        versions = self._receiver._versions

        def look() -> None:
            while not over.wait(_LOOK_S):
                self._phase.value = Phase.FILLING if versions.filling else otherwise

        self._phase.value = otherwise
        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _main(role: str, name: str, transport: str, pipe: Any, phase: Any) -> None:
    faulthandler.register(signal.SIGUSR1)
    _pack.STRIP_BYTES = STRIP_BYTES
    child = (_Trainer if role == "trainer" else _Sampler)(name, transport, phase)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        child.run(pipe)


# --- In the test --------------------------------------------------------------------


class Dead:
    """The rank was killed before it answered."""


class Rank:
    """A process of one rank.

    Attributes:
      name: of its engine; never used twice.
      address: of its Sender or Receiver, from `open`.
      connects: how often it was told to connect.
      alive: whether it was not killed.
    """

    def __init__(self, role: str, number: int, name: str, transport: str) -> None:
        self.role, self.number, self.name = role, number, name
        self.address = b""
        self.connects = 0
        self.alive = True
        self._asked = ""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        # It has to import the installed package, not what lies in this folder.
        with mock.patch.dict(os.environ, PYTHONSAFEPATH="1"):
            forkserver.ensure_running()
        self._pipe, theirs = context.Pipe()
        self._phase = context.RawValue("i", 0)
        self._process = context.Process(
            target=_main, args=(role, name, transport, theirs, self._phase), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def phase(self) -> Phase:
        return Phase(self._phase.value)

    def wait_for(self, phase: Phase | None, limit_s: float) -> bool:
        """Whether it comes into a phase soon; ``None``: just waits."""
        until = time.monotonic() + limit_s
        while self.phase is not phase and time.monotonic() < until:
            time.sleep(_LOOK_S / 5)
        return self.phase is phase

    def ask(self, command: str, *arguments: Any) -> None:
        self._asked = command
        self.connects += command == "connect"
        with contextlib.suppress(ConnectionError):
            self._pipe.send((command, *arguments))

    def answer(self, limit_s: float) -> Any:
        """What it says to what it was asked last.

        Raises:
          AssertionError: nothing within the limit; its stacks go to stderr.
        """
        if not self._pipe.poll(limit_s):
            if self.alive:
                print(f"{self.name} hangs in {self._asked}", file=sys.stderr)
                self._show_stacks()
            raise AssertionError(
                f"{self.name} has not ended {self._asked} after {limit_s} s, in "
                f"{self.phase!r}"
            )
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            assert not self.alive, f"{self.name} died by itself in {self._asked}"
            return Dead()

    def _show_stacks(self) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGUSR1)
        time.sleep(_STACKS_S)

    def call(self, limit_s: float, command: str, *arguments: Any) -> Any:
        self.ask(command, *arguments)
        return self.answer(limit_s)

    def kill(self) -> None:
        self.alive = False
        self._process.kill()

    def close(self) -> None:
        self.kill()
        self._process.join(_GONE_S)
        self._pipe.close()
