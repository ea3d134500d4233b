"""What `bench moe` measures: sizes, routes, and the bytes that must move."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

ROUTINGS = ("uniform", "skewed")
WIRES = ("bf16", "e4m3")
# One rank's tokens: steps of decoding up to here, of prefill above.
DECODE_MOST = 512
SCALE_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of one model.

    Attributes:
      tokens: of each rank.
      routing: "uniform", or "skewed": expert e is chosen in proportion to
        (rank of e in popularity)^-skew.
    """

    tokens: int
    routing: str
    ranks: int
    hidden: int = 7168
    experts: int = 256
    top_k: int = 8
    skew: float = 1.0

    @property
    def phase(self) -> str:
        """ "decode" or "prefill"."""
        return "decode" if self.tokens <= DECODE_MOST else "prefill"

    @property
    def label(self) -> str:
        """As in "decode, 128 tokens, uniform"."""
        return f"{self.phase}, {self.tokens} tokens, {self.routing}"

    def row_bytes(self, wire: str) -> int:
        """Of one row as it travels."""
        if wire == "bf16":
            return 2 * self.hidden
        return self.hidden + 4 * -(-self.hidden // SCALE_BLOCK)

    def ids(self) -> np.ndarray:
        """Experts of all ranks' tokens, int32[ranks * tokens, top_k]; none twice.

        The same in every process. The largest of keys that are distributed as Gumbel's
        are a draw without replacement.
        """
        rng = np.random.default_rng((self.tokens, ROUTINGS.index(self.routing)))
        keys = rng.gumbel(size=(self.ranks * self.tokens, self.experts))
        if self.routing == "skewed":
            popularity = np.arange(1, self.experts + 1, dtype=float) ** -self.skew
            keys += np.log(rng.permutation(popularity))
        chosen = np.argpartition(-keys, self.top_k - 1, axis=1)[:, : self.top_k]
        return chosen.astype(np.int32)

    def load(self) -> Load:
        """What the routes come to."""
        return Load.of(self)


@dataclasses.dataclass(frozen=True)
class Load:
    """Rows that travel.

    Attributes:
      counts: int64[ranks, ranks], rows from each rank to each, once per rank.
      imbalance: the busiest expert's rows over the mean.
    """

    counts: np.ndarray
    imbalance: float

    @classmethod
    @functools.lru_cache(maxsize=4)
    def of(cls, case: Case) -> Load:
        """Counts the routes of a case."""
        ids = case.ids()
        owners = (ids // (case.experts // case.ranks)).reshape(
            case.ranks, -1, case.top_k
        )
        counts = np.zeros((case.ranks, case.ranks), np.int64)
        for rank in range(case.ranks):
            counts[:, rank] = (owners == rank).any(2).sum(1)
        rows = np.bincount(ids.ravel(), minlength=case.experts)
        return cls(counts, float(rows.max() / rows.mean()))

    @property
    def sent(self) -> int:
        """Rows that the busiest rank sends or receives, its own included."""
        return int(max(self.counts.sum(0).max(), self.counts.sum(1).max()))

    @property
    def remote(self) -> int:
        """The same without those that stay."""
        away = self.counts * (1 - np.eye(len(self.counts), dtype=np.int64))
        return int(max(away.sum(0).max(), away.sum(1).max()))


def message_bytes(case: Case) -> int:
    """Room that the largest message between two ranks needs."""
    local = case.experts // case.ranks
    slots = min(case.top_k, local)
    rows = case.tokens * (8 + 12 * slots + 2 * case.hidden)
    # GPUs send 512 bytes for 480.
    return (1 << 20) + rows * 23 // 20


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of one subject in one case, or the reason why there are none.

    Attributes:
      role: "ours" or "peer".
      what: "dispatch", "combine", "pair" or "exchange" (rows only, one way).
      wire: what rows travel as.
      p50_us: microseconds of a call, of the slowest rank in each iteration.
      p99_us: likewise; ``None`` of fewer than 100 iterations.
      floor_us: time of the bytes that must move, as the floor was measured.
    """

    case: Case
    subject: str
    role: str
    what: str
    wire: str
    p50_us: float | None = None
    p99_us: float | None = None
    iterations: int = 0
    floor_us: float | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Flat, for the report and for `from_json`."""
        return {
            **dataclasses.asdict(self.case),
            **{
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(self)
                if field.name != "case"
            },
            "phase": self.case.phase,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Row:
        """The inverse of `to_json`."""
        found = dict(found)
        found.pop("phase")
        names = [field.name for field in dataclasses.fields(Case)]
        case = Case(**{name: found.pop(name) for name in names})
        return cls(case, **found)
