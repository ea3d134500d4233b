"""`jaxfabric bench weights`: a push of parameters, its phases, floors and rivals."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import machine

# What `--subjects` chooses from, after the floors.
SUBJECTS = ("push", "gather and broadcast", "jax.experimental.transfer")
_START_S = 120.0
_REQUEST_S = 180.0
_LAST_WORDS = 400  # characters of a dead rank's output that are shown
_UUIDS = 1 << 10  # of a round of pulls
_UNTIMED = 2  # rounds: a receiver's two sets of tiles are touched for the first time


class RankFailed(RuntimeError):
    """A rank died, says nothing, or says why it cannot."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      nbytes: of all parameters, about.
      sources, targets: processes of the trainer and of the sampler.
      transports: of jf.TransferEngine.
      rounds: that are timed, after two that are not, of which one is checked.
      threads: of each Sender and Receiver; ``None`` is their default.
      quantise: to e4m3 in blocks on the way, which only a push does.

    Raises:
      ValueError: there is no such subject, or a number of ranks is no power of two.
    """

    nbytes: int = 1 << 30
    sources: int = 4
    targets: int = 2
    transports: tuple[str, ...] = ("shm",)
    subjects: tuple[str, ...] = SUBJECTS
    rounds: int = 5
    threads: int | None = None
    quantise: bool = False

    def __post_init__(self) -> None:
        for name in self.subjects:
            if name not in SUBJECTS:
                raise ValueError(f"{name!r} is none of {'; '.join(SUBJECTS)}")
        if self.quantise and tuple(self.subjects) != SUBJECTS[:1]:
            raise ValueError("only a push quantises: --subjects push")
        for count in (self.sources, self.targets):
            if count & (count - 1):
                raise ValueError(f"{count} ranks: give a power of two")


def parse_bytes(text: str) -> int:
    """Bytes of "1GiB", "64 MiB" or "1048576"; raises ValueError.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    number, factor = text.strip(), 1
    for unit, power in (("KiB", 10), ("MiB", 20), ("GiB", 30)):
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), 1 << power
    size = int(float(number) * factor)
    if not 1 << 20 <= size <= 1 << 40:
        raise ValueError(f"{text.strip()!r} is no size from 1MiB to 1TiB")
    return size


class Ranks:
    """The processes of both jobs; all are gone when its block ends."""

    def __init__(self, settings: Settings, transport: str) -> None:
        self.trainer = [_Rank("trainer", i) for i in range(settings.sources)]
        self.sampler = [_Rank("sampler", i) for i in range(settings.targets)]
        for rank in self.all:
            rank.start(settings, transport)

    @property
    def all(self) -> list[_Rank]:
        """The trainer's first."""
        return [*self.trainer, *self.sampler]

    def ask(
        self, ranks: Sequence[_Rank], do: str, **arguments: Any
    ) -> list[dict[str, Any]]:
        """The same request to several ranks at once."""
        for rank in ranks:
            rank.send({"do": do, **arguments})
        return [rank.answer(do, _REQUEST_S) for rank in ranks]

    def together(
        self, ours: dict[str, Any], theirs: dict[str, Any]
    ) -> tuple[float, list[dict[str, Any]], list[dict[str, Any]]]:
        """A request to either job; seconds until all is done, and the answers."""
        begin = time.monotonic()
        for rank in self.sampler:
            rank.send(theirs)
        for rank in self.trainer:
            rank.send(ours)
        said = [rank.answer(ours["do"], _REQUEST_S) for rank in self.trainer]
        heard = [rank.answer(theirs["do"], _REQUEST_S) for rank in self.sampler]
        return time.monotonic() - begin, said, heard

    def check(self, subject: str) -> None:
        """Raises RankFailed unless every bit that came last is right."""
        wrong = [w for found in self.ask(self.sampler, "check") for w in found["wrong"]]
        if wrong:
            raise RankFailed(f"{subject}: {len(wrong)} tiles are wrong: {wrong[:4]}")

    def end(self) -> None:
        """Ends all of them."""
        for rank in self.all:
            rank.end()


