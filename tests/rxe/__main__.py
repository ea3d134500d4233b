"""Runs a command in a virtual machine that has soft-RoCE devices.

    python -m tests.rxe --rails 2 -- ibv_devinfo
    python -m tests.rxe --hosts 2 -- pytest tests/rxe/test_two_hosts.py

`python -m tests.rxe.suite` runs all tests.

The guest boots Debian's kernel on this machine's files: programs, virtual
environments and build folders are where they are here, and what is written is gone
afterwards. With --hosts 2 there is a second guest at the other ends of the rails;
the command can run programs on it by `tests/rxe/remote.py`.

Exit status: the command's; 77 if this machine cannot do it, with the reason in the
last line; 124 if time ran out; 125 if a guest did not come up.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import sys
import time
from pathlib import Path

from . import CannotRun, kernel, machine, remote
from .machine import BENCH_FAILED, RAILS_MAX, TIMED_OUT, Machine

CACHE = Path(__file__).resolve().parents[2] / "build/ci/rxe"
SKIPPED = 77


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.rxe",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rails", type=int, default=1, choices=range(1, RAILS_MAX + 1))
    add("--hosts", type=int, default=1, choices=(1, 2))
    add("--cpus", type=int, default=1, help="of each guest: emulated, one costs least")
    add("--memory-mib", type=int, default=3072, help="of each guest")
    add("--timeout-s", type=float, default=300, help="for everything")
    add("--accelerator", default="tcg", choices=sorted(machine.ACCELERATOR))
    add("--console", action="store_true", help="show the kernel's messages at the end")
    add("command", nargs="+", help="with its arguments, after --")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit status.

    Raises:
      CannotRun: not on this machine.
    """
    deadline = time.monotonic() + options.timeout_s
    shape = Machine(
        options.rails, options.cpus, options.memory_mib, options.accelerator
    )
    stock = kernel.fetch(CACHE)
    with contextlib.ExitStack() as stack:
        here: list[socket.socket] = []
        there: list[socket.socket] = []
        if options.hosts == 2:
            for _ in range(options.rails + 1):
                ends = socket.socketpair()
                for end, cables in zip(ends, (here, there), strict=True):
                    cables.append(stack.enter_context(end))
            stack.enter_context(
                machine.start(shape, stock, remote.SERVE, host=1, cables=there)
            )
        guest = stack.enter_context(
            machine.start(shape, stock, options.command, cables=here)
        )
        for end in (*here, *there):
            end.close()  # or a guest would not notice that the other has ended
        status = guest.wait(machine.time_left(deadline))
        if options.console or status == BENCH_FAILED:
            print(guest.last_words(), file=sys.stderr)
    return status


def end_in_order() -> None:
    """Makes SIGTERM end this process by way of what ends its guests."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> int:
    """Returns the exit status."""
    end_in_order()
    options = parse(sys.argv[1:])
    try:
        status = run(options)
    except CannotRun as reason:
        print(f"tests.rxe: {reason}", file=sys.stderr)
        return SKIPPED
    if status == TIMED_OUT:
        print(f"tests.rxe: not done in {options.timeout_s:g} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
