"""A decode job: takes prompts' caches, and makes tokens for many prompts at a time.

    jaxfabric run -n 2 examples/disaggregated/decode_job.py --name decode0 \\
        --router http://127.0.0.1:8000 --token-file token --weights weights.npz

Each rank has a PageReceiver of its own, with its part of the heads. The leader decides
before each step which prompts come in (those whose pages have come to all ranks) and
which leave, and all ranks do the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import time
from typing import Any

import jax
import job_ranks
import numpy as np
import served_model
from jax.sharding import NamedSharding
from sizes import SIZES

import jaxfabric as jf

_STATE_S = 1.0


class Worker:
    """What each rank does, when the leader says so."""

    def __init__(
        self, options: argparse.Namespace, ranks: job_ranks.Ranks, mesh: Any
    ) -> None:
        self._options, self._ranks, self._mesh = options, ranks, mesh
        self.config = SIZES[options.sizes]
        self.slots = -(-options.capacity // ranks.count) * ranks.count
        self._params = served_model.place(served_model.load(options.weights), mesh)
        self.head = served_model.head(self._params)
        self._cache = served_model.empty_cache(self.config, mesh, self.slots)
        self._insert = served_model.insert(mesh)
        self._step = served_model.decode_step(self.config, mesh)
        self._tokens = np.zeros(self.slots, np.int32)
        self._lengths = np.zeros(self.slots, np.int32)
        each = -(-self.config.length // served_model.PAGE_TOKENS)
        pages = each * (options.capacity + job_ranks.PAGES_OVER)
        self._engine = job_ranks.open_engine(options)
        self.receiver = jf.kv.PageReceiver(
            self._engine,
            served_model.layout(self.config, pages, ranks.count, ranks.rank),
        )
        self._requests: dict[int, jf.kv.Receiving] = {}
        self._address = b""
        hidden = np.zeros(self.config.d_model, np.float32)
        served_model.first_token(self.head, hidden, np.int32(1))
        for length in options.warm or [1]:
            self._put(np.zeros(self._shape(length), np.float32), 0)
        self.step({})

    def _shape(self, tokens: int) -> tuple[int, ...]:
        size = job_ranks.padded(self.config, tokens, self._ranks.count)
        layers, _, *page = self.receiver.layout.shape
        return (layers, size // served_model.PAGE_TOKENS, *page)

    def _put(self, pages: np.ndarray, slot: int) -> None:
        """This rank's pages of a prompt to the devices: the one copy."""
        layers, count, caches, size, heads, width = pages.shape
        whole = (layers, count, caches, size, heads * self._ranks.count, width)
        sharding = NamedSharding(self._mesh, served_model.CACHE_SPEC)
        (device,) = self._mesh.local_devices
        mine = [jax.device_put(pages, device)]
        array = jax.make_array_from_single_device_arrays(whole, sharding, mine)
        self._cache = self._insert(self._cache, array, np.int32(slot))

    def expect(self, request: int, count: int, timeout_s: float) -> None:
        """Takes pages for a prompt; reports when they have come, or why not."""

        def report(done: Any) -> None:
            error = done.exception(0)
            self._ranks.report(
                "failed" if error else "ready", request=request, why=str(error or "")
            )

        try:
            receiving = self.receiver.expect(request, count, timeout_s)
        except jf.FabricError as error:
            self._ranks.report("failed", request=request, why=str(error))
            return
        self._requests[request] = receiving
        receiving.add_done_callback(report)

    def tail(self, request: int) -> bytes:
        """The last hidden state of a prompt that has come."""
        return self._requests[request].tail

    def release(self, request: int) -> None:
        """Nobody wants it any more."""
        receiving = self._requests.pop(request, None)
        if receiving is not None:
            receiving.release()

    def join(self, request: int, slot: int, token: int) -> None:
        """A prompt whose pages are all here comes in."""
        receiving = self._requests.pop(request)
        shape = self._shape(receiving.num_tokens)
        pages = np.zeros(shape, np.float32)
        pages[:, : len(receiving.pages)] = self.receiver.pool[:, list(receiving.pages)]
        receiving.release()
        self._put(pages, slot)
        self._tokens[slot] = token
        self._lengths[slot] = receiving.num_tokens

    def leave(self, slot: int) -> None:
        """A prompt's slot is empty."""
        self._lengths[slot] = 0

    def step(self, _: Any = None) -> np.ndarray:
        """One more token for each prompt that is in: int32[slots]."""
        # Copies: the program may still read what it was given.
        self._cache, tokens = self._step(
            *(self._params, self._cache, self._tokens.copy(), self._lengths.copy())
        )
        self._tokens = np.array(tokens)
        self._lengths[self._lengths > 0] += 1
        return self._tokens

    def report_address(self) -> None:
        """An engine that has cut off a dead peer may have a new address."""
        address = self._engine.address().to_bytes()
        if address != self._address:
            self._address = address
            self._ranks.report("address", address=address.hex())

    def close(self) -> None:
        """Takes leave of the other side, which then knows that nothing is under way."""
        self.receiver.close()
        self._engine.close()