class _Rank:
    """One process, and the pipes to it."""

    def __init__(self, role: str, number: int) -> None:
        self.role, self.number = role, number
        self.name = f"{role} {number}"
        self.addresses: dict[str, str] = {}
        self._unread = b""
        self._output = tempfile.TemporaryFile()

    def start(self, settings: Settings, transport: str) -> None:
        read, write = os.pipe()
        options = {
            "role": self.role,
            "rank": self.number,
            "nbytes": settings.nbytes,
            "counts": [settings.sources, settings.targets],
            "transport": transport,
            "threads": settings.threads,
            "quantise": settings.quantise,
            "answers": write,
        }
        module = "jaxfabric._bench.weights_rank"
        self._process = subprocess.Popen(
            # What shall be measured is host memory.
            [
                *("env", "JAX_PLATFORMS=cpu", sys.executable, "-P"),
                *("-m", module, json.dumps(options)),
            ],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=self._output,
            pass_fds=[write],
        )
        os.close(write)
        self._answers = read

    def send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says so
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, do: str, timeout_s: float) -> dict[str, Any]:
        until = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise RankFailed(f"{self.name}: no answer to {do} in {timeout_s:g} s")
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise RankFailed(f"{self.name}: died during {do}{self._last_words()}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        found = json.loads(line)
        if "error" in found:
            raise RankFailed(f"{self.name}: {do}: {found['error']}")
        return dict(found["ok"])

    def _last_words(self) -> str:
        self._output.seek(0)
        words = " ".join(self._output.read().decode(errors="replace").split())
        return f": ...{words[-_LAST_WORDS:]}" if words else ""

    def end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        os.close(self._answers)
        self._output.close()


def _connect(ranks: Ranks, settings: Settings) -> list[dict[str, Any]]:
    """Connects all subjects; the peaks of memory of a push, before others need any."""
    for rank in ranks.all:
        rank.addresses = rank.answer("start", _START_S)
    raw = {rank.name: rank.addresses["raw"] for rank in ranks.all}
    targets = [raw[rank.name] for rank in ranks.sampler]
    senders = [rank.addresses["sender"] for rank in ranks.trainer]
    peers = [raw[rank.name] for rank in ranks.trainer]
    peaks: list[dict[str, Any]] = []
    if "push" in settings.subjects:
        leader = ranks.sampler[0].addresses["leader"]
        for rank in ranks.sampler:
            ranks.ask([rank], "connect", senders=senders, leader=leader)
        peaks = _peaks(ranks)
    rings = ranks.ask(ranks.sampler, "wire_ready", addresses=peers)
    memories = [ring["memory"] for ring in rings]
    ranks.ask(ranks.trainer, "wire_connect", peers=targets, memories=memories)
    if "gather and broadcast" in settings.subjects:
        whole = ranks.ask(ranks.all, "gather.ready")
        first, others = ranks.trainer[0], ranks.trainer[1:]
        count = settings.sources
        memories = [found["memory"] for found in whole[count:]]
        ranks.ask([first], "gather.connect", peers=targets, memories=memories)
        ranks.ask(
            *(others, "gather.connect"),
            peers=[first.addresses["raw"]],
            memories=[whole[0]["memory"]],
        )
    return peaks


def _peaks(ranks: Ranks) -> list[dict[str, Any]]:
    """The first version: how far each rank's memory grew, and what bounds that."""
    _, said, heard = ranks.together(
        {"do": "push", "version": 1}, {"do": "take", "version": 1}
    )
    grew = [found["grew"] for found in ranks.ask(ranks.all, "peak")]
    bounds = [
        {"own": stats["memory"]["bytes"], "rings": stats["memory"]["ring_bytes"]}
        for stats in said
    ] + [{"own": found["bytes"], "taken": found["taken_bytes"]} for found in heard]
    return [
        {"rank": rank.name, "grew": much, **bound}
        for rank, much, bound in zip(ranks.all, grew, bounds, strict=True)
    ]


def _floors(ranks: Ranks) -> dict[str, float]:
    """The machine now: bytes/s of all ranks together, seconds of the bare writes.

    Of the writes until all have come, and as a push counts its transfer phase. With
    ``_core``: for each second of a core, and in seconds of cores.
    """
    memory = ranks.ask(ranks.all, "memory")
    kinds = [name for name in memory[0] if f"{name}_core" in memory[0]]
    wire_s, said, heard = ranks.together({"do": "wire"}, {"do": "wire"})
    transfer_s = max(answer["transfer_s"] for answer in said)
    return {
        **{kind: sum(found[kind] for found in memory) for kind in kinds},
        **{
            f"{kind}_core": statistics.mean(found[f"{kind}_core"] for found in memory)
            for kind in kinds
        },
        "wire_s": wire_s,
        "wire_transfer_s": transfer_s,
        "wire_core_s": _cores(said, heard),
    }


def _cores(*answers: list[dict[str, Any]]) -> float:
    """Seconds that the cores worked in all ranks to answer."""
    return sum(answer["process_s"] for group in answers for answer in group)


def _push(ranks: Ranks, number: int) -> dict[str, Any]:
    """One version: the whole time, and the longest of each phase over the ranks.

    ``core`` has seconds of cores, all ranks together; ``transfer`` is there what no
    other phase has: writes, messages, waking up.
    """
    request = {"version": number + 1}  # after that of `_peaks`
    seconds, said, heard = ranks.together(
        {"do": "push", **request}, {"do": "take", **request}
    )
    found: dict[str, Any] = {"seconds": seconds, "core_s": _cores(said, heard)}
    for phase in ("wait", "pack", "seal", "transfer", "span", "total"):
        found[f"{phase}_s"] = max(stats[f"{phase}_s"] for stats in said)
    receipts = [receipt for stats in said for receipt in stats["receipts"]]
    for phase in ("verify", "unpack"):
        found[f"{phase}_s"] = max(receipt[f"{phase}_s"] for receipt in receipts)
    found["take_s"] = seconds - found["total_s"]
    found["writes"] = sum(stats["writes"] for stats in said)
    core: collections.Counter[str] = collections.Counter()
    for answer in (*said, *heard):
        core.update(answer["core_s"])
    write = core.pop("write")
    rest = found["core_s"] - sum(core.values())
    found["core"] = dict(core) | {"transfer": rest, "of it write": write}
    return found


def _gather(ranks: Ranks, number: int) -> dict[str, Any]:
    del number
    took, *answers = ranks.together({"do": "gather.send"}, {"do": "gather.take"})
    return {"seconds": took, "core_s": _cores(*answers)}


def _pull(ranks: Ranks, number: int) -> dict[str, Any]:
    if number == 1:
        servers = [rank.addresses["pull"] for rank in ranks.trainer]
        ranks.ask(ranks.sampler, "pull.connect", addresses=servers)
    uuid = {"uuid": number * _UUIDS}
    ours, theirs = {"do": "pull.send", **uuid}, {"do": "pull.take", **uuid}
    took, *answers = ranks.together(ours, theirs)
    return {"seconds": took, "core_s": _cores(*answers)}


_MEASURES: dict[str, Callable[[Ranks, int], dict[str, Any]]] = dict(
    zip(SUBJECTS, (_push, _gather, _pull), strict=True)
)


@contextlib.contextmanager
def _started(
    settings: Settings, transport: str
) -> Iterator[tuple[Ranks, list[dict[str, Any]]]]:
    ranks = Ranks(settings, transport)
    try:
        yield ranks, _connect(ranks, settings)
    finally:
        ranks.end()


def _measure(
    settings: Settings, transport: str, say: Callable[[str], None]
) -> dict[str, Any]:
    found: dict[str, Any] = {"transport": transport, "floors": [], "failed": {}}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in settings.subjects}
    with _started(settings, transport) as (ranks, found["peaks"]):
        for number in range(1, settings.rounds + _UNTIMED + 1):
            first = number == 1  # is checked
            timed = number > _UNTIMED
            which = f"{number - _UNTIMED} of {settings.rounds}" if timed else "untimed"
            say(f"{transport}: round {which}")
            floors = _floors(ranks)
            if timed:
                found["floors"].append(floors)
            for name in settings.subjects:
                if name in found["failed"]:
                    continue
                try:
                    outcome = _MEASURES[name](ranks, number)
                    if first:
                        ranks.check(name)
                    if timed:
                        rounds[name].append(outcome)
                except RankFailed as error:
                    if name == "push":
                        raise
                    found["failed"][name] = str(error)
    return found | {"rounds": rounds}


def run(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures each transport; what was found, as JSON has it.

    Raises:
      RankFailed: a rank could not be started, or the push itself fails.
    """
    from . import weights_model

    before, line = machine.describe(), machine.line()
    source, target = weights_model.layouts(
        *(settings.nbytes, settings.sources, settings.targets),
        quantise=settings.quantise,
    )
    results = [_measure(settings, each, say) for each in settings.transports]
    return {
        "benchmark": "weights",
        "machine": before | {"load_after": machine.describe()["load"]},
        "machine_line": line,
        "settings": dataclasses.asdict(settings),
        "nbytes": source.nbytes,
        "target_nbytes": target.nbytes,
        "leaves": len(source.leaves),
        "results": results,
    }
