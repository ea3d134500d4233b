"""Traces: each operation of a known program is there, once, in spans that nest."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fabric_cases import AXIS, mapped, mesh_of_all, place
from ranks import run_child

import jaxfabric as jf
from jaxfabric import _ffi
from jaxfabric._trace_file import Recorded, Span, merge_traces, trace_events

PARTS = {"post", "waiting", "copy out"}
PAGE = 4096
LONG_US = 60e6  # longer than any test here takes


def require(transport: str) -> None:
    for name, state, reason, _ in _ffi.transport_states():
        if name == transport and state != "usable":
            pytest.skip(f"{transport}: {state}: {reason}")


def names_of(content: dict[str, Any], what: str) -> dict[tuple[int, int], str]:
    return {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in content["traceEvents"]
        if event["ph"] == "M" and event["name"] == what
    }


def spans_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """All spans, after what is true of each trace was checked."""
    spans = [event for event in content["traceEvents"] if event["ph"] == "X"]
    threads = names_of(content, "thread_name")
    processes = {pid for pid, _ in names_of(content, "process_name")}
    lanes = collections.defaultdict(list)
    for span in spans:
        assert (span["pid"], span["tid"]) in threads
        assert span["pid"] in processes
        assert 0 <= span["dur"] < LONG_US
        lanes[span["pid"], span["tid"]].append(span)
    for lane in lanes.values():
        under_way: list[float] = []  # ends
        for span in sorted(lane, key=lambda span: (span["ts"], -span["dur"])):
            begin, end = span["ts"], span["ts"] + span["dur"]
            while under_way and under_way[-1] <= begin + 1e-3:
                under_way.pop()
            assert not under_way or end <= under_way[-1] + 1e-3, span
            under_way.append(end)
    return spans


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return spans_of(json.loads(path.read_text()))


def count(spans: list[dict[str, Any]], category: str) -> dict[str, int]:
    return dict(collections.Counter(s["name"] for s in spans if s["cat"] == category))


# --- TransferEngine ----------------------------------------------------------


@pytest.mark.parametrize("transport", ["shm", "fake", "ofi/tcp"])
def test_each_operation_of_an_engine(tmp_path: pathlib.Path, transport: str) -> None:
    require(transport)
    path = tmp_path / "trace.json"
    with (
        jf.TransferEngine(transport, name="target") as target,
        jf.TransferEngine(transport, name="writer") as engine,
        engine.trace(path) as trace,
    ):
        peer = engine.connect(target.address()).result()
        region = target.alloc((64, PAGE))
        desc = region.desc
        source = engine.register_memory(np.ones((64, PAGE), np.uint8))
        for _ in range(3):
            engine.submit_single_write(source, desc, 7, nbytes=PAGE).result()
            target.imm_counter(7).wait(1)
        engine.submit_paged_writes(
            source, range(0, 64, 2), desc, range(1, 64, 2), PAGE, 8
        ).result()
        target.imm_counter(8).wait(1)
        engine.submit_scatter(
            source,
            [jf.ScatterTarget(desc, PAGE, offset, PAGE) for offset in (0, PAGE)],
            9,
        ).result()
        target.imm_counter(9).wait(2)
        engine.submit_send(peer, b"hello").result()
        late = engine.expect_imm_count(11, 1, timeout_s=0.1)
        assert isinstance(late.exception(), jf.DeadlineError)
        engine.unregister_memory(source)
        trace.stop()
        assert trace.stopped
    spans = read(path)
    assert count(spans, "call") == {
        "connect": 1,
        "single write": 3,
        "paged write": 1,
        "scatter": 1,
        "send": 1,
        "wait": 1,
        "unregister memory": 1,
    }
    by_name = {span["name"]: span["args"] for span in spans}
    assert by_name["paged write"]["bytes"] == 32 * PAGE
    assert by_name["paged write"]["id"] == 8
    assert by_name["paged write"]["status"] == "ok"
    assert by_name["wait"]["status"] == "deadline exceeded"
    waited = next(span for span in spans if span["name"] == "wait")
    assert 0.1e6 <= waited["dur"] < 10e6
    assert count(spans, "peer")["transfer"] == 6  # a scatter is one for each target
    moved = "copy" if transport == "shm" else "write"
    kinds = [span["args"] for span in spans if span["name"] == moved]
    assert sum(span.get("bytes", 0) for span in kinds) == (3 + 32 + 2) * PAGE
    assert {span["peer"] for span in kinds} == {peer}
    known = {span["args"]["span"] for span in spans}
    assert len(known) == len(spans)
    assert all(span["parent"] in known for span in kinds)
    threads = set(names_of(json.loads(path.read_text()), "thread_name").values())
    assert "calls" in threads
    assert any(name.startswith("to target") for name in threads)
    assert any(name.startswith("NIC ") for name in threads)


def test_the_oldest_give_way_and_are_counted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "trace.json"
    with jf.TransferEngine() as target, jf.TransferEngine() as engine:
        peer = engine.connect(target.address()).result()
        with engine.trace(path, events_max=8):
            for i in range(20):
                engine.submit_send(peer, bytes(i)).result()
    content = json.loads(path.read_text())
    spans = spans_of(content)
    assert len(spans) == 8
    assert content["otherData"]["dropped"] == 12
    assert max(span["args"].get("bytes", 0) for span in spans) >= 19


def test_what_hangs_is_there(tmp_path: pathlib.Path) -> None:
    """The reason why one records: an operation that does not end."""
    path = tmp_path / "trace.json"
    with jf.TransferEngine() as engine:
        engine.trace(path)
        hangs = engine.expect_imm_count(5, 1)
        engine.close()  # writes what was recorded
        assert hangs.exception() is not None
    (span,) = read(path)
    assert span["args"]["status"] == "not over"
    assert "under id 5" in span["args"]["label"]


def test_a_recording_at_a_time_and_several_in_turn(tmp_path: pathlib.Path) -> None:
    with jf.TransferEngine() as engine:
        with engine.trace(tmp_path / "one.json") as first:
            with pytest.raises(jf.FabricError, match=r"one\.json is being recorded"):
                engine.trace(tmp_path / "two.json")
            assert not first.path.exists()  # it appears complete, or not at all
        with engine.trace(tmp_path / "two.json"):
            pass
        with pytest.raises(FileNotFoundError, match="no folder"):
            engine.trace(tmp_path / "nowhere" / "three.json")
        with pytest.raises(ValueError, match="events_max"):
            engine.trace(tmp_path / "four.json", events_max=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.json", "two.json"]
    with pytest.raises(jf.FabricError, match="closed"):
        engine.trace(tmp_path / "five.json")


def test_a_file_that_cannot_be_written_does_not_keep_the_engine(
    tmp_path: pathlib.Path,
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    engine = jf.TransferEngine()
    engine.trace(folder / "trace.json")
    folder.rmdir()
    with pytest.raises(FileNotFoundError):
        engine.close()
    assert engine.closed
    fabric = jf.Fabric(mesh_of_all())
    folder.mkdir()
    fabric.trace(folder / "trace.json")
    folder.rmdir()
    with pytest.raises(FileNotFoundError):
        fabric.close()
    assert fabric.closed


# --- Fabric ------------------------------------------------------------------


def program(fabric: jf.Fabric, mesh: jax.sharding.Mesh) -> Any:
    """A put into the next rank's window, a barrier, a dispatch and a combine."""
    n = mesh.size
    window = fabric.window((n, 8), jnp.float32)

    def step(x: Any, ids: Any, weights: Any) -> Any:
        rank = jax.lax.axis_index(AXIS)
        token = jf.put(
            *(window, x[0], (rank + 1) % n),
            axis_name=AXIS,
            offset=rank * 8,
            id=3,
            token=jf.token(),
        )
        got, token = jf.wait(window, axis_name=AXIS, id=3, token=token)
        token = jf.barrier(AXIS, token=token)
        out = jf.moe.dispatch(x, ids, weights, axis_name=AXIS, num_experts=2 * n)
        return got[:1], jf.moe.combine(out.tokens, out.plan), token[None]

    operands = (
        place(mesh, np.ones((4 * n, 8), np.float32)),
        place(mesh, np.arange(8 * n, dtype=np.int32).reshape(4 * n, 2) % (2 * n)),
        place(mesh, np.ones((4 * n, 2), np.float32)),
    )
    compiled = mapped(mesh, step)
    return lambda: jax.block_until_ready(compiled(*operands))


