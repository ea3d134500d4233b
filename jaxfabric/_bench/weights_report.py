"""What `jaxfabric bench weights` prints."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import rich.console
import rich.table
import rich.text

_COLUMNS = 120  # of files and pipes; a terminal is asked
_MIB, _GIB = 1 << 20, 1 << 30
_PHASES = (
    *("wait", "pack", "seal", "transfer", "span"),
    *("total", "verify", "unpack", "take"),
)
# Passes over the bytes of a push. Over shared memory the write itself is one.
_COPIES = {"pack": 1, "unpack": 1, "take": 1}
_HASHES = 2

_CORE_PHASES = ("pack", "seal", "transfer", "of it write", "verify", "unpack", "take")

NOTES = """\
Whole: from the request until the sampler's ranks have arrays on their devices. Wire:
the push's own writes by the same engine, between as many buffers, and nothing else,
until all have come. Of wire: how near a time comes to that; core: seconds that the
cores of all ranks worked.
p99 is the longest of fewer than 100 rounds. Phases are of the slowest rank, and
overlap. The transfer phase is the time in which at least one write of a rank is under
way, from the call to its end at its source; of wire, it is compared with that of the
bare writes. The span is from the leave to write until the last write's end: it has in
it what writes wait for, buckets that are not packed yet, and slots that receivers have
not emptied. In core seconds transfer is all that no other phase is. Where several
threads pack or unpack, a phase is its share of the time in which any of them does.
The memory-traffic floor is pack (or to quantise, instead), unpack and take (a copy
each; one more for the write over shm), and two checksums, at the rates that all ranks
together copied, quantised and hashed just before. Gather and broadcast has neither
checksums nor versions; JAX's transfers go through loopback sockets, whatever the
transport. Grew: the peak of a process's memory in its first push, above what it had
before it had a Sender or Receiver. The bound is their stats()["bytes"]; over shm a
sender's process has the receivers' rings mapped, too, and what was taken is the
sampler's own."""


