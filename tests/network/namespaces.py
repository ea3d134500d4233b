"""Two network namespaces joined by rate-limited links: two hosts with N NICs each.

    with two_hosts(["1gbit", "250mbit"]) as hosts:
        subprocess.Popen(hosts.command(0, ["ping", hosts.address(1, link=0)]))
        hosts.set_link(1, up=False)

The links are veth pairs, limited at both ends by a token bucket. Data pass the
kernel's own TCP; what this cannot show is loss, delay or the speed of a NIC.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

HOSTS = 2
MTU = 9000
COMMAND_TIMEOUT_S = 20
# Enough for one jumbo frame at the highest rate used here, and a queue that is
# short enough for TCP to notice a full link soon.
BURST = "256kb"
QUEUE_LATENCY = "5ms"

# Own /dev/shm, own name, and an address that the name stands for (Gloo asks for it).
OWN_MACHINE = """
name=$1 address=$2; shift 2
mount -t tmpfs shm /dev/shm && hostname "$name" || exit
printf '127.0.0.1 localhost\\n%s %s\\n' "$address" "$name" >/dev/shm/hosts &&
mount --bind /dev/shm/hosts /etc/hosts && rm /dev/shm/hosts || exit
exec "$@"
"""


def _inside(name: str, command: Sequence[str]) -> list[str]:
    """A command line in a network namespace.

    `ip netns exec` and `ip -n` also remount /sys, which a chroot does not let them.
    """
    return ["nsenter", f"--net=/run/netns/{name}", "--", *command]


def _run(command: Sequence[str]) -> str:
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    if run.returncode != 0:
        raise OSError(f"{' '.join(command)}: {run.stderr.strip() or run.returncode}")
    return run.stdout


def _run_in(name: str, *command: str) -> str:
    return _run(_inside(name, command))


@functools.cache
def _propagation() -> str:
    """How a host that is a machine of its own gets its mounts.

    In a chroot, whose root is no mount point, none can be made private.
    """
    private = ["unshare", "--mount", "--propagation=private", "true"]
    made = subprocess.run(private, capture_output=True, timeout=COMMAND_TIMEOUT_S)
    return "private" if made.returncode == 0 else "unchanged"


def why_not(*, own_machine: bool = False) -> str | None:
    """A sentence on why there can be no hosts here, or None.

    Args:
        own_machine: whether commands are to run as on machines of their own.
    """
    for tool, package in (
        *(("ip", "iproute2"), ("tc", "iproute2")),
        *(("nsenter", "util-linux"), ("unshare", "util-linux")),
    ):
        if shutil.which(tool) is None:
            return f"no `{tool}` (package {package})"
    try:
        with two_hosts(["1gbit"]) as hosts:
            _run(hosts.command(0, ["true"], own_machine=own_machine))
    except OSError as error:
        return f"no network namespaces, which need CAP_NET_ADMIN: {error}"
    return None


@dataclass(frozen=True)
class Hosts:
    """Two namespaces; link k joins 10.99.k.1 of host 0 and 10.99.k.2 of host 1."""

    names: tuple[str, str]
    links: int

    def address(self, host: int, link: int) -> str:
        """The IP address of a host on a link."""
        return f"10.99.{link}.{host + 1}"

    def addresses(self, host: int) -> list[str]:
        """A host's addresses, by link."""
        return [self.address(host, link) for link in range(self.links)]

    def device(self, host: int, link: int) -> str:
        """The name of a host's end of a link."""
        return f"{self.names[host]}{link}"

    def command(
        self, host: int, command: Sequence[str], *, own_machine: bool = False
    ) -> list[str]:
        """The command line that runs `command` on a host.

        Args:
            host: 0 or 1.
            command: the program and its arguments.
            own_machine: hides /dev/shm and the machine's name, too, as if the host
                were another machine.
        """
        if own_machine:
            name, address = self.names[host], self.address(host, 0)
            own = ["unshare", "--uts", "--mount", f"--propagation={_propagation()}"]
            command = [*own, "sh", "-c", OWN_MACHINE, "sh", name, address, *command]
        return _inside(self.names[host], command)

    def set_link(self, link: int, *, up: bool) -> None:
        """Takes both ends of a link down, or up again."""
        for host, name in enumerate(self.names):
            state = "up" if up else "down"
            _run_in(name, "ip", "link", "set", self.device(host, link), state)

    def set_rate(self, link: int, rate: str) -> None:
        """Limits both directions of a link, as in "1gbit"."""
        limit = ["root", "tbf", "rate", rate, "burst", BURST, "latency", QUEUE_LATENCY]
        for host, name in enumerate(self.names):
            device = self.device(host, link)
            _run_in(name, "tc", "qdisc", "replace", "dev", device, *limit)

    def wait_for_carrier(self, link: int) -> None:
        """Waits until both ends of a link that is up say so.

        The kernel tells up to a second late, and programs skip an interface
        without carrier.
        """
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        for host, name in enumerate(self.names):
            device = self.device(host, link)
            while "LOWER_UP" not in _run_in(name, "ip", "link", "show", "dev", device):
                if time.monotonic() > deadline:
                    raise OSError(f"{device}: no carrier in {COMMAND_TIMEOUT_S} s")
                time.sleep(0.02)

    def _add_link(self, link: int) -> None:
        ends = [self.device(host, link) for host in range(HOSTS)]
        left, right = self.names
        end = ["ip", "link", "add", ends[0], "netns", left]
        _run([*end, "type", "veth", "peer", "name", ends[1], "netns", right])
        for host, name in enumerate(self.names):
            address = f"{self.address(host, link)}/24"
            _run_in(name, "ip", "addr", "add", address, "dev", ends[host])
            _run_in(name, "ip", "link", "set", ends[host], "mtu", str(MTU), "up")


@contextlib.contextmanager
def two_hosts(rates: Sequence[str | None]) -> Iterator[Hosts]:
    """Makes two hosts with one link for each rate (None: unlimited).

    Raises:
        OSError: a command failed; its text says which.
    """
    names = (f"jf{os.getpid()}a", f"jf{os.getpid()}b")
    hosts = Hosts(names, len(rates))
    made = []
    try:
        for name in names:
            _run(["ip", "netns", "add", name])
            made.append(name)
            _run_in(name, "ip", "link", "set", "lo", "up")
        for link, rate in enumerate(rates):
            hosts._add_link(link)
            if rate is not None:
                hosts.set_rate(link, rate)
        for link in range(hosts.links):
            hosts.wait_for_carrier(link)
        yield hosts
    finally:
        for name in made:
            with contextlib.suppress(OSError):
                _run(["ip", "netns", "del", name])
