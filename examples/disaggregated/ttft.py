"""Time to first token: pages streamed, sent at the end, and no disaggregation at all.

The time from a prompt's arrival at the router until the first token comes back from
it. With disaggregation the decode job makes that token, once all pages and the last
hidden state have come to all of its ranks. Without, the same prefill job does, with
the same program but for the sending. The three take turns, so that whatever else the
machine does meets all of them.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence

import aiohttp
import fleet
import numpy as np

MODES = ("off", "stream", "end")
_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Penalty:
    """What a way to send costs over not sending, as a share of the time.

    Attributes:
      median: of the pairs.
      low, high: 95 % confidence interval of the median, by bootstrap over the pairs.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float], base: Sequence[float]) -> Penalty:
        """From times that were measured in turns."""
        ratios = np.asarray(times) / np.asarray(base) - 1
        rng = np.random.default_rng(0)
        drawn = rng.choice(ratios, (_RESAMPLES, len(ratios)))
        low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
        return cls(float(np.median(ratios)), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:+.1%} (95 %: {self.low:+.1%} to {self.high:+.1%})"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Times to first token of prompts of one length, in seconds, by mode."""

    tokens: int
    seconds: dict[str, list[float]]

    def penalty(self, mode: str, base: str = "off") -> Penalty:
        """Of a mode over another one."""
        return Penalty.of(self.seconds[mode], self.seconds[base])

    def __str__(self) -> str:
        lines = [f"{self.tokens} tokens, {len(self.seconds['off'])} runs of each:"]
        names = {
            "off": "no disaggregation",
            "stream": "streamed by layer",
            "end": "sent at the end",
        }
        for mode in MODES:
            median_ms = 1e3 * float(np.median(self.seconds[mode]))
            line = f"  {names[mode]:18} {median_ms:7.1f} ms"
            if mode != "off":
                line += f"   penalty {self.penalty(mode)}"
            lines.append(line)
        return "\n".join(lines)


async def first_token_s(
    running: fleet.Fleet,
    session: aiohttp.ClientSession,
    prompt: Sequence[int],
    **options: object,
) -> float:
    """One prompt's time to first token."""
    begin = time.perf_counter()
    first = 0.0
    async for _ in running.stream(session, prompt, max_tokens=1, options=options):
        first = first or time.perf_counter() - begin
    return first


async def measure(
    running: fleet.Fleet, text: np.ndarray, *, tokens: int, runs: int
) -> Measured:
    """So many runs of each mode, in turns; the order within a turn is drawn."""
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    async with aiohttp.ClientSession() as session:
        for run in range(-2, runs):  # the first two are not counted
            place = rng.randrange(len(text) - tokens)
            prompt = text[place : place + tokens].tolist()
            for mode in rng.sample(MODES, len(MODES)):
                took = await first_token_s(running, session, prompt, mode=mode)
                if run >= 0:
                    seconds[mode].append(took)
    return Measured(tokens, seconds)
