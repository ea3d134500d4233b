"""The parent's side of a child: requests with deadlines, and a certain end."""

from __future__ import annotations

import json
import os
import pathlib
import select
import signal
import subprocess
import tempfile
import time
from typing import Any

_SCRIPT = pathlib.Path(__file__).with_name("start_child.py")
# Interpreters that load jax or torch, several at once, on a busy machine.
START_TIMEOUT_S = 90.0
_GRACE_S = 3.0
_LAST_WORDS = 300  # characters of a dead child's output that are shown


class SubjectFailed(RuntimeError):
    """A subject cannot be measured; the text says why, in one line."""


class CaseFailed(SubjectFailed):
    """This case cannot be measured; others may."""


class NotInstalled(SubjectFailed):
    """What the subject needs is not there."""


class Child:
    """A process of a subject. Use as a context manager: it is always ended.

    Args:
      role: "Target" or "Initiator".
      subject: the module of `ends`.
      bytes_: its memory.
      options: for the end's constructor; becomes JSON.
      python: the interpreter.
      environment: variables to add.

    Raises:
      SubjectFailed: the interpreter cannot be started.
    """

    def __init__(
        self,
        role: str,
        subject: str,
        bytes_: int,
        options: dict[str, Any],
        *,
        python: str,
        environment: dict[str, str],
    ) -> None:
        self.name = f"{subject} {role.lower()}"
        self._unread = b""
        self._errors = tempfile.TemporaryFile()
        # `env` adds to the variables that this process has.
        command = ["env", *(f"{k}={v}" for k, v in environment.items())]
        command += [python, str(_SCRIPT), role, subject, str(bytes_)]
        self._process = subprocess.Popen(
            [*command, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # so that all of its processes can be ended
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Waits until its end is open.

        Raises:
          NotInstalled: a package is missing there.
          SubjectFailed: it cannot be opened, died, or says nothing.
        """
        self._receive("start", timeout_s)

    def ask(self, do: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """One request and its answer.

        Raises:
          CaseFailed: the child says why it cannot.
          SubjectFailed: it died, or does not answer in time.
        """
        assert self._process.stdin is not None
        line = json.dumps({"do": do, **arguments}) + "\n"
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death(do) from None
        return self._receive(do, timeout_s)

    def _receive(self, do: str, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        begin = time.monotonic()
        while b"\n" not in self._unread:
            left = begin + timeout_s - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                waited = f"no answer to {do!r} in {timeout_s:g} s"
                raise SubjectFailed(f"{self.name}: {waited}{self._last_words()}")
            data = os.read(descriptor, 1 << 20)
            if not data:
                raise self._death(do)
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "missing" in answer:
            raise NotInstalled(answer["missing"])
        if "error" in answer:
            failure = SubjectFailed if do == "start" else CaseFailed
            raise failure(f"{self.name}: {answer['error']}")
        return answer

    def _death(self, do: str) -> SubjectFailed:
        try:
            code = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            return SubjectFailed(f"{self.name}: closed its output during {do!r}")
        how = f"exit code {code}"
        if code < 0:
            how = f"signal {signal.Signals(-code).name}"
        return SubjectFailed(
            f"{self.name}: ended during {do!r} with {how}{self._last_words()}"
        )

    def _last_words(self) -> str:
        self._errors.seek(0)
        words = " ".join(self._errors.read().decode(errors="replace").split())
        return f"; it printed: ...{words[-_LAST_WORDS:]}" if words else ""

    def end(self) -> None:
        """Ends the process and all that it has started; waits for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # unsent bytes of a request to a dead child
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nothing is left of it
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
