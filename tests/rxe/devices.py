"""What a guest's tests do to its soft-RoCE devices."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import HOSTS_VARIABLE, RAILS_VARIABLE

NO_GUEST = "no soft-RoCE: python -m tests.rxe -- pytest tests/rxe"
COMMAND_TIMEOUT_S = 20
PING = "ibv_rc_pingpong"
PING_TIMEOUT_S = 30
# A bad network, in one direction of a cable.
LOSS = ("loss", "0.5%", "reorder", "5%", "delay", "1ms")


def tool(*command: str) -> str:
    """What the command prints.

    Raises:
      OSError: it failed; the text says why.
    """
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    if run.returncode:
        raise OSError(f"{' '.join(command)}: {run.stderr.strip() or run.returncode}")
    return run.stdout


def rails() -> list[str]:
    """The devices that the guest was started with; none outside of a guest."""
    return [f"rxe{rail}" for rail in range(int(os.environ.get(RAILS_VARIABLE, 0)))]


def hosts() -> int:
    """Guests that run; 0 outside of them."""
    return int(os.environ.get(HOSTS_VARIABLE, 0))


def queue_pairs(device: str, how: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Those that processes have open on a device, as `rdma resource` shows them.

    Args:
      how: a command to run programs by, as of the other guest.
    """
    query = ("rdma", "-j", "resource", "show", "qp", "link", device)
    try:
        found = json.loads(tool(*how, *query))
    except OSError as error:
        if "Wrong device name" in str(error):
            return []  # it is unplugged
        raise
    return [pair for pair in found if "pid" in pair]  # not the kernel's own


def packets_lost(interface: str) -> int:
    """How many the interface's queue discipline has dropped."""
    found = json.loads(tool("tc", "-s", "-j", "qdisc", "show", "dev", interface))
    return sum(queue["drops"] for queue in found)


def disturb(interface: str, *netem: str) -> None:
    """Loses, delays or reorders what the interface sends; see tc-netem(8)."""
    tool("tc", "qdisc", "replace", "dev", interface, "root", "netem", *netem)


def gid_index(device: str) -> int:
    """Which of the device's GIDs is its interface's IPv4 address."""
    folder = Path("/sys/class/infiniband") / device / "ports/1/gids"
    for index in range(len(list(folder.iterdir()))):
        if ":ffff:" in (folder / str(index)).read_text():
            return index
    raise OSError(f"{device} has no GID of an IPv4 address")


def add_device(device: str, interface: str) -> None:
    """Makes a soft-RoCE device on a network interface."""
    tool("rdma", "link", "add", device, "type", "rxe", "netdev", interface)


@contextlib.contextmanager
def pluggable(rail: str) -> Iterator[Callable[[], None]]:
    """Yields what takes a rail away under those who use it; nobody may at the end.

    Soft-RoCE takes no device from a process: its port goes down at once, and the
    device is deleted when the last one has closed it.
    """
    interface = rail.replace("rxe", "nic")
    deletions = []

    def unplug() -> None:
        tool("ip", "link", "set", interface, "down")
        deletions.append(subprocess.Popen(["rdma", "link", "delete", rail]))

    yield unplug
    for deletion in deletions:
        code = deletion.wait(COMMAND_TIMEOUT_S)  # longer: somebody has it open
        assert code == 0, f"rdma link delete {rail}: exit status {code}"
        tool("ip", "link", "set", interface, "up")
        add_device(rail, interface)


def ping(ends: Sequence[Sequence[str]], server: str, messages: int) -> None:
    """Exchanges messages of 4 KiB and checks them, by rdma-core's own program.

    Args:
      ends: for each end a command to run the program by, and its device.
      server: address at which the first end's program can be connected to.
      messages: in each direction.

    Raises:
      OSError: it failed, or took too long.
    """
    commands = [
        [*how, PING, "-c", "-d", device, "-g", str(gid_index(device))]
        for *how, device in ends
    ]
    commands = [[*command, "-n", str(messages)] for command in commands]
    deadline = time.monotonic() + PING_TIMEOUT_S
    with running(commands[0]):
        while True:
            try:
                tool(*commands[1], server)
                return
            except OSError as error:  # it may not listen yet
                refused = "Couldn't connect" in str(error)
                if not refused or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed at the end, and whose output nobody needs."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(met: Callable[[], bool], timeout_s: float = COMMAND_TIMEOUT_S) -> None:
    """Waits, and fails if it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not met():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.05)


@dataclass(frozen=True)
class Cable:
    """Two devices of this guest that reach each other over a virtual cable.

    Unlike a device that talks to itself, whose packets pass no queue discipline.
    """

    devices: tuple[str, str] = ("left", "right")
    interfaces: tuple[str, str] = ("end0", "end1")


@contextlib.contextmanager
def cable() -> Iterator[Cable]:
    """Makes a cable with a device at each end."""
    made = Cable()
    first, second = made.interfaces
    tool("ip", "link", "add", first, "type", "veth", "peer", "name", second)
    try:
        for number, interface in enumerate(made.interfaces, 1):
            # Packets whose sender is this very machine are not martians here.
            for name, value in (("accept_local", "1"), ("rp_filter", "0")):
                setting = Path("/proc/sys/net/ipv4/conf") / interface / name
                setting.write_text(value)
            tool("ip", "address", "add", f"10.79.0.{number}/24", "dev", interface)
            tool("ip", "link", "set", interface, "mtu", "9000", "up")
        for device, interface in zip(made.devices, made.interfaces, strict=True):
            add_device(device, interface)
        yield made
    finally:
        tool("ip", "link", "delete", first)  # and all that is on it
