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
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import jaxfabric as jf
from jaxfabric._bench import machine, moe_case, moe_programs, nvlink, rank_times
from jaxfabric._bench.moe import Settings
from jaxfabric._bench.moe_case import Case, Row
from jaxfabric._bench.moe_programs import AXIS, SUBJECTS, Subject

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
        if not on_cpu:
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


def check(subject: Subject, case: Case, mesh: Any, given: dict[str, Any]) -> str:
    """Why the results of one step are wrong, or nothing. Collective."""
    if subject.what not in ("pair", "exchange"):
        return ""  # the pair's are the same calls
    inputs = [given[name] for name in subject.operands]
    want = inputs[0]
    step = moe_programs.chain(subject, case, mesh, 1)
    got = step(want + 0, *inputs[1:])
    if subject.what == "exchange":
        if subject.name != "lax.ragged_all_to_all":
            return ""
        want = moe_programs.exchanged_rows(case, mesh)
    error = moe_programs.largest_error(got, want)
    everywhere = float(rank_times.slowest_rank([error]).p50)
    if everywhere <= _ERROR_MOST[subject.wire]:
        return ""
    return f"its results are wrong by {everywhere:.3g}"


def measure(
    subject: Subject,
    case: Case,
    mesh: Any,
    program: Any,
    given: dict[str, Any],
    settings: Settings,
) -> Row:
    """The row of one subject in one case."""
    row = Row(case, subject.name, subject.role, subject.what, subject.wire)
    if wrong := check(subject, case, mesh, given):
        return dataclasses.replace(row, reason=wrong)
    carry = given[subject.operands[0]] + 0
    rest = [given[name] for name in subject.operands[1:]]

    def call() -> Any:
        nonlocal carry
        carry = program(carry, *rest)
        return carry

    times = rank_times.time_for(
        call, seconds=settings.seconds, most=settings.iterations
    )
    per_call = 1e6 / settings.length(case.tokens)
    count = len(times.seconds)
    return dataclasses.replace(
        row,
        p50_us=times.p50 * per_call,
        p99_us=times.p99 * per_call if count >= rank_times.P99_LEAST else None,
        iterations=count,
    )


def refusal(subject: Subject, on_cpu: bool) -> str:
    """Why a subject cannot run on this platform, or nothing."""
    if on_cpu and subject.name == "lax.ragged_all_to_all":
        return "XLA has none on CPU"
    return ""


def rows_of_tokens(
    tokens: int, mesh: Any, settings: Settings, floor: Floor
) -> Iterator[Row]:
    """All subjects and routings of one size; programs are compiled once."""
    programs: dict[str, Any] = {}
    for routing in settings.routings:
        case = settings.case(tokens, routing, mesh.size)
        say(case.label)
        floors = {wire: floor.us(case, wire) for wire in moe_case.WIRES}
        given = moe_programs.operands(case, mesh)
        given |= moe_programs.routed(case, mesh, given)
        for name in settings.subjects:
            subject = SUBJECTS[name]
            row = Row(case, name, subject.role, subject.what, subject.wire)
            # Its counts are part of the ragged program.
            if name not in programs or name == "lax.ragged_all_to_all":
                length = settings.length(tokens)
                programs[name] = moe_programs.chain(subject, case, mesh, length)
            if reason := refusal(subject, floor.on_cpu):
                yield dataclasses.replace(row, reason=reason)
                continue
            try:
                row = measure(subject, case, mesh, programs[name], given, settings)
            except RuntimeError as error:  # JAX's, and what is refused
                row = dataclasses.replace(row, reason=str(error).splitlines()[0])
            ways = 2 if subject.what == "pair" else 1
            one_way = floors[subject.wire]
            if one_way is not None and ways == 2:  # combine travels as bf16
                one_way = (one_way + (floors["bf16"] or 0)) / 2
            yield dataclasses.replace(
                row, floor_us=None if one_way is None else ways * one_way
            )


def barrier_us(mesh: Any, settings: Settings) -> float:
    """Microseconds of jf.barrier, in a chain of 20."""
    subject = Subject(
        *("barrier", "ours", "barrier", "bf16", ("token",)),
        lambda case: lambda token: jf.barrier(AXIS, token=token),
    )
    case = settings.case(1, "uniform", mesh.size)
    program = moe_programs.chain(subject, case, mesh, 20)
    carry = moe_programs.operands(case, mesh)["token"]

    def call() -> Any:
        nonlocal carry
        carry = program(carry)
        return carry

    times = rank_times.time_for(
        call, seconds=settings.seconds, most=settings.iterations
    )
    return times.p50 / 20 * 1e6


def device_line() -> str:
    """What the ranks are, in a line."""
    kind = jax.devices()[0].device_kind
    return (
        f"{jax.device_count()} ranks ({kind}) of {jax.process_count()} processes; "
        f"{jax.devices()[0].client.platform_version.splitlines()[0]}"
    )


def run(settings: Settings) -> dict[str, Any]:
    """Measures everything; what rank 0 writes. Collective."""
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
        barrier = barrier_us(mesh, settings)
        for tokens in settings.tokens:
            rows += rows_of_tokens(tokens, mesh, settings, floor)
    return {
        "benchmark": "moe",
        "machine": {**before, "load_after": machine.describe()["load"]},
        "machine_line": line,
        "devices": device_line(),
        "transport": fabric.transport,
        "floor": floor.describe(),
        "barrier_us": barrier,
        "settings": dataclasses.asdict(settings),
        "imbalance": {
            row.case.label: round(row.case.load().imbalance, 2) for row in rows
        },
        "rows": [row.to_json() for row in rows],
    }


def main() -> None:
    """Runs with the settings given on the command line."""
    # The launcher put this folder there; its modules have names of others.
    folder = str(pathlib.Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != folder]
    settings = Settings.from_json(json.loads(sys.argv[1]))
    result = run(settings)
    if jax.process_index() == 0:
        text = json.dumps(result, indent=1)
        pathlib.Path(sys.argv[2]).write_text(text + "\n", encoding="utf-8")
    ours = [row for row in result["rows"] if row["role"] == "ours"]
    if failed := [row for row in ours if row["reason"]]:
        sys.exit(f"{failed[0]['subject']}: {failed[0]['reason']}")


if __name__ == "__main__":
    main()
