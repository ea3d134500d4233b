"""Trace files: Chrome's JSON trace events, as ui.perfetto.dev opens them.

A process of the file is a rank (or an engine); its threads are the calls of the
program, each peer, and each NIC. Spans of one of these may overlap, which threads
must not: so each has as many lanes as it needs, and in a lane spans nest. Times are
microseconds of the host's monotonic clock, equal for all processes of a host.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_STATUS_NAMES = {
    0: "ok",
    1: "cancelled",
    2: "outcome unknown",
    3: "invalid argument",
    4: "deadline exceeded",
    5: "not found",
    7: "permission denied",
    8: "resource exhausted",
    9: "failed precondition",
    10: "aborted",
    11: "out of range",
    12: "not available",
    13: "internal error",
    14: "peer lost",
}


class Span(NamedTuple):
    """What took time; the fields of the native TraceEvent."""

    name: str
    label: str
    span: int
    parent: int
    begin_ns: int
    end_ns: int  # 0: it was not over
    peer: int | None
    nic: int | None
    id: int | None
    bytes: int
    status: int


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The recording of one rank or engine.

    Attributes:
      process: its number in the file.
      name: of that process in the file.
      spans: what took time.
      dropped: how many spans did not fit.
      begin_ns, end_ns: of the recording.
      peers: names of peers; the others are numbers.
      nics: names of NICs, in the order in which they were opened.
    """

    process: int
    name: str
    spans: Sequence[Span]
    dropped: int
    begin_ns: int
    end_ns: int
    peers: Mapping[int, str] = dataclasses.field(default_factory=dict)
    nics: Sequence[str] = ()

    @classmethod
    def from_native(
        cls, process: int, name: str, recording: Any, **names: Any
    ) -> Recorded:
        """Of the tuple that the native side returns."""
        events, *rest = recording
        return cls(process, name, [Span(*event) for event in events], *rest, **names)


def recorded_ranks(
    recordings: Mapping[int, Any], ranks: Sequence[int], nics: Sequence[str]
) -> list[Recorded]:
    """What the native side recorded of each local rank, one process for each."""
    host = f"{socket.gethostname()}:{os.getpid()}"
    names = {rank: f"rank {rank}" for rank in ranks}
    return [
        Recorded.from_native(
            *(rank, f"rank {rank} ({host})", recording), peers=names, nics=nics
        )
        for rank, recording in recordings.items()
    ]


# Calls first, then peers, then NICs, as threads are shown in the file.
_Track = tuple[int, int]


def _track(span: Span) -> _Track:
    if span.nic is not None:
        return (2, span.nic)
    return (0, 0) if span.peer is None else (1, span.peer)


def _track_name(track: _Track, recorded: Recorded) -> str:
    kind, number = track
    if kind == 0:
        return "calls"
    if kind == 1:
        return f"to {recorded.peers.get(number, f'peer {number}')}"
    nics = recorded.nics
    return f"NIC {nics[number % len(nics)]}" if nics else f"NIC {number}"


def _closed(spans: Sequence[Span], end_ns: int) -> list[Span]:
    """Spans that all have an end, in the order of their begin, the longest first.

    What is not over ends with what it is part of (nobody tells the parts of a call
    that failed), or with the recording.
    """
    ends = {span.span: span.end_ns for span in spans if span.end_ns}
    closed = [
        span._replace(
            end_ns=max(span.begin_ns, span.end_ns or ends.get(span.parent) or end_ns)
        )
        for span in spans
    ]
    return sorted(closed, key=lambda span: (span.begin_ns, -span.end_ns, span.span))


def _lanes(spans: Sequence[Span]) -> Iterator[tuple[Span, int]]:
    """Each span of one track with its lane; they come sorted by their begin."""
    lane_of: dict[int, int] = {}
    free: list[int] = []
    busy: list[tuple[int, int]] = []  # end and lane
    lanes = 0
    for span in spans:
        lane = lane_of.get(span.parent)
        if lane is None:
            while busy and busy[0][0] <= span.begin_ns:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if free:
                lane = heapq.heappop(free)
            else:
                lane, lanes = lanes, lanes + 1
            heapq.heappush(busy, (span.end_ns, lane))
        lane_of[span.span] = lane
        yield span, lane


