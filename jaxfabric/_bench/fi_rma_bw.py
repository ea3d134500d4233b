"""libfabric's own benchmark, `fi_rma_bw` of fabtests, as a subject."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

from .tool_pair import ToolPair


@dataclasses.dataclass(kw_only=True)
class FiRmaBw(ToolPair):
    """Done when the target has the bytes.

    Attributes:
      provider: libfabric's, as in "tcp".
    """

    tool: ClassVar[str] = "fi_rma_bw"
    package: ClassVar[str] = "libfabric's fabtests"
    provider: str

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.tool} {self.provider}"

    def command(self, size: int, count: int, window: int, port: int) -> list[str]:
        """See `ToolPair`."""
        words = ["-p", self.provider, "-e", "rdm", "-o", "writedata", "-U"]
        # Asleep while it waits: two that spin starve each other on few cores.
        words += ["-c", "sread"]
        words += ["-S", str(size), "-I", str(count), "-W", str(window)]
        return [*words, "-w", str(min(count, 16)), f"-E={port}"]

    def seconds_per_write(self, output: str, size: int) -> float | None:
        """The column usec/xfer of what the tool printed."""
        found = re.findall(r"^\S+ +\S+ +\S+ +[\d.]+s +[\d.]+ +([\d.]+) ", output, re.M)
        return float(found[-1]) / 1e6 if found and float(found[-1]) > 0 else None