def check_calls(spans: list[dict[str, Any]], rank: int, steps: int) -> None:
    """Each call of `program` is there, and has its parts."""
    of_rank = [span for span in spans if span["pid"] == rank]
    calls = count(of_rank, "call")
    for name in ("put", "wait", "barrier", "dispatch", "combine"):
        assert calls[name] == steps, (rank, name)
    by_span = {span["args"]["span"]: span for span in of_rank}
    parts = collections.defaultdict(set)
    for span in of_rank:
        if span["name"] in PARTS:
            whole = by_span[span["args"]["parent"]]
            assert whole["tid"] == span["tid"]
            parts[whole["args"]["span"]].add(span["name"])
    for number, names in parts.items():
        waits = by_span[number]["name"] != "put"
        assert names == (PARTS if waits else {"post"}), by_span[number]
    assert len(parts) == 5 * steps


def test_each_call_of_a_program(tmp_path: pathlib.Path) -> None:
    """Eight ranks in one process are eight processes of the file."""
    mesh = mesh_of_all()
    path = tmp_path / "step.json"
    with jf.Fabric(mesh) as fabric:
        step = program(fabric, mesh)
        step()  # not recorded
        with fabric.trace(path) as trace:
            step()
            step()
        assert trace.path == path
        with pytest.raises(FileNotFoundError):
            fabric.trace(tmp_path / "nowhere" / "step.json")
    spans = read(path)
    for rank in range(mesh.size):
        check_calls(spans, rank, 2)
    processes = names_of(json.loads(path.read_text()), "process_name")
    assert sorted(processes) == [(rank, 0) for rank in range(mesh.size)]
    assert processes[3, 0].startswith("rank 3")


