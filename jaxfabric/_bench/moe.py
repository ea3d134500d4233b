"""`jaxfabric bench moe`: settings, and the ranks that measure."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
from typing import Any

from .moe_case import DECODE_MOST, Case, Row

# What `--subjects` chooses from; see moe_programs for what they do.
SUBJECTS = (
    "dispatch",
    "dispatch, zero_tail=True",
    "dispatch, expand=False",
    "dispatch, e4m3",
    "dispatch, e4m3, expand=False, dequantize=False",
    "combine",
    "combine, expand=False",
    "pair",
    "pair, e4m3",
    "lax.all_to_all by hand",
    "lax.all_to_all",
    "lax.ragged_all_to_all",
)
DECODE = (1, 8, 32, 128, 512)
PREFILL = (1024, 4096, 16384)
# A host's memory and patience end earlier than a GPU's.
CPU_TOKENS = (1, 8, 32, 128, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      tokens: of each rank, one step for each number.
      seconds: for each figure; `iterations` at most.
      decode_length: calls in the chain that is one iteration, up to 512 tokens.
      prefill_length: the same above.
      queued: programs follow each other without the host in between, as the steps of
        a model do, so that what launching them costs the host does not show.
      transport: of jf.Fabric; ``None`` is its own choice.
    """

    tokens: tuple[int, ...]
    routings: tuple[str, ...] = ("uniform", "skewed")
    subjects: tuple[str, ...] = SUBJECTS
    hidden: int = 7168
    experts: int = 256
    top_k: int = 8
    skew: float = 1.0
    seconds: float = 2.0
    iterations: int = 200
    decode_length: int = 50
    prefill_length: int = 20
    queued: bool = False
    transport: str | None = None

    def length(self, tokens: int) -> int:
        """Calls in one iteration."""
        return self.decode_length if tokens <= DECODE_MOST else self.prefill_length

    def case(self, tokens: int, routing: str, ranks: int) -> Case:
        """One step."""
        return Case(
            tokens=tokens,
            routing=routing,
            ranks=ranks,
            hidden=self.hidden,
            experts=self.experts,
            top_k=self.top_k,
            skew=self.skew,
        )

    def check(self, ranks: int) -> None:
        """Raises ValueError if there is no such model on so many ranks."""
        if self.experts % ranks:
            raise ValueError(
                f"{self.experts} experts do not divide by {ranks} ranks; change "
                "--experts or -n"
            )
        if self.top_k > self.experts:
            raise ValueError(f"--top-k {self.top_k} of {self.experts} experts")

    def quick(self) -> Settings:
        """As little as shows that everything works."""
        return dataclasses.replace(
            self,
            tokens=tuple(t for t in self.tokens if t <= 64) or (4,),
            hidden=256,
            experts=16,
            top_k=4,
            seconds=0.05,
            decode_length=3,
            prefill_length=2,
        )

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Settings:
        """The inverse of `dataclasses.asdict`."""
        for name, value in found.items():
            if isinstance(value, list):
                found = {**found, name: tuple(value)}
        return cls(**found)


def default_tokens(on_cpu: bool) -> tuple[int, ...]:
    """From one token to as many as the platform's memory allows."""
    return CPU_TOKENS if on_cpu else DECODE + PREFILL


def gpu_count() -> int:
    """NVIDIA GPUs of this machine, without waking a driver."""
    return len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))


def run(
    settings: Settings,
    *,
    processes: int,
    devices_per_process: int,
    json_file: pathlib.Path | None = None,
) -> tuple[int, dict[str, Any] | None]:
    """Starts the ranks; the exit code, and what rank 0 found.

    Rank 0 writes ``json_file`` after each size, so that a run that is ended early
    leaves what it has.
    """
    from jaxfabric._cli import _run

    with tempfile.TemporaryDirectory() as folder:
        out = json_file or pathlib.Path(folder) / "moe.json"
        out.unlink(missing_ok=True)
        asked = dataclasses.asdict(settings)
        script = pathlib.Path(__file__).with_name("moe_rank.py")
        code = _run.run(
            _run.Job(
                script=str(script),
                script_args=(json.dumps(asked), str(out.resolve())),
                processes=processes,
                devices_per_process=devices_per_process,
            )
        )
        return code, json.loads(out.read_text()) if out.is_file() else None


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The rows of a result."""
    return [Row.from_json(found) for found in result["rows"]]
