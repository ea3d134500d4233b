"""A prefill job: computes prompts' caches, and sends them while it computes.

    jaxfabric run -n 2 examples/disaggregated/prefill_job.py --name prefill0 \\
        --router http://127.0.0.1:8000 --token-file token --weights weights.npz

Each rank has a PageSender of its own, with its part of the heads. The leader takes
prompts from the router, one after the other.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import pathlib
import queue
import time
from collections.abc import Iterator
from typing import Any

import job_ranks
import numpy as np
import served_model
from sizes import SIZES

import jaxfabric as jf

_STATE_S = 1.0


class Worker:
    """What each rank does, when the leader says so."""

    def __init__(
        self, options: argparse.Namespace, ranks: job_ranks.Ranks, fabric: jf.Fabric
    ) -> None:
        self._options, self._ranks, self._fabric = options, ranks, fabric
        self._config = SIZES[options.sizes]
        mesh = fabric.mesh
        self._params = served_model.place(served_model.load(options.weights), mesh)
        self._head = served_model.head(self._params)
        self.pages_each = -(-self._config.length // served_model.PAGE_TOKENS)
        self.regions = options.capacity + job_ranks.PAGES_OVER
        self.timeout_s = options.timeout_s
        self._engine = job_ranks.open_engine(options)
        self.sender = jf.kv.PageSender(
            self._engine,
            served_model.layout(
                self._config, self.pages_each * self.regions, ranks.count, ranks.rank
            ),
        )
        self._programs = {
            mode: served_model.prefill(self._config, mesh, self.sender, mode)
            for mode in served_model.MODES
        }
        self._compiled: dict[tuple[str, int], Any] = {}
        self._sendings: dict[int, jf.kv.Sending] = {}
        for length in options.warm:
            for mode in served_model.MODES:
                self._program(mode, length)

    def _operands(self, tokens: list[int], request: int, region: int) -> list[Any]:
        size = job_ranks.padded(self._config, len(tokens), self._ranks.count)
        whole = np.zeros(size, np.int32)
        whole[: len(tokens)] = tokens
        rows = np.arange(size // served_model.PAGE_TOKENS, dtype=np.int32)
        pool_pages = rows + np.int32(region * self.pages_each)
        rows[self.sender.layout.pages_for(len(tokens)) :] = -1
        id_operand = jf.kv.request_operand(request)
        return [whole, np.int32(len(tokens)), id_operand, rows, pool_pages]

    def _program(self, mode: str, tokens: int) -> Any:
        size = job_ranks.padded(self._config, tokens, self._ranks.count)
        if (mode, size) not in self._compiled:
            operands = self._operands([0] * size, 0, 0)
            lowered = self._programs[mode].lower(self._params, *operands)
            self._compiled[mode, size] = lowered.compile()
        return self._compiled[mode, size]

    def begin(
        self, request: int, count: int, region: int, addresses: list[str], left_s: float
    ) -> None:
        """Connects to where the pages go, unless it is, and begins; reports."""
        why, again = "", True
        try:
            until = time.monotonic() + left_s
            # One job that hangs must not hold up those that go elsewhere.
            connect_s = min(left_s, self._options.peer_timeout_s)
            pending = [
                self.sender.connect(bytes.fromhex(address), connect_s)
                for address in self._mine(addresses)
            ]
            peers = [each.result() for each in pending]
            first = region * self.pages_each
            self._sendings[request] = self.sender.begin(
                request,
                peers,
                pages=range(first, first + self.sender.layout.pages_for(count)),
                num_tokens=count,
                timeout_s=max(0.01, until - time.monotonic()),
            )
        except jf.PlanMismatchError as error:
            why, again = str(error), False
        except (jf.FabricError, ValueError) as error:
            why = str(error)
        self._ranks.report("begun", request=request, why=why, again=again)

    def _mine(self, addresses: list[str]) -> list[str]:
        """Of a decode job's ranks, those that take heads of this rank."""
        ours, theirs = self._ranks.count, len(addresses)
        mine = range(
            self._ranks.rank * theirs // ours,
            max(
                self._ranks.rank * theirs // ours + 1,
                (self._ranks.rank + 1) * theirs // ours,
            ),
        )
        return [addresses[rank] for rank in mine]

    def drop(self, request: int) -> None:
        """Another rank could not begin it, or nobody wants it any more."""
        sending = self._sendings.pop(request, None)
        if sending is not None:
            sending.cancel()
            sending.add_done_callback(lambda _: self._over(request, "dropped"))
        else:
            self._over(request, "dropped")

    def run(
        self, request: int, tokens: list[int], region: int, mode: str, trace: bool
    ) -> int | None:
        """Computes a prompt, while its pages leave; ``"off"``: returns the token."""
        operands = self._operands(tokens, request, region)
        program = self._program(mode, len(tokens))
        with self._traced(trace):
            hidden = np.asarray(program(self._params, *operands)[0])
            if mode == "off":
                self._over(request, "")
                return int(served_model.first_token(self._head, hidden, operands[1]))
            sending = self._sendings.pop(request)
            with contextlib.suppress(jf.FabricError):  # the sending has it, too
                sending.send_tail(hidden.tobytes())
            sending.add_done_callback(
                lambda done: self._over(request, str(done.exception(0) or ""))
            )
            if trace:
                sending.exception()
        return None

    def _over(self, request: int, why: str) -> None:
        self._ranks.report("over", request=request, why=why)

    @contextlib.contextmanager
    def _traced(self, trace: bool) -> Iterator[None]:
        folder: pathlib.Path | None = self._options.trace
        if not trace or folder is None:
            yield
            return
        name = f"{self._options.name}.{self._ranks.rank}"
        with (
            self._fabric.trace(folder / f"{name}.fabric.json"),
            self._engine.trace(folder / f"{name}.engine.json"),
        ):
            begin_ns = time.monotonic_ns()
            yield
            program = [begin_ns, time.monotonic_ns()]
        (folder / f"{name}.spans.json").write_text(json.dumps({"program": program}))

    def close(self) -> None:
        """Takes leave of the other side, which then knows that nothing is under way."""
        self.sender.close(5.0)
        self._engine.close()


