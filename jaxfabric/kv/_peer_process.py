"""Whether a peer's process has ended, where that can be seen for certain."""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """What a process of the same host needs in order to watch this one."""
    try:
        return {
            "pid": os.getpid(),
            "namespace": os.readlink("/proc/self/ns/pid"),
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        }
    except OSError:
        return {"pid": os.getpid(), "namespace": "", "boot": ""}


class PeerProcess:
    """Watches the process that a peer says it is, if that can be seen from here.

    The peer lives when this is made: should it end meanwhile and its number go to
    another process, then waiting for that one is merely waiting for too long.
    """

    def __init__(self, said: Mapping[str, Any]) -> None:
        self._fd = -1
        ours = this_process()
        same = all(said.get(key) == ours[key] != "" for key in ("namespace", "boot"))
        pid = said.get("pid")
        if same and type(pid) is int and 0 < pid < 1 << 31:
            try:
                self._fd = os.pidfd_open(pid)
            except OSError:
                self._fd = -1

    def ended(self) -> bool:
        """Whether it has certainly ended."""
        if self._fd < 0:
            return False
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Stops watching."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
