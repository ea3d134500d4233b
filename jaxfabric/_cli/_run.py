"""`jaxfabric run`: starts the ranks of one job and sees them to their end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType

from jaxfabric._cli import _output, _processes

TIMEOUT_EXIT_CODE = 124
# After the grace: SIGTERM (which JAX catches and outlives), then SIGKILL this later.
_TERM_TO_KILL_S = 1.0
_INTERRUPT_GRACE_S = 2.0
# Time for faulthandler to write the stacks of all threads.
_STACK_DUMP_S = 1.0
# A rank killed by a signal is noticed later than the exceptions that its death
# causes in its peers; it comes first if it is this close to them.
_SIGNAL_HEAD_START_S = 0.25
_POLL_S = 0.05
# Bytes that a rank wrote just before its end are already in the pipe.
_DRAIN_S = 0.5


@dataclasses.dataclass(frozen=True)
class Job:
    """What `jaxfabric run` was asked to start."""

    script: str
    script_args: tuple[str, ...]
    processes: int
    devices_per_process: int = 1
    timeout_s: float | None = None
    grace_s: float = 10.0
    python_args: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Failure:
    rank: int
    time: float
    code: int
    reason: str
    text: str


class _Rank:
    """One process, its streams, and how it ended."""

    def __init__(self, number: int, job: Job, coordinator: str, screen: bool) -> None:
        self.number = number
        self.ended_by_us = False
        self.failure: _Failure | None = None
        self.over = False
        self._report = b""
        raw = screen and number == 0  # its progress bars work
        stream = None if raw else subprocess.PIPE
        report_read, report_write = os.pipe()
        arguments = [
            *job.python_args,
            *("-m", "jaxfabric._cli._bootstrap"),
            f"--coordinator={coordinator}",
            f"--processes={job.processes}",
            f"--rank={number}",
            f"--launcher-pid={os.getpid()}",
            f"--status-fd={report_write}",
            job.script,
            *job.script_args,
        ]
        env = _processes.child_environment(job.devices_per_process, number)
        self.process = _processes.start(
            arguments, env, pass_fds=[report_write], stdout=stream, stderr=stream
        )
        os.close(report_write)
        self.report_fd = report_read
        self.lines: dict[int, _output.RankLines] = {}
        for descriptor, pipe in ((1, self.process.stdout), (2, self.process.stderr)):
            if pipe is not None:
                self.lines[pipe.fileno()] = _output.RankLines(
                    number, descriptor, over_bar=screen
                )

    def read(self, fd: int) -> bool:
        """Takes what has come on `fd`; False at its end."""
        data = os.read(fd, 1 << 16)
        if fd == self.report_fd:
            self._report += data
            if self.failure is None and self._report.endswith(b"\n"):
                self.failure = self._reported()
        elif data:
            self.lines[fd].feed(data)
        else:
            self.lines[fd].close()
        return bool(data)

    def notice_end(self) -> None:
        """Records how the process ended."""
        code = self.process.returncode
        self.over = True
        if self.failure is None and code != 0 and not self.ended_by_us:
            now = time.monotonic() - (_SIGNAL_HEAD_START_S if code < 0 else 0.0)
            # A crash has no Python traceback; its stderr says what is known.
            tail = [line for lines in self.lines.values() for line in lines.tail]
            self.failure = _Failure(
                self.number,
                now,
                128 - code if code < 0 else code,
                _processes.describe_exit(code),
                "\n".join(tail),
            )

    def _reported(self) -> _Failure:
        report = json.loads(self._report)
        code = int(report["code"])
        return _Failure(
            self.number, report["time"], code, f"exit code {code}", report["text"]
        )


class _Supervisor:
    """Reads from the ranks and ends them by the rules of `jaxfabric run`."""

    def __init__(self, job: Job, ranks: list[_Rank], screen: bool) -> None:
        self._job = job
        self._ranks = ranks
        self._screen = screen
        self._begin = time.monotonic()
        self._term_at: float | None = None
        self._kill_at: float | None = None
        self._timed_out = False
        self._interrupt: int | None = None
        self._selector = selectors.DefaultSelector()
        for rank in ranks:
            for fd in (rank.report_fd, *rank.lines):
                self._selector.register(fd, selectors.EVENT_READ, rank)

    def run(self) -> int:
        """Returns the exit code of the job once all ranks have ended."""
        with self._signals():
            while not all(rank.over for rank in self._ranks):
                self._read(_POLL_S)
                for rank in self._ranks:
                    if not rank.over and rank.process.poll() is not None:
                        rank.notice_end()
                self._act(time.monotonic())
            drained = time.monotonic() + _DRAIN_S
            while self._read(0.0) and time.monotonic() < drained:
                pass
        for rank in self._ranks:
            for lines in rank.lines.values():
                lines.close()
        return self._conclude()

    def _read(self, timeout_s: float) -> bool:
        ready = self._selector.select(timeout_s)
        for key, _ in ready:
            if not key.data.read(key.fd):
                self._selector.unregister(key.fd)
        return bool(ready)

    def _act(self, now: float) -> None:
        """Starts or continues the ending of the ranks, when it is time."""
        if self._kill_at is not None and now >= self._kill_at:
            self._end(signal.SIGKILL)
        elif self._term_at is not None and now >= self._term_at:
            self._end(signal.SIGTERM)
            self._kill_at = self._kill_at or now + _TERM_TO_KILL_S
            self._term_at = None
        elif self._kill_at is not None or self._timed_out:
            return
        elif self._job.timeout_s and now - self._begin >= self._job.timeout_s:
            self._dump_stacks(now)
        elif self._term_at is None and self._first_failure() is not None:
            self._term_at = now + self._job.grace_s
            if self._job.grace_s > 1.0 and not all(r.over for r in self._ranks):
                failure = self._first_failure()
                assert failure is not None
                self._say(
                    f"rank {failure.rank} failed ({failure.reason}); the others have "
                    f"{self._job.grace_s:g} s to report (--grace-s)"
                )

    def _end(self, number: int) -> None:
        for rank in self._ranks:
            if not rank.over:
                rank.ended_by_us = True
                _processes.signal_group(rank.process, number)

    def _dump_stacks(self, now: float) -> None:
        self._timed_out = True
        self._term_at = now + _STACK_DUMP_S
        self._say(
            f"time limit of {self._job.timeout_s:g} s reached (--timeout-s): "
            "the stacks of all ranks, then the end"
        )
        for rank in self._ranks:
            if not rank.over:
                rank.process.send_signal(signal.SIGUSR1)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGHUP end all ranks; a second one kills them."""

        def handle(number: int, _frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._interrupt is not None:
                self._kill_at = now
                return
            self._interrupt = number
            self._end(signal.SIGINT)
            self._term_at = now + _INTERRUPT_GRACE_S

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        old = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _first_failure(self) -> _Failure | None:
        failures = [rank.failure for rank in self._ranks if rank.failure is not None]
        return min(failures, key=lambda failure: failure.time, default=None)

    def _conclude(self) -> int:
        """Prints how the job ended; returns its exit code."""
        if self._interrupt is not None:
            name = signal.Signals(self._interrupt).name
            self._say(f"ended by {name}; all ranks are gone")
            return 128 + self._interrupt
        failure = self._first_failure()
        if self._timed_out:
            if failure is not None:
                self._say_failure(failure)
            self._say(
                f"ended after the time limit of {self._job.timeout_s:g} s; exit code "
                f"{TIMEOUT_EXIT_CODE}"
            )
            return TIMEOUT_EXIT_CODE
        if failure is None:
            return 0
        self._say_failure(failure)
        return failure.code

    def _say_failure(self, failure: _Failure) -> None:
        after_s = max(0.0, failure.time - self._begin)
        self._say(
            f"first failure: rank {failure.rank}, {failure.reason}, "
            f"{after_s:.1f} s after the start"
        )
        block = "".join(f"  | {line}\n" for line in failure.text.splitlines())
        _output.write(2, block.encode(errors="replace"))
        others = [r for r in self._ranks if r.number != failure.rank]
        if others:
            self._say("other ranks: " + ", ".join(map(_fate, others)))

    def _say(self, text: str) -> None:
        clear = "\r\x1b[K" if self._screen else ""
        _output.write(2, f"{clear}jaxfabric run: {text}\n".encode())


def _fate(rank: _Rank) -> str:
    code = rank.process.returncode
    if rank.ended_by_us:
        return f"{rank.number} ended by the launcher"
    return f"{rank.number} {_processes.describe_exit(code)}"


def run(job: Job) -> int:
    """Runs the job on this machine and returns the exit code for the shell.

    0 when all ranks ended well, else the code of the first rank that failed, 124
    after `timeout_s`, 128 + the signal's number after Ctrl-C or SIGTERM. No process
    that was started here is alive afterwards.
    """
    screen = _output.is_screen()
    sys.stdout.flush()
    if note := _processes.platform_note(os.environ):
        print(note, file=sys.stderr, flush=True)
    port = _processes.LocalPort()
    ranks: list[_Rank] = []
    try:
        for number in range(job.processes):
            ranks.append(_Rank(number, job, port.address, screen))
        return _Supervisor(job, ranks, screen).run()
    except BrokenPipeError:
        # Whoever read our output has gone, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    finally:
        _processes.kill_all(rank.process for rank in ranks)
        port.close()
