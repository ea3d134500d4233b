"""Two `link_peer` processes: the ends of a TransferEngine under test."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path("tests/network/link_peer")  # in the build folder
OPEN_TIMEOUT_S = 30.0
# What an answer may take beyond the time that its command was given.
GRACE_S = 10.0
ROUNDS = 5  # of a comparison of rates
# Where allowed, before all else that runs here: links and NICs of software need cores
# to be as fast as their pace, as real ones do not.
AHEAD = ("nice", "--adjustment=-20") if os.geteuid() == 0 else ()


@dataclass(frozen=True)
class Answer:
    """What a link_peer says to a command."""

    seconds: float
    error: str | None
    written: int = 0  # of `write`: how many transfers ended well
    count: int = 0  # of `count`
    nic_bytes: Sequence[int] = ()  # of `stats`

    def check(self) -> Answer:
        """Fails unless the command succeeded."""
        assert self.error is None, self.error
        return self


class LinkPeer:
    """One process; commands return at once, `answer` waits for the next answer."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [*AHEAD, *command],
            env=os.environ | dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            introduction = self._next(OPEN_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.address: str = introduction["address"]
        self.region: str = introduction["region"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self.process.stdout.close()
        self._lines.put(None)

    def _next(self, timeout_s: float) -> Any:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"no answer within {timeout_s:g} s") from None
        assert line is not None, f"ended with exit code {self.process.wait(GRACE_S)}"
        return json.loads(line)

    def tell(self, command: str) -> None:
        """Gives a command, and does not wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self, timeout_s: float = 0.0) -> Answer:
        """The answer to the oldest command that has none yet."""
        return Answer(**self._next(timeout_s + GRACE_S))

    def ask(self, command: str, timeout_s: float = 0.0) -> Answer:
        """Gives a command and waits for its answer."""
        self.tell(command)
        return self.answer(timeout_s)

    def close(self) -> None:
        """Lets the process end, or ends it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(GRACE_S)
        finally:
            self.process.kill()
            self.process.wait(GRACE_S)
            self._reader.join(GRACE_S)


@dataclass(frozen=True)
class LinkPair:
    """A writer that is connected with a receiver."""

    writer: LinkPeer
    receiver: LinkPeer
    bytes: int

    def transfer(self, id: int, count: int = 1, timeout_s: float = 30.0) -> float:
        """Writes the region `count` times and checks it; returns bytes/s."""
        self.writer.ask(f"fill {id}").check()
        self.begin(id, count, timeout_s)
        return self.finish(id, count, timeout_s)

    def begin(self, id: int, count: int = 1, timeout_s: float = 30.0) -> None:
        """Starts what `transfer` does; the region is as it was filled."""
        self.receiver.tell(f"expect {id} {count} {timeout_s}")
        self.writer.tell(f"write {id} {count} {timeout_s}")

    def finish(self, id: int, count: int = 1, timeout_s: float = 30.0) -> float:
        """Waits for what `begin` started; returns bytes/s."""
        written = self.writer.answer(timeout_s).check()
        self.receiver.answer(timeout_s).check()
        self.receiver.ask(f"check {id}").check()
        return self.bytes * count / written.seconds


@contextlib.contextmanager
def link_pair(
    commands: tuple[Sequence[str], Sequence[str]],
    bytes: int,
    environments: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> Iterator[LinkPair]:
    """Starts writer and receiver and connects them."""
    with contextlib.ExitStack() as stack:
        peers = []
        for command, environment in zip(commands, environments, strict=True):
            peers.append(LinkPeer(command, environment))
            stack.callback(peers[-1].close)
        writer, receiver = peers
        writer.ask(f"connect {receiver.address} {receiver.region} 20", 20).check()
        yield LinkPair(writer, receiver, bytes)


def rates_in_turns(measures: Sequence[Callable[[int], float]]) -> list[list[float]]:
    """Rates that are compared, measured in turns: what disturbs one disturbs all.

    Args:
        measures: each measures a rate, in bytes/s, under the id that it is given.

    Returns:
        The rates of each, by round.
    """
    turns = [[measure(id) for measure in measures] for id in range(1, ROUNDS + 1)]
    rates = [list(of_one) for of_one in zip(*turns, strict=True)]
    for of_one in rates:
        print("MB/s:", *(f"{rate / 1e6:.1f}" for rate in of_one))
    return rates


def median_ratio(rates: Sequence[float], base: Sequence[float]) -> float:
    """The median of the rounds' ratios of `rates` to `base`."""
    ratios = [rate / other for rate, other in zip(rates, base, strict=True)]
    print("ratios:", *(f"{ratio:.3f}" for ratio in ratios))
    return statistics.median(ratios)
