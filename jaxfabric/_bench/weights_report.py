"""What `jaxfabric bench weights` prints."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import rich.console
import rich.table
import rich.text

_COLUMNS = 120  # of files and pipes; a terminal is asked
_GIB = 1 << 30
_PHASES = ("wait", "pack", "seal", "transfer", "total", "verify", "unpack", "take")
# Passes over the bytes of a push. Over shared memory the write itself is one.
_COPIES = {"pack": 1, "unpack": 1, "take": 1}
_HASHES = 2

NOTES = """\
Whole: from the request until the sampler's ranks have arrays on their devices. Wire:
the push's own writes by the same engine and nothing else, until all have come. Of
wire: how near a time comes to that. p99 is the longest of fewer than 100 rounds.
Phases are of the slowest rank, and overlap; the transfer phase is from the leave to
write until the last write's end at its source. The memory-traffic floor is pack,
unpack and take (a copy each; one more for the write over shm), and two checksums, at
the rates that all ranks together copied and hashed just before. Gather and broadcast
has neither checksums nor versions; JAX's transfers go through loopback sockets,
whatever the transport."""


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
        f"{settings['rounds']} rounds",
    ):
        console.print(rich.text.Text(line))
    for found in result["results"]:
        console.print(_table(result, found))
        for name, why in found["failed"].items():
            console.print(rich.text.Text(f"{name}: {why}"))
        if found["rounds"].get("push"):
            console.print(rich.text.Text(_phases(found)))
    console.print(rich.text.Text(NOTES))


def rows_of(result: dict[str, Any], found: dict[str, Any]) -> list[tuple[str, Any]]:
    """Name and seconds of each round, floors first."""
    nbytes = result["nbytes"]
    rows = [("wire", [floor["wire_s"] for floor in found["floors"]])]
    rows.append(
        (
            "memory-traffic floor of a push",
            [traffic_s(nbytes, found["transport"], f) for f in found["floors"]],
        )
    )
    copies = [nbytes / floor["copy"] for floor in found["floors"]]
    rows.insert(1, ("memcpy, once", copies))
    pushes = found["rounds"].get("push", [])
    if pushes:
        rows.append(("push, transfer phase", [p["transfer_s"] for p in pushes]))
        rows.append(("push, until received", [p["total_s"] for p in pushes]))
    for name, rounds in found["rounds"].items():
        if rounds:
            rows.append((f"{name}, whole", [each["seconds"] for each in rounds]))
    return rows


def traffic_s(nbytes: int, transport: str, floor: dict[str, float]) -> float:
    """Seconds that the memory traffic of a push takes at least, with all ranks busy."""
    copies = sum(_COPIES.values()) + (transport == "shm")
    return copies * nbytes / floor["copy"] + _HASHES * nbytes / floor["hash"]


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
    for name in ("p50 s", "p99 s", "GiB/s", "of wire"):
        table.add_column(name, justify="right", min_width=9)
    rows = rows_of(result, found)
    wire = rows[0][1]
    for name, seconds in rows:
        middle = statistics.median(seconds)
        ratios = [w / s for w, s in zip(wire, seconds, strict=False)]
        table.add_row(
            name,
            f"{middle:.3f}",
            f"{quantile(seconds, 0.99):.3f}",
            f"{result['nbytes'] / _GIB / middle:.2f}",
            f"{statistics.median(ratios):.2f}",
            style="bold" if name.startswith("push") else "",
        )
    return table


def _phases(found: dict[str, Any]) -> str:
    pushes = found["rounds"]["push"]
    parts = []
    for phase in _PHASES:
        seconds = [push[f"{phase}_s"] for push in pushes]
        middle, late = statistics.median(seconds), quantile(seconds, 0.99)
        parts.append(f"{phase} {middle * 1e3:.0f} ({late * 1e3:.0f})")
    return (
        f"phases of a push, ms, p50 (p99): {', '.join(parts)}; "
        f"{pushes[0]['writes']} writes"
    )


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
