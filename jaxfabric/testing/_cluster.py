"""A cluster of worker processes that runs tests on all its ranks."""

from __future__ import annotations

import os
import pathlib
import selectors
import time
from collections.abc import Mapping
from typing import Any

from jaxfabric._cli import _processes
from jaxfabric.testing._outcome import BAD, RankOutcome, Status
from jaxfabric.testing._rank import Layout, Worker

START_TIMEOUT_S = 120
# A long wait in a debugger must not let JAX abort the ranks; deaths of processes are
# noticed here by their closed sockets.
HEARTBEAT_S = 3600
_CLOSE_TIMEOUT_S = 10.0
_STACK_DUMP_S = 0.5
_LOST_WAIT_S = 2.0
_POLL_S = 0.1


class ClusterError(RuntimeError):
    """The ranks did not start."""


class Cluster:
    """Worker processes of one shape, kept between tests.

    Args:
      layout: which ranks to start.
      setup: what `_worker.py` needs to build its pytest session.
      folder: an empty folder for logs and temporary files.

    Raises:
      ClusterError: a rank died, or did not get ready in time.
    """

    def __init__(
        self, layout: Layout, setup: Mapping[str, Any], folder: pathlib.Path
    ) -> None:
        self.layout = layout
        self._workers: list[Worker] = []
        self._service = None
        self._selector = selectors.DefaultSelector()
        spare = _processes.LocalPort()
        bind = layout.bind
        try:
            if layout.own_service:
                if layout.first == 0:
                    self._service = _start_service(layout)
                bind = spare.address
            for rank in range(layout.first, layout.first + layout.local):
                self._start(rank, bind, setup, folder)
            self._wait_ready()
        except BaseException:
            self.kill()
            raise
        finally:
            spare.close()

    def _start(
        self,
        rank: int,
        bind: str | None,
        setup: Mapping[str, Any],
        folder: pathlib.Path,
    ) -> None:
        worker = Worker(rank, self.layout, folder, setup["cwd"])
        self._workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        own = {
            "rank": rank,
            "processes": self.layout.processes,
            "coordinator": self.layout.coordinator,
            "start_timeout_s": START_TIMEOUT_S,
            "heartbeat_s": HEARTBEAT_S,
            "initialize_kwargs": {"coordinator_bind_address": bind} if bind else {},
            "basetemp": str(folder / f"tmp-{rank}"),
        }
        worker.send({**setup, **own})

    def _wait_ready(self) -> None:
        begin = time.monotonic()
        waiting = {w.rank: w for w in self._workers}
        while waiting:
            for worker, message in self._messages(waiting):
                if message["kind"] == "ready":
                    del waiting[worker.rank]
            dead = [w for w in waiting.values() if w.dead()]
            late = time.monotonic() - begin > START_TIMEOUT_S
            if dead or late:
                raise ClusterError(_explain_start(dead, list(waiting.values())))

    def _messages(
        self, waiting: Mapping[int, Worker]
    ) -> list[tuple[Worker, dict[str, Any]]]:
        """What has come within a moment, from the ranks that are waited for."""
        received = []
        for key, _ in self._selector.select(_POLL_S):
            worker: Worker = key.data
            received += [(worker, m) for m in worker.receive()]
            if worker.closed:
                self._selector.unregister(worker.socket)
        return [(w, m) for w, m in received if w.rank in waiting]

    def run(
        self,
        nodeid: str,
        following: str | None,
        *,
        timeout_s: float,
        grace_s: float,
        lost: frozenset[int] = frozenset(),
    ) -> list[RankOutcome]:
        """Runs one test on all ranks of this host.

        Args:
          nodeid: the test.
          following: the test that this cluster runs next, if any; fixtures that it
            shares with this one are kept.
          timeout_s: after it the stacks of the ranks still running are taken.
          grace_s: what the other ranks get once one has failed.
          lost: ranks that may die or stop without failing the test.

        Returns:
          One outcome per rank of this host. Ranks that hang are still running: the
          caller must `kill` a cluster unless all ranks went the same way.
        """
        run = _TestRun(lost, grace_s, time.monotonic(), timeout_s)
        waiting = {w.rank: w for w in self._workers}
        for worker in self._workers:
            worker.begin()
            worker.send({"nodeid": nodeid, "next": following})
        while waiting and not run.is_over(waiting):
            for worker, message in self._messages(waiting):
                if message["kind"] == "report":
                    worker.reports.append(message)
                elif message["kind"] == "done":
                    run.finished(waiting.pop(worker.rank))
            for worker in [w for w in waiting.values() if w.dead()]:
                run.died(waiting.pop(worker.rank))
        self._take_stacks(run, list(waiting.values()))
        return sorted(run.outcomes, key=lambda outcome: outcome.rank)

    def _take_stacks(self, run: _TestRun, hung: list[Worker]) -> None:
        for worker in hung:
            worker.dump_stacks()
        if hung:
            time.sleep(_STACK_DUMP_S)
        for worker in hung:
            run.hung(worker)

    def close(self) -> None:
        """Ends the sessions (fixtures are torn down), then the processes."""
        for worker in self._workers:
            worker.send({"stop": True})
        waiting = {w.rank: w for w in self._workers}
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while waiting and time.monotonic() < deadline:
            for worker, message in self._messages(waiting):
                if message["kind"] == "bye":
                    waiting.pop(worker.rank)
            if any(w.dead() for w in waiting.values()):
                break
        self.kill()

    def kill(self) -> None:
        """Ends the processes at once."""
        processes = [w.process for w in self._workers]
        if self._service is not None:
            processes.append(self._service)
        _processes.kill_all(processes)
        for worker in self._workers:
            worker.socket.close()
        self._selector.close()