@dataclasses.dataclass
class _Answer:
    """A prompt that is expected, or in a slot."""

    request: int
    prompt_tokens: int
    max_tokens: int
    trace: bool
    ranks_ready: int = 0
    slot: int = -1
    made: int = 0


class Leader:
    """Decides what comes in and what leaves, and tells all ranks."""

    def __init__(
        self, options: argparse.Namespace, ranks: job_ranks.Ranks, worker: Worker
    ) -> None:
        self._options, self._ranks, self._worker = options, ranks, worker
        self._link: Any = None
        self._addresses: list[str] = [""] * ranks.count
        self._answers: dict[int, _Answer] = {}
        self._ready: list[_Answer] = []
        self._slots = list(range(worker.slots))
        self._state: Any = None
        self._state_at = 0.0

    def addresses(self) -> list[bytes]:
        """Those of all ranks; waits until all have said theirs."""
        self._worker.report_address()
        while not all(self._addresses):
            self._hear(timeout_s=1.0)
        return [bytes.fromhex(address) for address in self._addresses]

    def serve(self, link: Any) -> None:
        """Until a rank or the link ends."""
        self._link = link
        while True:
            self._tell_state()
            busy = any(answer.slot >= 0 for answer in self._answers.values())
            self._hear(timeout_s=0.0 if busy else _STATE_S)
            for answer in self._ready:
                self._join(answer)
            self._ready.clear()
            if any(answer.slot >= 0 for answer in self._answers.values()):
                self._step()

    def _hear(self, timeout_s: float) -> None:
        """Takes what is in the inbox; waits for the first."""
        while True:
            try:
                kind, fields = self._ranks.inbox.get(timeout=timeout_s)
            except queue.Empty:
                return
            timeout_s = 0.0
            if kind == "expect":
                self._expect(fields)
            elif kind == "cancel":
                self._end(fields["request"])
            elif kind == "ready":
                self._rank_ready(fields["request"])
            elif kind == "failed":
                self._fail(fields["request"], fields["why"])
            elif kind == "address":
                self._addresses[fields["rank"]] = fields["address"]
            elif kind == "router_lost":
                for request in list(self._answers):
                    self._end(request)
                self._state = None
            elif kind in ("rank_lost", "link_ended"):
                raise SystemExit(f"decode job: {kind.replace('_', ' ')}")

    def _do(self, kind: str, *arguments: Any) -> Any:
        """On all ranks, in the same order."""
        self._ranks.tell(kind, arguments=arguments)
        return getattr(self._worker, kind)(*arguments)

    def _expect(self, fields: dict[str, Any]) -> None:
        request, options = fields["request"], fields["options"]
        count, most = len(fields["tokens"]), fields["max_tokens"]
        if options.get("mode") == "off":
            return  # the prefill job answers by itself
        if count + most > self._worker.config.length:
            why = (
                f"{count} tokens and {most} more: the model takes "
                f"{self._worker.config.length}"
            )
            self._link.send("failed", request=request, why=why, again=False)
            return
        self._answers[request] = _Answer(
            request, count, most, bool(options.get("trace"))
        )
        self._do("expect", request, count, fields["timeout_s"])

    def _rank_ready(self, request: int) -> None:
        answer = self._answers.get(request)
        if answer is not None:
            answer.ranks_ready += 1
            if answer.ranks_ready == self._ranks.count:
                self._ready.append(answer)

    def _fail(self, request: int, why: str) -> None:
        if request in self._answers:
            self._link.send("failed", request=request, why=why, again=True)
            self._end(request)

    def _end(self, request: int) -> None:
        """Nothing more is made of a prompt; its pages and its slot are free."""
        answer = self._answers.pop(request, None)
        if answer is None:
            return
        if answer in self._ready:
            self._ready.remove(answer)
        if answer.slot >= 0:
            self._do("leave", answer.slot)
            self._slots.append(answer.slot)
        else:
            self._do("release", request)

    def _join(self, answer: _Answer) -> None:
        begin_ns = time.monotonic_ns()
        hidden = np.frombuffer(self._worker.tail(answer.request), np.float32)
        first = int(
            served_model.first_token(
                self._worker.head, hidden, np.int32(answer.prompt_tokens)
            )
        )
        # All is here; what follows delays the second token, not this one.
        self._emit([(answer, first)])
        spans = {"first token": [begin_ns, time.monotonic_ns()]}
        if answer.request in self._answers:
            answer.slot = self._slots.pop()
            self._do("join", answer.request, answer.slot, first)
        if answer.trace and self._options.trace is not None:
            file = self._options.trace / f"{self._options.name}.spans.json"
            file.write_text(json.dumps(spans))

    def _step(self) -> None:
        tokens = self._do("step", 0)
        inside = [answer for answer in self._answers.values() if answer.slot >= 0]
        self._emit([(answer, int(tokens[answer.slot])) for answer in inside])

    def _emit(self, new: list[tuple[_Answer, int]]) -> None:
        items = [[answer.request, [token]] for answer, token in new]
        self._link.send("tokens", items=items)
        for answer, _ in new:
            answer.made += 1
            if answer.made == answer.max_tokens:
                self._link.send("finished", request=answer.request, why="length")
                self._end(answer.request)

    def _tell_state(self) -> None:
        """To the router, when something has changed; at most once in a while."""
        now = time.monotonic()
        if now < self._state_at:
            return
        self._state_at = now + _STATE_S / 2
        self._do("report_address")
        stats = self._worker.receiver.stats()
        pages = self._worker.receiver.layout.pages
        numbers = {"pages": pages, **{f"kv_{k}": v for k, v in stats.items()}}
        if (numbers, self._addresses) != self._state:
            self._state = (numbers, list(self._addresses))
            self._link.send("state", addresses=self._addresses, numbers=numbers)


def follow(ranks: job_ranks.Ranks, worker: Worker) -> None:
    """What the leader says, in the same order."""
    worker.report_address()
    while True:
        kind, fields = ranks.told()
        getattr(worker, kind)(*fields["arguments"])


def main() -> None:
    options = job_ranks.parse_arguments(__doc__ or "")
    mesh = served_model.job_mesh()
    with jf.Fabric(mesh, timeout_s=options.timeout_s):
        ranks = job_ranks.Ranks()
        worker = Worker(options, ranks, mesh)
        try:
            if ranks.leads:
                leader = Leader(options, ranks, worker)
                addresses = leader.addresses()
                with job_ranks.linked(options, ranks, "decode", addresses) as link:
                    leader.serve(link)
            else:
                follow(ranks, worker)
        except (KeyboardInterrupt, EOFError):
            pass
        finally:
            worker.close()


if __name__ == "__main__":
    main()