def test_it_is_written_when_the_fabric_closes(tmp_path: pathlib.Path) -> None:
    mesh = mesh_of_all()
    with jf.Fabric(mesh) as fabric:
        step = program(fabric, mesh)
        trace = fabric.trace(tmp_path / "step.json")
        step()
        assert not trace.stopped
    assert trace.stopped
    check_calls(read(trace.path), 0, 1)


@pytest.mark.jaxfabric(processes=2, devices_per_process=2, timeout_s=120)
@pytest.mark.parametrize("transport", ["shm", "ofi/tcp"])
def test_files_of_processes_merge_on_one_clock(
    transport: str, tmp_path: pathlib.Path
) -> None:
    require(transport)
    mesh = mesh_of_all()
    with jf.Fabric(mesh, transport=transport) as fabric:
        step = program(fabric, mesh)
        step()
        with fabric.trace(tmp_path / "step.json") as trace:
            step()
        content = json.loads(trace.path.read_text())
        assert trace.path.name == f"step.{jax.process_index()}.json"
        gathered = fabric._rendezvous.all_gather(json.dumps(content).encode())
    merged = merge_traces([json.loads(one) for one in gathered])
    spans = spans_of(merged)
    assert {span["pid"] for span in spans} == set(range(4))
    for rank in range(4):
        check_calls(spans, rank, 1)
    barriers = [span for span in spans if span["name"] == "barrier"]
    last_came = max(span["ts"] for span in barriers)
    assert all(span["ts"] + span["dur"] >= last_came for span in barriers)
    if transport == "ofi/tcp":
        writes = [span for span in spans if span["cat"] == "nic"]
        assert sum(span["args"].get("bytes", 0) for span in writes) > 0
        assert "NIC lo" in names_of(merged, "thread_name").values()


# --- Files -------------------------------------------------------------------


def recorded(process: int, *spans: tuple[Any, ...]) -> Recorded:
    return Recorded(process, "p", [Span(*span) for span in spans], 0, 0, 10_000)


def span(number: int, begin: int, end: int, parent: int = 0, peer: Any = 1) -> Any:
    return ("s", "", number, parent, begin, end, peer, None, None, 0, 0)


def test_what_overlaps_has_lanes_of_its_own() -> None:
    content = trace_events(
        [recorded(0, span(1, 0, 50), span(2, 10, 20), span(3, 20, 30), span(4, 50, 60))]
    )
    lanes = {s["args"]["span"]: s["tid"] for s in spans_of(content)}
    assert lanes[1] == lanes[4] != lanes[2] == lanes[3]
    names = names_of(content, "thread_name")
    assert list(names.values()) == ["to peer 1", "to peer 1 (2)"]


def test_parts_that_nobody_ended_end_with_their_whole() -> None:
    parts = [span(1, 0, 500, peer=None), span(2, 100, 0, parent=1, peer=None)]
    parts.append(span(3, 600, 0, peer=None))
    content = trace_events([recorded(0, *parts)])
    ends = {s["args"]["span"]: s["ts"] + s["dur"] for s in spans_of(content)}
    assert ends == {1: 0.5, 2: 0.5, 3: 10.0}


def test_equal_numbers_and_other_hosts() -> None:
    here = trace_events([recorded(5, span(1, 1000, 2000))])
    there = trace_events([recorded(5, span(1, 1000, 2000))])
    there["otherData"]["boot_id"] = "another"
    there["otherData"]["unix_minus_monotonic_ns"] += 7_000_000
    first, second = spans_of(merge_traces([here, there]))
    assert (first["pid"], second["pid"]) == (5, 6)
    clocks = [c["otherData"]["unix_minus_monotonic_ns"] for c in (here, there)]
    assert second["ts"] - first["ts"] == (clocks[1] - clocks[0]) / 1000


def test_the_command_merges_and_refuses_other_files(tmp_path: pathlib.Path) -> None:
    for i in range(2):
        with jf.TransferEngine(), jf.TransferEngine() as engine:
            with engine.trace(tmp_path / f"{i}.json"):
                engine.expect_imm_count(3, 0).result()
    output = tmp_path / "all.json"
    files = [str(tmp_path / f"{i}.json") for i in range(2)]
    command = ("-m", "jaxfabric._cli", "trace", "merge")
    run_child(*command, *files, "-o", str(output))
    assert count(read(output), "call") == {"wait": 2}
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(AssertionError, match="is not a trace of jaxfabric"):
        run_child(*command, str(tmp_path / "bad.json"), "-o", str(output))
