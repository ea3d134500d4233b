"""One rank of `bench moe`; `moe.run` starts it with the launcher, on every rank.

By itself, `python -m jaxfabric._bench.moe_rank SETTINGS OUT` measures one process with
all its devices. SETTINGS is the JSON of `moe.Settings`; rank 0 writes OUT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

import jaxfabric as jf
from jaxfabric._bench import (
    machine,
    moe_case,
    moe_operands,
    moe_programs,
    nvlink,
    rank_times,
)
from jaxfabric._bench.moe import Settings
from jaxfabric._bench.moe_case import Case, Row
from jaxfabric._bench.moe_operands import AXIS
from jaxfabric._bench.moe_programs import SUBJECTS, Subject

# Of the largest magnitude: sums are rounded to bfloat16 twice, e4m3 rows once more.
_ERROR_MOST = {"bf16": 0.03, "e4m3": 0.08}
_MEMCPY_SECONDS = 0.3


def say(text: str) -> None:
    """One line of progress, from one rank."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


class Floor:
    """What moving bytes costs at least, measured here and now.

    On CPU: memcpy of all rows that a rank sends, in all processes at once. On GPUs: of
    those that leave the GPU, at the rate of copies from GPU to GPU.
    """

    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu = on_cpu
        self.reason = ""
        self.rate: float | None = None
        # Several processes would measure at the same time, and each other.
        if not on_cpu and jax.process_index() == 0:
            try:
                self.rate = nvlink.copy_rate()
            except nvlink.NotMeasured as reason:
                self.reason = f"no NVLink floor: {reason}"

    def describe(self) -> str:
        """In a line."""
        if self.on_cpu:
            return "memcpy of the rows that a rank sends, in all processes at once"
        if self.rate is None:
            return self.reason
        return f"GPU to GPU copies, both ways at once, {self.rate / 1e9:.1f} GB/s each"

    def us(self, case: Case, wire: str) -> float | None:
        """Microseconds of one way. Collective."""
        load = case.load()
        if not self.on_cpu:
            if self.rate is None:
                return None
            return load.remote * case.row_bytes(wire) / self.rate * 1e6
        devices = jax.local_device_count()
        size = max(1, load.sent * case.row_bytes(wire) * devices)
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        times = rank_times.time_for(
            lambda: np.copyto(target, source), seconds=_MEMCPY_SECONDS, most=100
        )
        return times.p50 * 1e6


def check(
    subject: Subject, case: Case, mesh: Any, once: Any, given: dict[str, Any]
) -> str:
    """Why the results of one call are wrong, or nothing. Collective."""
    if subject.what not in ("pair", "exchange"):
        return ""  # the pair's are the same calls
    inputs = [given[name] for name in subject.operands]
    want = inputs[0]
    if subject.what == "exchange":
        if subject.name != "lax.ragged_all_to_all":
            return ""
        want = moe_operands.exchanged_rows(case, mesh)
    got, _ = once(inputs[0] + 0, *inputs[1:])
    error = moe_operands.largest_error(got, want)
    if error <= _ERROR_MOST[subject.wire]:
        return ""
    return f"its results are wrong by {error:.3g}"


class Carried:
    """A program as a call without arguments: the carry goes from one to the next.

    A call returns the mark, which tells that the program has run.
    """

    def __init__(
        self, program: Any, operands: tuple[str, ...], given: dict[str, Any]
    ) -> None:
        self._program = program
        self._carry = given[operands[0]] + 0
        self._rest = [given[name] for name in operands[1:]]

    def __call__(self) -> Any:
        self._carry, mark = self._program(self._carry, *self._rest)
        return mark


def time_calls(
    programs: dict[int, Any],
    operands: tuple[str, ...],
    given: dict[str, Any],
    settings: Settings,
    tokens: int,
) -> rank_times.Times:
    """Seconds of one call in each iteration; programs by length. Collective."""
    length = settings.length(tokens)
    time = rank_times.time_queued if settings.queued else rank_times.time_for
    times = time(
        Carried(programs[length], operands, given),
        seconds=settings.seconds,
        most=settings.iterations,
    )
    return rank_times.Times(times.seconds / length)


def measure(
    subject: Subject,
    case: Case,
    mesh: Any,
    programs: dict[int, Any],
    given: dict[str, Any],
    settings: Settings,
) -> Row:
    """The row of one subject in one case; ``programs`` by their length."""
    row = Row(case, subject.name, subject.role, subject.what, subject.wire)
    if wrong := check(subject, case, mesh, programs[1], given):
        return dataclasses.replace(row, reason=wrong)
    times = time_calls(programs, subject.operands, given, settings, case.tokens)
    count = len(times.seconds)
    return dataclasses.replace(
        row,
        p50_us=times.p50 * 1e6,
        p99_us=times.p99 * 1e6 if count >= rank_times.P99_LEAST else None,
        iterations=count,
    )


def refusal(subject: Subject, on_cpu: bool) -> str:
    """Why a subject cannot run on this platform, or nothing."""
    if on_cpu and subject.name == "lax.ragged_all_to_all":
        return "XLA has none on CPU"
    return ""


