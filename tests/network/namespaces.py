"""Two network namespaces joined by rate-limited links: two hosts with N NICs each.

    with two_hosts(["1gbit", "250mbit"]) as hosts:
        subprocess.Popen(hosts.command(0, ["ping", hosts.address(1, link=0)]))
        hosts.set_link(1, up=False)

The links are veth pairs, limited at both ends by a token bucket. Data pass the
kernel's own TCP; what this cannot show is loss, delay or the speed of a NIC.
"""

from __future__ import annotations

import contextlib
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

# Own /dev/shm, own name, and an address that the name stands for (Gloo asks for
# it). `ip netns exec` has unshared the mounts already.
OWN_MACHINE = """
name=$1 address=$2; shift 2
mount -t tmpfs shm /dev/shm && hostname "$name" || exit
printf '127.0.0.1 localhost\\n%s %s\\n' "$address" "$name" >/dev/shm/hosts &&
mount --bind /dev/shm/hosts /etc/hosts && rm /dev/shm/hosts || exit
exec "$@"
"""


def _ip(*arguments: str, tool: str = "ip") -> str:
    run = subprocess.run(
        [tool, *arguments], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    if run.returncode != 0:
        command = " ".join([tool, *arguments])
        raise OSError(f"{command}: {run.stderr.strip() or run.returncode}")
    return run.stdout


def why_not() -> str | None:
    """A sentence on why there can be no namespaces here, or None."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"no `{tool}` (package iproute2)"
    probe = f"jf{os.getpid()}p"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "del", probe)
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
            script = ["sh", "-c", OWN_MACHINE, "sh", name, address]
            command = ["unshare", "--uts", *script, *command]
        return ["ip", "netns", "exec", self.names[host], *command]

    def set_link(self, link: int, *, up: bool) -> None:
        """Takes both ends of a link down, or up again."""
        for host, name in enumerate(self.names):
            state = "up" if up else "down"
            _ip("-n", name, "link", "set", self.device(host, link), state)

    def set_rate(self, link: int, rate: str) -> None:
        """Limits both directions of a link, as in "1gbit"."""
        limit = ["root", "tbf", "rate", rate, "burst", BURST, "latency", QUEUE_LATENCY]
        for host, name in enumerate(self.names):
            device = self.device(host, link)
            _ip("-n", name, "qdisc", "replace", "dev", device, *limit, tool="tc")

    def wait_for_carrier(self, link: int) -> None:
        """Waits until both ends of a link that is up say so.

        The kernel tells up to a second late, and programs skip an interface
        without carrier.
        """
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        for host, name in enumerate(self.names):
            device = self.device(host, link)
            while "LOWER_UP" not in _ip("-n", name, "link", "show", "dev", device):
                if time.monotonic() > deadline:
                    raise OSError(f"{device}: no carrier in {COMMAND_TIMEOUT_S} s")
                time.sleep(0.02)

    def _add_link(self, link: int) -> None:
        ends = [self.device(host, link) for host in range(HOSTS)]
        left, right = self.names
        _ip(
            *("link", "add", ends[0], "netns", left),
            *("type", "veth", "peer", "name", ends[1], "netns", right),
        )
        for host, name in enumerate(self.names):
            address = f"{self.address(host, link)}/24"
            _ip("-n", name, "addr", "add", address, "dev", ends[host])
            _ip("-n", name, "link", "set", ends[host], "mtu", str(MTU), "up")


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
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
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
                _ip("netns", "del", name)