def _arguments(span: Span, over: bool) -> dict[str, Any]:
    status = _STATUS_NAMES.get(span.status, str(span.status)) if over else "not over"
    arguments = {
        "label": span.label or None,
        "peer": span.peer,
        "id": span.id,
        "bytes": span.bytes or None,
        "status": status,
        "span": span.span,
        "parent": span.parent or None,
    }
    return {key: value for key, value in arguments.items() if value is not None}


def _process_events(recorded: Recorded) -> Iterator[dict[str, Any]]:
    pid = recorded.process

    def about(what: str, tid: int, /, **arguments: Any) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": arguments}

    yield about("process_name", 0, name=recorded.name)
    yield about("process_sort_index", 0, sort_index=pid)
    open_spans = {span.span for span in recorded.spans if not span.end_ns}
    tracks: dict[_Track, list[Span]] = {}
    for span in _closed(recorded.spans, recorded.end_ns):
        tracks.setdefault(_track(span), []).append(span)
    tid = 0
    for track in sorted(tracks):
        name = _track_name(track, recorded)
        first, last = tid + 1, tid
        for span, lane in _lanes(tracks[track]):
            while last < first + lane:
                last += 1
                more = f" ({last - first + 1})" if last > first else ""
                yield about("thread_name", last, name=name + more)
                yield about("thread_sort_index", last, sort_index=last)
            yield {
                "ph": "X",
                "name": span.name,
                "cat": ("call", "peer", "nic")[track[0]],
                "pid": pid,
                "tid": first + lane,
                "ts": span.begin_ns / 1000,
                "dur": (span.end_ns - span.begin_ns) / 1000,
                "args": _arguments(span, span.span not in open_spans),
            }
        tid = last


def trace_events(recordings: Iterable[Recorded]) -> dict[str, Any]:
    """The file's content: one process for each recording."""
    recordings = list(recordings)
    events = [event for recorded in recordings for event in _process_events(recorded)]
    return {
        "displayTimeUnit": "ns",
        "otherData": {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "boot_id": _boot_id(),
            "unix_minus_monotonic_ns": time.time_ns() - time.monotonic_ns(),
            "dropped": sum(recorded.dropped for recorded in recordings),
        },
        "traceEvents": events,
    }


def _boot_id() -> str:
    """Equal for processes with one monotonic clock."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def write_trace(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a file that nobody sees before it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w") as file:
            json.dump(content, file, separators=(",", ":"))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def merge_traces(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One file of several: of the ranks of a Fabric, or of both sides of a transfer.

    Processes of two files that have the same number get others. Files of other hosts
    are moved by the difference of the hosts' clocks, so that they fit as well as those
    clocks do.
    """
    first = contents[0]["otherData"]
    events: list[dict[str, Any]] = []
    taken: set[int] = set()
    for content in contents:
        about = content["otherData"]
        shift_us = 0.0
        if about["boot_id"] != first["boot_id"]:
            clocks = [int(of["unix_minus_monotonic_ns"]) for of in (about, first)]
            shift_us = (clocks[0] - clocks[1]) / 1000
        numbers: dict[int, int] = {}
        for event in content["traceEvents"]:
            old = event["pid"]
            if old not in numbers:
                new = old
                while new in taken:
                    new += 1
                numbers[old] = new
                taken.add(new)
            moved = {**event, "pid": numbers[old]}
            if "ts" in event:
                moved["ts"] = event["ts"] + shift_us
            events.append(moved)
    dropped = sum(int(content["otherData"]["dropped"]) for content in contents)
    return {
        "displayTimeUnit": "ns",
        "otherData": {**first, "dropped": dropped},
        "traceEvents": events,
    }
