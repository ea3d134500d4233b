"""A router and its jobs, as processes of this machine; and a client.

with Fleet(folder, sizes="tiny", weights=path) as fleet:
    fleet.start("prefill", "prefill0", ranks=2)
    fleet.start("decode", "decode0", ranks=1)
    fleet.wait_for(prefill=1, decode=1)
    answer = asyncio.run(fleet.ask(prompt, max_tokens=16))
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import aiohttp

HERE = pathlib.Path(__file__).resolve().parent
_STOP_S = 8.0
_POLL_S = 0.05


class AnswerError(Exception):
    """The router refused a prompt, or broke off.

    Attributes:
      reason: as the router names it.
      tokens: that came before.
    """

    def __init__(self, reason: str, message: str, tokens: list[int]) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason, self.tokens = reason, tokens


@dataclasses.dataclass
class Place:
    """Where processes run: what stands before their command, and added variables."""

    prefix: Sequence[str] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    host: str = "127.0.0.1"  # its address, where it listens


class Fleet:
    """Starts, kills and stops processes; all are gone when its block ends.

    Args:
      folder: for logs and the token.
      sizes: of the model.
      weights: file of the model.
      router: where the router runs.
      options: for each job, such as ``transport="ofi/tcp"``.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        sizes: str,
        weights: pathlib.Path,
        router: Place | None = None,
        router_options: Sequence[str] = (),
        **options: str,
    ) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._options = {"sizes": sizes, "weights": str(weights), **options}
        self._router = router or Place()
        self._router_options = list(router_options)
        self._token = folder / "token"
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        self.url = f"http://{self._router.host}:{port}"

    def __enter__(self) -> Fleet:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._token.touch(0o600)
        self._token.write_text(secrets.token_hex(16))
        _, host, port = self.url.replace("//", "").split(":")
        command = ["-m", "jaxfabric.kv.serve", "--host", host, "--port", port]
        command += ["--token-file", str(self._token), *self._router_options]
        self._run("router", self._router, command)
        return self

    def __exit__(self, *rest: object) -> None:
        for process in self.processes.values():
            process.terminate()
        until = time.monotonic() + _STOP_S
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()
            process.wait()

    def start(
        self,
        role: str,
        name: str,
        *,
        ranks: int,
        place: Place | None = None,
        **options: str,
    ) -> None:
        """Starts a job; see `wait_for`."""
        merged = {
            **self._options,
            "name": name,
            "router": self.url,
            "token_file": str(self._token),
            **options,
        }
        command = ["-m", "jaxfabric._cli", "run", f"--processes={ranks}", "--grace-s=1"]
        command.append(str(HERE / f"{role}_job.py"))
        for key, value in merged.items():
            command.append(f"--{key.replace('_', '-')}={value}")
        self._run(name, place or Place(), command)

    def _run(self, name: str, place: Place, command: Sequence[str]) -> None:
        added = {**self._cached_programs(), **place.environment}
        variables = [f"{key}={value}" for key, value in added.items()]
        log = (self.folder / f"{name}.log").open("ab")
        with log:
            self.processes[name] = subprocess.Popen(
                [*place.prefix, "env", *variables, sys.executable, "-P", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _cached_programs(self) -> dict[str, str]:
        """A job that comes back need not compile again what was compiled before."""
        return {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def kill(self, name: str) -> None:
        """kill -9: the launcher's ranks die with it."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self, name: str) -> None:
        """Asks it to end, and waits until it has, and the router knows."""
        process = self.processes.pop(name, None)
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        until = time.monotonic() + _STOP_S
        while any(job["name"] == name for job in self.health()["jobs"]):
            if time.monotonic() > until:
                raise RuntimeError(f"{name}: the router does not notice its end")
            time.sleep(_POLL_S)

    def log(self, name: str) -> str:
        """What a process has written."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    # --- Questions to the router ---

    def get(self, path: str) -> str:
        """The body of a page of the router's, whatever its status."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            return error.read().decode()

    def health(self) -> dict[str, Any]:
        """Who is there."""
        return dict(json.loads(self.get("/health")))

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; 0 if there is none yet."""
        lines = self.get("/metrics").splitlines()
        values = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return sum(float(value) for key, _, value in values if key.startswith(name))

    def wait_for(self, timeout_s: float = 120.0, **jobs: int) -> None:
        """Waits until so many jobs of each role are there.

        Raises:
          RuntimeError: a process has ended; with the end of what it wrote.
        """
        until = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError):
                here = [job["role"] for job in self.health()["jobs"]]
                if all(here.count(role) >= count for role, count in jobs.items()):
                    return
            for name, process in self.processes.items():
                if process.poll() is not None or time.monotonic() > until:
                    what = "has ended" if process.poll() is not None else "waited for"
                    raise RuntimeError(f"{name}: {what}\n{self.log(name)[-3000:]}")
            time.sleep(_POLL_S)

    async def stream(
        self,
        session: aiohttp.ClientSession,
        tokens: Sequence[int],
        **fields: Any,
    ) -> AsyncGenerator[list[int], None]:
        """The tokens of an answer, as they come.

        Raises:
          AnswerError: the router says why.
        """
        body = {"tokens": list(tokens), **fields}
        made: list[int] = []
        async with session.post(self.url + "/generate", json=body) as response:
            if response.status != 200:
                error = (await response.json())["error"]
                raise AnswerError(error["reason"], error["message"], made)
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    error = event["error"]
                    raise AnswerError(error["reason"], error["message"], made)
                if "finished" in event:
                    return
                made += event["tokens"]
                yield event["tokens"]
        raise AnswerError("broken_off", "the router's answer ends too soon", made)

    async def ask(
        self, session: aiohttp.ClientSession, tokens: Sequence[int], **fields: Any
    ) -> list[int]:
        """The whole answer."""
        made: list[int] = []
        async for new in self.stream(session, tokens, **fields):
            made += new
        return made
