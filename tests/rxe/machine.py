"""Virtual machines that run one command each, in qemu."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import CannotRun, initramfs
from .kernel import Kernel

QEMU = "qemu-system-x86_64"
GUEST = Path(__file__).with_name("guest.sh")
RAILS_MAX = 4
# What the command finds in its environment.
RAILS_VARIABLE = "RXE_RAILS"
HOSTS_VARIABLE = "RXE_HOSTS"
ACCELERATOR_VARIABLE = "RXE_ACCELERATOR"
CONSOLE_LINES = 20  # of a guest that failed, shown
CPU = {"tcg": "max", "icount": "max", "kvm": "host"}
# Translated code is kept: Python and XLA are large.
ACCELERATOR = {
    "tcg": ("-accel", "tcg,thread=multi,tb-size=512"),
    "icount": ("-accel", "tcg,thread=single,tb-size=512", "-icount", "shift=2"),
    "kvm": ("-accel", "kvm"),
}

BENCH_FAILED = 125  # exit statuses beside the command's own, as `timeout` has them
TIMED_OUT = 124


@dataclass(frozen=True)
class Machine:
    """What a virtual machine is like.

    Attributes:
      rails: soft-RoCE devices, rxe0 on nic0 and so on; 1 to 4.
      cpus: virtual ones. Emulated ones cost more the more they are: two take twice the
        time of one for the same program, and more on a busy machine.
      memory_mib: which the changes to its file system take from, too.
      accelerator: "tcg" emulates the CPU and works anywhere. With "icount" each of its
        instructions takes 4 ns by the guest's clocks: how busy this machine is does
        not change what is measured. "kvm" is much faster, where a stock kernel comes
        up in it: not on each machine with a /dev/kvm.
    """

    rails: int = 1
    cpus: int = 1
    memory_mib: int = 3072
    accelerator: str = "tcg"


class Guest:
    """A machine that was started; `start` makes it.

    Attributes:
      console: what the kernel and guest.sh said.
    """

    def __init__(self, process: subprocess.Popen[bytes], share: Path) -> None:
        self.process = process
        self.console = share / "console.log"
        self._status = share / "status"

    def wait(self, timeout_s: float) -> int:
        """The command's exit status, TIMED_OUT, or BENCH_FAILED if it has none."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        if not self._status.is_file():
            return BENCH_FAILED
        return int(self._status.read_text())

    def last_words(self) -> str:
        """The end of the console."""
        if not self.console.is_file():
            return ""
        lines = self.console.read_text(errors="replace").replace("\r", "").splitlines()
        return "\n".join(lines[-CONSOLE_LINES:])


@contextlib.contextmanager
def start(
    machine: Machine,
    kernel: Kernel,
    command: Sequence[str],
    *,
    host: int = 0,
    cables: Sequence[socket.socket] = (),
) -> Iterator[Guest]:
    """Boots a machine that runs the command, with this process's environment.

    The command sees this machine's files, in the same folder; what it writes is
    gone with the guest. Its output comes on this process's stdout.

    Args:
      host: 0 or 1; its address on rail k is 10.77.k.(host + 1).
      cables: one for each rail, and one more; ends of socket pairs whose other ends
        another guest has. None: devices that reach nobody but themselves.

    Raises:
      CannotRun: a program is missing.
    """
    for program, package in ((QEMU, "qemu-system-x86"), ("setpriv", "util-linux")):
        if shutil.which(program) is None:
            raise CannotRun(f"no `{program}` on PATH (package {package})")
    with tempfile.TemporaryDirectory(prefix="rxe-") as folder:
        share = Path(folder)
        shutil.copy(GUEST, share)
        (share / "initramfs").write_bytes(initramfs.build(kernel))
        (share / "settings.sh").write_text(
            _settings(machine, kernel, command, host=host, cabled=bool(cables))
        )
        process = subprocess.Popen(
            _qemu(machine, kernel, share, host, cables),
            stdin=subprocess.DEVNULL,
            pass_fds=[cable.fileno() for cable in cables],
        )
        try:
            yield Guest(process, share)
        finally:
            process.kill()
            process.wait()


def _settings(
    machine: Machine,
    kernel: Kernel,
    command: Sequence[str],
    *,
    host: int,
    cabled: bool,
) -> str:
    """What guest.sh sources."""
    lines = [
        f"modules={shlex.quote(str(kernel.modules))}",
        f"version={kernel.version}",
        f"rails={machine.rails}",
        f"host={host}",
        f"cabled={int(cabled)}",
    ]
    lines += [
        f"export {name}={shlex.quote(value)}"
        for name, value in os.environ.items()
        if name.isidentifier()
    ]
    lines += [f"export {RAILS_VARIABLE}={machine.rails} {HOSTS_VARIABLE}={1 + cabled}"]
    lines += [f"export {ACCELERATOR_VARIABLE}={machine.accelerator}"]
    run = f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}"
    return "\n".join([*lines, f"run_command() {{ {run}; }}", ""])


def _qemu(
    machine: Machine,
    kernel: Kernel,
    share: Path,
    host: int,
    cables: Sequence[socket.socket],
) -> list[str]:
    words = ["setpriv", "--pdeathsig", "KILL"]  # no guest outlives this process
    words += [QEMU, "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]
    words += ["-M", "q35", *ACCELERATOR[machine.accelerator]]
    words += ["-cpu", CPU[machine.accelerator], "-smp", str(machine.cpus)]
    words += ["-m", str(machine.memory_mib), "-device", "virtio-rng-pci"]
    words += ["-kernel", str(kernel.image), "-initrd", str(share / "initramfs")]
    # On a busy machine an emulated timer does not tick as the kernel's check wants.
    parameters = "quiet loglevel=3 panic=-1 mitigations=off no_timer_check"
    words += ["-append", f"console=ttyS0 {parameters} rdinit=/init"]
    words += ["-serial", f"file:{share / 'console.log'}", "-serial", "stdio"]
    for tag, path, more in (
        ("host", Path("/"), ",readonly=on,multidevs=remap"),
        ("bench", share, ""),
    ):
        words += ["-fsdev", f"local,id={tag},path={path},security_model=none{more}"]
        words += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    for number, cable in enumerate(cables):
        words += ["-netdev", f"socket,id=cable{number},fd={cable.fileno()}"]
        address = f"52:54:00:00:0{number}:0{host + 1}"
        words += ["-device", f"virtio-net-pci,netdev=cable{number},mac={address}"]
    return words


def time_left(deadline: float) -> float:
    """Seconds until time.monotonic() is `deadline`."""
    return max(0.0, deadline - time.monotonic())
