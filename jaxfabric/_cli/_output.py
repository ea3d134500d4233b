"""The lines of several ranks on one screen."""

from __future__ import annotations

import collections
import os
import sys

# A rank that writes no newline is printed in pieces of this size.
_MAX_LINE_BYTES = 1 << 16
_TAIL_LINES = 60
_CLEAR_LINE = b"\r\x1b[K"


class RankLines:
    """Turns the bytes of one stream of a rank into prefixed whole lines.

    A carriage return starts a line anew, as on a screen: of a progress bar only
    its last state is printed, once its line ends.

    Args:
      rank: number in the prefix.
      descriptor: where the lines go (1 or 2).
      over_bar: a progress bar of rank 0 may stand on the terminal's last line;
        each line then clears it first (the bar draws itself again).
    """

    def __init__(self, rank: int, descriptor: int, *, over_bar: bool) -> None:
        self._prefix = (_CLEAR_LINE if over_bar else b"") + f"[{rank}] ".encode()
        self._descriptor = descriptor
        self._partial = b""
        self.tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)

    def feed(self, data: bytes) -> None:
        """Prints the lines that `data` completes."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > _MAX_LINE_BYTES:
            lines.append(self._partial)
            self._partial = b""
        self._print(lines)

    def close(self) -> None:
        """Prints an unfinished last line."""
        if self._partial:
            self._print([self._partial])
            self._partial = b""

    def _print(self, lines: list[bytes]) -> None:
        shown = [line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines]
        self.tail.extend(line.decode(errors="replace") for line in shown)
        write(self._descriptor, b"".join(self._prefix + line + b"\n" for line in shown))


def write(descriptor: int, data: bytes) -> None:
    """Writes all of `data`; past the buffers of `sys.stdout`."""
    while data:
        data = data[os.write(descriptor, data) :]


def is_screen() -> bool:
    """Whether stdout and stderr are terminals."""
    return sys.stdout.isatty() and sys.stderr.isatty()