class _TestRun:
    """The outcomes of the ranks of one test, and until when to wait for more."""

    def __init__(
        self, lost: frozenset[int], grace_s: float, begin: float, timeout_s: float
    ) -> None:
        self.outcomes: list[RankOutcome] = []
        self._lost = lost
        self._grace_s = grace_s
        self._begin = begin
        self._timeout_s = timeout_s
        self._deadline = begin + timeout_s

    def is_over(self, waiting: Mapping[int, Worker]) -> bool:
        now = time.monotonic()
        if set(waiting) <= self._lost:
            # The others are done; a stopped rank will never be.
            self._deadline = min(self._deadline, now + _LOST_WAIT_S)
        return now >= self._deadline

    def finished(self, worker: Worker) -> None:
        self._add(worker, *_judge(worker.reports))

    def died(self, worker: Worker) -> None:
        _processes.wait_all([worker.process], _LOST_WAIT_S)
        code = worker.process.poll()
        how = "closed its socket"
        if code is not None:
            how = _processes.describe_exit(code)
        status = Status.LOST if worker.rank in self._lost else Status.CRASHED
        text = worker.stacks() or "It left no Python stack."
        self._add(worker, status, f"the process ended: {how}", f"{how}\n{text}")

    def hung(self, worker: Worker) -> None:
        status = Status.LOST if worker.rank in self._lost else Status.HUNG
        now_s = time.monotonic() - self._begin
        if now_s >= self._timeout_s:
            why = (
                f"still running after timeout_s={self._timeout_s:g} "
                "(jaxfabric mark, or --jaxfabric-timeout-s)"
            )
        else:
            why = (
                f"still running {self._grace_s:g} s after the first failure "
                "(ini option jaxfabric_grace_s)"
            )
        stacks = worker.stacks() or "It wrote no stacks: stopped, or in native code."
        self._add(worker, status, why, f"{why}\n{stacks}")

    def _add(self, worker: Worker, status: Status, summary: str, text: str) -> None:
        now = time.monotonic()
        if status in BAD:
            self._deadline = min(self._deadline, now + self._grace_s)
        self.outcomes.append(
            RankOutcome(
                worker.rank, status, now - self._begin, summary, text, worker.output()
            )
        )


def _judge(reports: list[dict[str, Any]]) -> tuple[Status, str, str]:
    """(status, summary, text) of a rank that went through a test."""
    failed = [r for r in reports if r["outcome"] == "failed"]
    if failed:
        text = ""
        for report in failed:
            if report["when"] != "call":
                text += f"in {report['when']}:\n"
            text += report["text"] + "\n"
            text += "".join(f"{title}:\n{x}\n" for title, x in report["sections"])
        return Status.FAILED, failed[0]["summary"], text
    skipped = [r for r in reports if r["outcome"] == "skipped"]
    if skipped:
        return Status.SKIPPED, skipped[0]["reason"], skipped[0]["reason"]
    return Status.PASSED, "", ""


def _start_service(layout: Layout) -> Any:
    return _processes.start(
        [
            *("-m", "jaxfabric.testing._coordinator"),
            layout.bind or f"[::]:{layout.coordinator.rpartition(':')[2]}",
            str(layout.processes),
            str(os.getpid()),
            str(HEARTBEAT_S),
        ],
        _processes.child_environment(1, 0),
    )


def _explain_start(dead: list[Worker], waiting: list[Worker]) -> str:
    if dead:
        worker = dead[0]
        _processes.wait_all([worker.process], _LOST_WAIT_S)
        code = worker.process.poll()
        how = "it closed its socket"
        if code is not None:
            how = _processes.describe_exit(code)
        return (
            f"rank {worker.rank} ended while the cluster started: {how}\n"
            f"{worker.output()}{worker.stacks()}"
        )
    for worker in waiting:
        worker.dump_stacks()
    time.sleep(_STACK_DUMP_S)
    ranks = ", ".join(str(w.rank) for w in waiting)
    text = "".join(f"rank {w.rank}:\n{w.output()}{w.stacks()}\n" for w in waiting)
    return f"rank {ranks} not ready after {START_TIMEOUT_S} s\n{text}"
