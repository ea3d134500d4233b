"""Child processes that form one jax.distributed cluster on this machine.

Shared by `jaxfabric run` and the pytest plugin. Does not import jax.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

_DEVICE_COUNT_FLAG = re.compile(r"--xla_force_host_platform_device_count=\S+")
_PR_SET_PDEATHSIG = 1
_MIN_POOL_THREADS = 64
_POLL_S = 0.01


def child_environment(
    devices: int, rank: int, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of one rank.

    Args:
      devices: JAX devices of the process.
      rank: the rank's number among the ranks of this machine.
      base: what to start from; `os.environ` when None. Variables that the user
        has set are kept, except those that state the number of CPU devices.
    """
    env = dict(os.environ if base is None else base)
    env.setdefault("JAX_PLATFORMS", "cpu")
    env["JAX_NUM_CPU_DEVICES"] = str(devices)
    if "XLA_FLAGS" in env:
        # JAX refuses to start when both ways to set the number are used.
        env["XLA_FLAGS"] = _DEVICE_COUNT_FLAG.sub("", env["XLA_FLAGS"]).strip()
    # XLA's CPU pool must be wider than the devices, or programs with several
    # collectives in flight hang (jax 0.10: even pure psum).
    threads = str(max(os.cpu_count() or 1, 4 * devices, _MIN_POOL_THREADS))
    env["NPROC"] = env.get("PJRT_NPROC") or env.get("NPROC") or threads
    env["PJRT_NPROC"] = env["NPROC"]
    if env["JAX_PLATFORMS"].split(",")[0] != "cpu":
        # Without this every process would claim every accelerator.
        first = rank * devices
        env["JAX_LOCAL_DEVICE_IDS"] = ",".join(
            str(i) for i in range(first, first + devices)
        )
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONFAULTHANDLER"] = "1"
    return env


def platform_note(
    environment: Mapping[str, str], gpus: Path = Path("/proc/driver/nvidia/gpus")
) -> str:
    """What to say where ranks run on CPUs though there are GPUs, or an empty string."""
    if "JAX_PLATFORMS" in environment or not gpus.is_dir() or not any(gpus.iterdir()):
        return ""
    return (
        "jaxfabric run: the ranks use CPU devices; for this machine's GPUs set "
        "JAX_PLATFORMS=cuda (and JAX_PLATFORMS=cpu not to be told)"
    )


class LocalPort:
    """A free TCP port, kept from other programs until `close`.

    The socket is bound and never listens. gRPC binds with SO_REUSEPORT, so JAX's
    coordinator can still listen there and gets all connections.
    """

    def __init__(self, interface: str = "127.0.0.1") -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind((interface, 0))
        self.number: int = self._socket.getsockname()[1]
        self._interface = interface

    @property
    def address(self) -> str:
        """`INTERFACE:PORT`."""
        return f"{self._interface}:{self.number}"

    def __enter__(self) -> LocalPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the port back."""
        self._socket.close()


def start(
    arguments: Sequence[str],
    env: Mapping[str, str],
    *,
    pass_fds: Iterable[int] = (),
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    cwd: str | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a Python process in its own process group, without a stdin."""
    return subprocess.Popen(
        [sys.executable, "-P", *arguments],
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=tuple(pass_fds),
        process_group=0,
        cwd=cwd,
    )


def die_with_parent(parent_pid: int) -> None:
    """Lets the kernel kill this process when its parent dies (Linux).

    Called by the child itself: a `preexec_fn` is unsafe in a parent with threads.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


def signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to the process and what it started; a dead one is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def kill_all(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Kills the processes and their groups and reaps them."""
    alive = list(processes)
    for process in alive:
        signal_group(process, signal.SIGKILL)
    for process in alive:
        process.wait()


def wait_all(
    processes: Iterable[subprocess.Popen[bytes]], timeout_s: float
) -> list[subprocess.Popen[bytes]]:
    """Waits for the processes to end; returns those still running after timeout_s."""
    deadline = time.monotonic() + timeout_s
    running = list(processes)
    while running and time.monotonic() < deadline:
        running = [p for p in running if p.poll() is None]
        if running:
            time.sleep(_POLL_S)
    return running


def describe_exit(returncode: int) -> str:
    """`exit code 3`, or the name of the signal that ended the process."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"