def show(result: dict[str, Any]) -> None:
    """Prints a table for each transport."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=_COLUMNS)
    settings = result["settings"]
    for line in (
        f"{result['machine_line']}; load afterwards {result['machine']['load_after']}",
        f"{result['nbytes'] / _GIB:.3g} GiB in {result['leaves']} leaves, "
        f"{settings['sources']} -> {settings['targets']} processes, "
        f"{settings['rounds']} rounds"
        + (", quantised to e4m3 on the way" if settings["quantise"] else ""),
    ):
        console.print(rich.text.Text(line))
    for found in result["results"]:
        console.print(_table(result, found))
        for name, why in found["failed"].items():
            console.print(rich.text.Text(f"{name}: {why}"))
        if found["rounds"].get("push"):
            for line in _phases(result, found):
                console.print(rich.text.Text(line))
    console.print(rich.text.Text(NOTES))


class Row(NamedTuple):
    """A line of the table: what it is, and its seconds in each round.

    ``wire``: what it is compared with by the clock, if not with the first line.
    """

    name: str
    wall: list[float]
    core: list[float] | None
    wire: list[float] | None = None


def rows_of(result: dict[str, Any], found: dict[str, Any]) -> list[Row]:
    """All lines, the wire first."""
    nbytes, floors = result["target_nbytes"], found["floors"]
    quantised = result["nbytes"] if result["settings"]["quantise"] else 0

    def floor(name: str, copies: int, hashes: int, quantised: int = 0) -> Row:
        wall, core = (
            [
                traffic_s(nbytes, copies, hashes, floor, kind)
                + (quantised / floor["quantise" + kind] if quantised else 0)
                for floor in floors
            ]
            for kind in ("", "_core")
        )
        return Row(name, wall, core)

    copies = sum(_COPIES.values()) + (found["transport"] == "shm")
    if quantised:
        copies -= _COPIES["pack"]
    rows = [
        Row(
            "wire",
            [floor["wire_s"] for floor in floors],
            [floor["wire_core_s"] for floor in floors],
        ),
        floor("memcpy, once", 1, 0),
        floor("memory-traffic floor of a push", copies, _HASHES, quantised),
    ]
    if quantised:
        rows.append(floor("quantising, once", 0, 0, quantised))
    pushes = found["rounds"].get("push", [])
    if pushes:
        core = [push["core"]["transfer"] for push in pushes]
        writes = [floor["wire_transfer_s"] for floor in floors]
        transfers = [push["transfer_s"] for push in pushes]
        rows += [
            Row("wire, transfer phase", writes, None),
            Row("push, transfer phase", transfers, core, writes),
            Row("push, span", [push["span_s"] for push in pushes], None),
            Row("push, until received", [p["total_s"] for p in pushes], None),
        ]
    for name, rounds in found["rounds"].items():
        if rounds:
            walls = [each["seconds"] for each in rounds]
            rows.append(
                Row(f"{name}, whole", walls, [each["core_s"] for each in rounds])
            )
    return rows


def traffic_s(
    nbytes: int, copies: int, hashes: int, rates: dict[str, float], kind: str = ""
) -> float:
    """Seconds that so many passes over the bytes take at least, with all ranks busy.

    >>> traffic_s(10, 3, 1, {"copy": 10.0, "hash": 5.0})
    5.0
    """
    return (
        copies * nbytes / rates["copy" + kind]
        + hashes * nbytes / (rates["hash" + kind])
    )


def quantile(values: list[float], share: float) -> float:
    """The smallest value that so many are not above.

    >>> quantile([3.0, 1.0, 2.0], 0.99)
    3.0
    """
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _table(result: dict[str, Any], found: dict[str, Any]) -> rich.table.Table:
    table = rich.table.Table(
        title=f"over {found['transport']}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("", min_width=34)
    for name in ("p50 s", "p99 s", "GiB/s", "of wire", "core s", "of wire"):
        table.add_column(name, justify="right", min_width=8)
    rows = rows_of(result, found)
    wire = rows[0]
    assert wire.core is not None
    for row in rows:
        middle = statistics.median(row.wall)
        cores = ["", ""]
        if row.core is not None:
            cores = [f"{statistics.median(row.core):.3f}", _share(wire.core, row.core)]
        table.add_row(
            row.name,
            f"{middle:.3f}",
            f"{quantile(row.wall, 0.99):.3f}",
            f"{result['nbytes'] / _GIB / middle:.2f}",
            _share(row.wire or wire.wall, row.wall),
            *cores,
            style="bold" if row.name.startswith("push") else "",
        )
    return table


def _share(wire: list[float], seconds: list[float]) -> str:
    ratios = [w / s for w, s in zip(wire, seconds, strict=False)]
    return f"{statistics.median(ratios):.2f}"


def _phases(result: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    pushes = found["rounds"]["push"]
    parts = []
    for phase in _PHASES:
        seconds = [push[f"{phase}_s"] for push in pushes]
        middle, late = statistics.median(seconds), quantile(seconds, 0.99)
        parts.append(f"{phase} {middle * 1e3:.0f} ({late * 1e3:.0f})")
    yield f"phases, ms, p50 (p99): {', '.join(parts)}; {pushes[0]['writes']} writes"
    parts = []
    for phase in _CORE_PHASES:
        middle = statistics.median(push["core"][phase] for push in pushes)
        parts.append(f"{phase} {middle * 1e3:.0f}")
    yield f"phases, core ms of all ranks, p50: {', '.join(parts)}"
    whole = [push["seconds"] for push in pushes]
    floors = rows_of(result, found)[2]
    assert floors.core is not None
    yield (
        f"memory-traffic floor / whole push: {_share(floors.wall, whole)}; in core "
        f"seconds {_share(floors.core, [push['core_s'] for push in pushes])}"
    )
    for peak in found["peaks"]:
        bound = {name: peak[name] for name in ("own", "rings", "taken") if name in peak}
        text = " + ".join(f"{name} {n / _MIB:.0f}" for name, n in bound.items())
        yield f"{peak['rank']} grew {peak['grew'] / _MIB:.0f} MiB; bound {text} MiB"


# --- The cost model -------------------------------------------------------------

# What a published system needed for such a model (arXiv 2510.27656, table 5).
REFERENCE = (
    ("reconstruction of whole tensors", 518),
    ("waiting for other ranks", 357),
    ("copies to the device", 184),
    ("quantisation", 88),
    ("transfer that nothing hides", 42),
    ("submission of 1144 writes", 26),
    ("fusing", 18),
)


def plan_only() -> str:
    """What a push of 10**12 parameters would take, and what it took others."""
    from jaxfabric import weights

    from . import weights_model

    source, target = weights_model.large_layouts()
    begin = time.monotonic()
    plan = weights.plan(source, target, cast=True, scales=weights_model.SCALES)
    cost = weights.estimate(plan)
    took = time.monotonic() - begin
    parameters = sum(math.prod(leaf.shape) for leaf in source.leaves)
    lines = [
        f"{parameters:.3g} parameters, bfloat16 on {len(source.ranks)} ranks (2 stages "
        f"x 16 row parts x 8 expert parts) to e4m3 on {len(target.ranks)} (4 x 32 "
        f"expert parts); planned and counted in {took:.1f} s",
        plan.summary(),
        "",
        "A model, not a measurement: the real plan's bytes and writes, at "
        f"{_rates(weights.Rates())}.",
        f"busiest source: {cost.sent / _GIB:.1f} GiB in {cost.writes} writes; busiest "
        f"target: {cost.received / _GIB:.1f} GiB; all links: {cost.nbytes / _GIB:.0f} "
        "GiB",
    ]
    stages = {
        "copies from the device": cost.copy_s,
        "packing, quantisation, checksums": cost.pack_s,
        "  of which quantisation": cost.quantise_s,
        "the busiest link": cost.link_s,
        "checking and unpacking": cost.unpack_s,
    }
    width = max(map(len, [*stages, *(name for name, _ in REFERENCE)]))
    lines += ["", "stages, which overlap, ms:"]
    lines += [f"  {name:{width}} {s * 1e3:6.0f}" for name, s in stages.items()]
    lines += [f"  {'the longest':{width}} {cost.total_s * 1e3:6.0f}", ""]
    lines += ["the reference (fabric-lib, Kimi-K2, 256 -> 128 ranks, measured), ms:"]
    lines += [f"  {name:{width}} {ms:6d}" for name, ms in REFERENCE]
    total = sum(ms for _, ms in REFERENCE)
    return "\n".join([*lines, f"  {'together':{width}} {total:6d}"])


def _rates(rates: Any) -> str:
    return ", ".join(
        f"{name} {value * 1e6:g} us"
        if name == "write_s"
        else f"{name} {value / 1e9:g} GB/s"
        for name, value in rates._asdict().items()
    )
