"""The benchmark of RDMA itself, `ib_write_bw` of perftest, as a subject."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

from .tool_pair import ToolPair

_MIB = 1 << 20  # its "MB"
# 2**16 * 4.096 us, as ours: with its own 14 it sends again what a busy machine has
# only delayed.
_TIMEOUT = 16


@dataclasses.dataclass(kw_only=True)
class IbWriteBw(ToolPair):
    """Done when the target's NIC has acknowledged the bytes.

    Attributes:
      device: of libibverbs, as in "mlx5_0"; None is its first one.
    """

    tool: ClassVar[str] = "ib_write_bw"
    package: ClassVar[str] = "perftest"
    device: str | None = None

    def command(self, size: int, count: int, window: int, port: int) -> list[str]:
        """See `ToolPair`."""
        words = ["-d", self.device] if self.device else []
        # -F: a clock that changes its rate is no reason to refuse.
        words += ["-F", "--output=bandwidth", "-p", str(port)]
        words += ["-u", str(_TIMEOUT)]
        return [*words, "-s", str(size), "-n", str(count), "-t", str(window)]

    def seconds_per_write(self, output: str, size: int) -> float | None:
        """The average, which is all that it prints."""
        found = re.fullmatch(r"\s*([\d.]+)\s*", output)
        return size / (float(found[1]) * _MIB) if found and float(found[1]) else None