def lengths_of(settings: Settings, tokens: int) -> list[int]:
    """Calls in the chains of a size: one, to check it, and those that are timed."""
    return sorted({1, settings.length(tokens)})


def rows_of_tokens(
    tokens: int, mesh: Any, settings: Settings, floor: Floor
) -> Iterator[Row]:
    """All subjects and routings of one size; programs are compiled once."""
    lengths = lengths_of(settings, tokens)
    subjects = [SUBJECTS[name] for name in settings.subjects]
    programs: dict[tuple[str, int], Any] = {}
    for routing in settings.routings:
        began = time.monotonic()
        case = settings.case(tokens, routing, mesh.size)
        floors = {wire: floor.us(case, wire) for wire in moe_case.WIRES}
        given = moe_operands.operands(case, mesh)
        given |= moe_operands.routed(case, mesh, given)
        if not programs:
            usable = [one for one in subjects if not refusal(one, floor.on_cpu)]
            programs = moe_programs.compiled(usable, case, mesh, lengths, given)
        ready = time.monotonic()
        for subject in subjects:
            row = Row(case, subject.name, subject.role, subject.what, subject.wire)
            if reason := refusal(subject, floor.on_cpu):
                yield dataclasses.replace(row, reason=reason)
                continue
            mine = {length: programs[subject.name, length] for length in lengths}
            try:
                for failed in mine.values():
                    if isinstance(failed, Exception):
                        raise failed
                row = measure(subject, case, mesh, mine, given, settings)
            except RuntimeError as error:  # JAX's, and what is refused
                row = dataclasses.replace(row, reason=str(error).splitlines()[0])
            yield dataclasses.replace(row, floor_us=floor_of(subject, floors))
        ended = time.monotonic()
        say(f"{case.label}: {ready - began:.1f} s to compile, {ended - ready:.1f} s")


def floor_of(subject: Subject, floors: dict[str, float | None]) -> float | None:
    """Microseconds of the bytes that a call of the subject must move."""
    one_way = floors[subject.wire]
    if one_way is None or subject.what != "pair":
        return one_way
    return one_way + (floors["bf16"] or 0)  # combine travels as bf16


def barrier_us(mesh: Any, settings: Settings) -> float:
    """Microseconds of jf.barrier, in chains as of one token."""
    subject = Subject(
        *("barrier", "ours", "barrier", "bf16", ("token",)),
        lambda case: lambda token: jf.barrier(AXIS, token=token),
    )
    case = settings.case(1, "uniform", mesh.size)
    given = moe_operands.operands(case, mesh)
    lengths = lengths_of(settings, 1)
    made = moe_programs.compiled([subject], case, mesh, lengths, given)
    programs = {length: made["barrier", length] for length in lengths}
    times = time_calls(programs, subject.operands, given, settings, 1)
    return times.p50 * 1e6


def device_line() -> str:
    """What the ranks are, in a line."""
    kind = jax.devices()[0].device_kind
    return (
        f"{jax.device_count()} ranks ({kind}) of {jax.process_count()} processes; "
        f"{jax.devices()[0].client.platform_version.splitlines()[0]}"
    )


def run(settings: Settings, write: Callable[[dict[str, Any]], None]) -> bool:
    """Measures everything; gives ``write`` all it has after each size. Collective.

    Returns whether all subjects of ours have figures.
    """
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    settings.check(mesh.size)
    on_cpu = devices[0].platform == "cpu"
    before, line = machine.describe(), machine.line()
    floor = Floor(on_cpu)
    largest = settings.case(max(settings.tokens), "uniform", mesh.size)
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        fabric = stack.enter_context(
            jf.Fabric(
                mesh,
                transport=settings.transport,
                mailbox_bytes=moe_case.message_bytes(largest),
                window_bytes=1 << 20,
            )
        )
        result: dict[str, Any] = {
            "benchmark": "moe",
            "machine": before,
            "machine_line": line,
            "devices": device_line(),
            "transport": fabric.transport,
            "floor": floor.describe(),
            "barrier_us": barrier_us(mesh, settings),
            "settings": dataclasses.asdict(settings),
        }
        for tokens in settings.tokens:
            rows += rows_of_tokens(tokens, mesh, settings, floor)
            result["machine"] = {**before, "load_after": machine.describe()["load"]}
            result["imbalance"] = {
                row.case.label: round(row.case.load().imbalance, 2) for row in rows
            }
            result["rows"] = [row.to_json() for row in rows]
            write(result)
    return not any(row.reason for row in rows if row.role == "ours")


def main() -> None:
    """Runs with the settings given on the command line."""
    # The launcher put this folder there; its modules have names of others.
    folder = str(pathlib.Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != folder]
    settings = Settings.from_json(json.loads(sys.argv[1]))
    out = pathlib.Path(sys.argv[2])

    def write(result: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    if not run(settings, write):
        sys.exit("a subject of ours has no figure; the table says why")


if __name__ == "__main__":
    main()