class Leader:
    """Takes prompts, and tells all ranks what to do."""

    def __init__(self, ranks: job_ranks.Ranks, worker: Worker, link: Any) -> None:
        self._ranks, self._worker, self._link = ranks, worker, link
        self._prompts: collections.deque[dict[str, Any]] = collections.deque()
        self._regions = list(range(worker.regions))
        self._under_way: dict[int, dict[str, Any]] = {}
        self._begun: list[dict[str, Any]] = []

    def serve(self) -> None:
        """Until a rank or the link ends."""
        while True:
            idle = not self._prompts or not self._regions
            self._hear(timeout_s=_STATE_S if idle else 0.0)
            if self._prompts and self._regions:
                self._prefill(self._prompts.popleft())

    def _hear(self, timeout_s: float) -> None:
        """Takes what is in the inbox; waits for the first."""
        while True:
            try:
                kind, fields = self._ranks.inbox.get(timeout=timeout_s)
            except queue.Empty:
                return
            timeout_s = 0.0
            if kind == "prefill":
                fields["until"] = time.monotonic() + fields["timeout_s"]
                self._prompts.append(fields)
            elif kind == "cancel":
                self._cancel(fields["request"])
            elif kind == "begun":
                self._begun.append(fields)
            elif kind == "over":
                self._over(fields["request"], fields["why"])
            elif kind == "router_lost":
                self._prompts.clear()
            elif kind in ("rank_lost", "link_ended"):
                raise SystemExit(f"prefill job: {kind.replace('_', ' ')}")

    def _cancel(self, request: int) -> None:
        kept = [prompt for prompt in self._prompts if prompt["request"] != request]
        self._prompts = collections.deque(kept)
        # One that is being sent hears of it from its receiver.

    def _prefill(self, prompt: dict[str, Any]) -> None:
        request, tokens = prompt["request"], prompt["tokens"]
        mode = prompt["options"].get("mode", "stream")
        left_s = prompt["until"] - time.monotonic()
        size = self._worker.pages_each * served_model.PAGE_TOKENS
        if mode not in served_model.MODES or len(tokens) > size or left_s <= 0:
            self._fail(request, f"mode {mode!r}, {len(tokens)} tokens, {left_s:.1f} s")
            return
        region = self._regions.pop()
        state = {"region": region, "left": self._ranks.count, "why": ""}
        self._under_way[request] = state
        if mode != "off":
            begin = (request, len(tokens), region, prompt["addresses"], left_s)
            if not self._begin(begin):
                return
        run = (request, tokens, region, mode, bool(prompt["options"].get("trace")))
        self._ranks.tell("run", arguments=run)
        token = self._worker.run(*run)
        if token is not None:
            self._link.send("tokens", items=[[request, [token]]])
            self._link.send("finished", request=request, why="prefill only")

    def _begin(self, begin: tuple[Any, ...]) -> bool:
        """Whether all ranks can send a prompt; if not, none does."""
        self._begun.clear()
        self._ranks.tell("begin", arguments=begin)
        self._worker.begin(*begin)
        until = time.monotonic() + min(begin[-1], self._worker.timeout_s) + 1.0
        while len(self._begun) < self._ranks.count:
            self._hear(max(0.0, until - time.monotonic()))
            if time.monotonic() > until:
                raise SystemExit("prefill job: a rank does not answer")
        failures = [each for each in self._begun if each["why"]]
        if failures:
            again = all(each["again"] for each in failures)
            self._fail(begin[0], failures[0]["why"], again)
            self._ranks.tell("drop", arguments=begin[:1])
            self._worker.drop(begin[0])
        return not failures

    def _fail(self, request: int, why: str, again: bool = False) -> None:
        self._link.send("failed", request=request, why=why, again=again)

    def _over(self, request: int, why: str) -> None:
        """A rank reads a prompt's pages no more."""
        state = self._under_way[request]
        state["left"] -= 1
        state["why"] = state["why"] or why
        if state["left"]:
            return
        del self._under_way[request]
        self._regions.append(state["region"])
        if not state["why"]:
            self._link.send("sent", request=request)
        elif state["why"] != "dropped":
            self._fail(request, state["why"], again=True)


def follow(ranks: job_ranks.Ranks, worker: Worker) -> None:
    """What the leader says, in the same order."""
    while True:
        kind, fields = ranks.told()
        getattr(worker, kind)(*fields["arguments"])


def main() -> None:
    options = job_ranks.parse_arguments(__doc__ or "")
    with jf.Fabric(served_model.job_mesh(), timeout_s=options.timeout_s) as fabric:
        ranks = job_ranks.Ranks()
        worker = Worker(options, ranks, fabric)
        try:
            if ranks.leads:
                with job_ranks.linked(options, ranks, "prefill", []) as link:
                    Leader(ranks, worker, link).serve()
            else:
                follow(ranks, worker)
        except (KeyboardInterrupt, EOFError):
            pass
        finally:
            worker.close()


if __name__ == "__main__":
    main()
