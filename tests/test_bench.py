"""bench: its plan and statistics, and that no subject can stop or fool it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import stat
import sys
import textwrap

import numpy as np
import pytest
from ranks import run_child
from typer.testing import CliRunner

from jaxfabric._bench import case as cases
from jaxfabric._bench import (
    child_process,
    fi_rma_bw,
    figures,
    ib_write_bw,
    kv,
    put,
    report,
    subjects,
)
from jaxfabric._bench.case import Case
from jaxfabric._bench.child_process import Child, NotInstalled, SubjectFailed
from jaxfabric._bench.figures import Measurement, Row, summarize
from jaxfabric._bench.subjects import ChildSubject
from jaxfabric._cli import _bench_app

ALL = [
    Case(kind, size, peers=3, window=4)
    for kind in cases.KINDS
    for size in (1 << 10, 1 << 16, 1 << 20)
]
ALL += kv.plan((1 << 10, 1 << 16), 5, window=4)
SMALL = Case("single", 1 << 10, peers=1, window=4)

# --- The plan ----------------------------------------------------------------


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_spans_move_every_byte_once(case: Case) -> None:
    sources = np.zeros(case.bytes_, int)
    targets = np.zeros((case.targets, case.bytes_), int)
    for slot in range(case.window):
        spans = case.spans(slot)
        assert sum(span.length for span in spans) == case.size
        for span in spans:
            sources[span.source : span.source + span.length] += 1
            targets[span.peer, span.target : span.target + span.length] += 1
    assert (sources == 1).all()
    assert targets.max() == 1


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_wrong_bytes_are_found(case: Case) -> None:
    pattern = case.pattern()
    memory = np.zeros((case.targets, case.bytes_), np.uint8)
    for slot in range(case.window):
        for span in case.spans(slot):
            memory[span.peer, span.target : span.target + span.length] = pattern[
                span.source : span.source + span.length
            ]
    for peer in range(case.targets):
        assert case.wrong_bytes(memory[peer], peer) == 0
    last = case.spans(case.window - 1)[-1]
    memory[last.peer, last.target + last.length - 1] ^= 1
    assert case.wrong_bytes(memory[last.peer], last.peer) == 1


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.label)
def test_in_one_place_all_slots_are_the_first(case: Case) -> None:
    one = dataclasses.replace(case, one_place=True)
    assert one.bytes_ == case.size
    for slot in range(case.window):
        assert one.base(slot) == 0
        assert one.spans(slot) == case.spans(0)


def test_pages_that_are_not_shuffled_are_wrong() -> None:
    case = Case("paged", 1 << 16, peers=1, window=2)
    assert case.wrong_bytes(case.pattern(), 0) > case.bytes_ // 4


def test_the_plan_has_every_case_and_bounded_memory() -> None:
    plan = cases.plan(cases.KINDS, cases.SIZES, peers=4, window=16)
    assert len(plan) == len(cases.KINDS) * len(cases.SIZES)
    assert (cases.SIZES[0], cases.SIZES[-1]) == (1 << 10, 64 << 20)
    for case in plan:
        assert case.bytes_ <= cases.POOL_BYTES
        assert 2 <= case.window <= 16
        assert case.size % case.page_bytes == 0
        assert case.size // case.page_bytes >= cases.PAGES_MIN


def test_effort_is_bounded() -> None:
    for size in cases.SIZES:
        effort = cases.effort(size, seconds=0.2)
        assert 3 <= effort.least <= effort.most <= 5_000
        assert effort.least * size <= 3 * cases.POOL_BYTES
    assert cases.effort(1 << 10, seconds=1).most == 5_000
    assert cases.effort(64 << 20, seconds=1).least == 3


@pytest.mark.parametrize(
    ("text", "size"), [("1KiB", 1 << 10), (" 4 MiB", 4 << 20), ("4096", 4096)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert cases.parse_size(text) == size
    assert cases.parse_size(cases.readable(size)) == size


@pytest.mark.parametrize("text", ["", "1 KB", "3KiB", "512", "128MiB", "-1KiB", "KiB"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="power of two"):
        cases.parse_size(text)


# --- Statistics --------------------------------------------------------------


def test_figures_are_those_of_numpy() -> None:
    generator = np.random.default_rng(0)
    rounds = [
        Measurement(list(generator.exponential(1e-5, count)), 100, seconds)
        for count, seconds in ((50, 0.1), (70, 0.2), (90, 0.9))
    ]
    found = summarize(4096, rounds)
    all_us = np.concatenate([r.latency_s for r in rounds]) * 1e6
    assert found.op_s == pytest.approx(np.median([1000, 500, 100 / 0.9]))
    assert found.mb_s == pytest.approx(500 * 4096 / 1e6)
    assert found.p50_us == pytest.approx(np.percentile(all_us, 50), abs=1e-3)
    assert found.p99_us == pytest.approx(np.percentile(all_us, 99), abs=1e-3)
    means = [np.mean(r.latency_s) * 1e6 for r in rounds]
    assert found.mean_us == pytest.approx(np.median(means), abs=1e-3)
    assert found.operations == 210


def test_too_few_operations_have_no_p99() -> None:
    few = summarize(1, [Measurement([1e-6] * 99, 1, 1.0)])
    enough = summarize(1, [Measurement([1e-6] * 50, 1, 1.0)] * 2)
    assert (few.p99_us, enough.p99_us) == (None, 1.0)
    mean_only = summarize(1, [Measurement([], 1, 1.0, mean_s=7e-6)])
    assert (mean_only.p50_us, mean_only.mean_us) == (None, 7.0)


def test_a_peer_that_wins_is_named() -> None:
    def row(subject: str, role: str, medium: str, us: float, op_s: float) -> Row:
        one = Measurement([us * 1e-6], int(op_s), 1.0)
        return Row(SMALL, subject, role, medium, summarize(SMALL.size, [one]))

    rows = [
        row("memcpy", "floor", "shm", 1, 9000),
        row("ours", "ours", "shm", 4, 2000),
        row("slow", "peer", "shm", 8, 1000),
        row("fast", "peer", "shm", 2, 1500),
        row("elsewhere", "peer", "tcp", 1, 9999),
        Row(SMALL, "broken", "peer", "shm", None, "died"),
    ]
    rate, latency = figures.duels(rows)
    assert (rate.what, rate.peer, rate.factor) == ("rate", "fast", 2000 / 1500)
    assert (latency.what, latency.peer, latency.factor) == ("latency", "fast", 0.5)
    result = put.Result(put.Settings(), rows, {}, "a machine", 0.0, {})
    assert report.verdict(result) == [
        "ours, rate: as good as the best peer or better in 1 of 1 cases",
        "ours, latency: as good as the best peer or better in 0 of 1 cases",
        "  single 1 KiB: fast is 2.00 times better",
    ]


# --- Subjects that misbehave -------------------------------------------------

ENDS = """
import os, signal, time
import numpy as np
from . import memcpy

class Target(memcpy.Target):
    pass

class Initiator(memcpy.Initiator):
    def write(self, slot):
        {write}
    begin = write
"""


@pytest.fixture
def ends(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Adds a module to a copy of the ends: `ends("name", "a line of write()")`."""
    copy = tmp_path / "_bench"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(pathlib.Path(cases.__file__).parent, copy, ignore=ignored)
    monkeypatch.setattr(child_process, "_SCRIPT", copy / "start_child.py")

    def add(name: str, write: str, first_line: str = "") -> ChildSubject:
        text = first_line + textwrap.dedent(ENDS).format(write=write)
        (copy / "ends" / f"{name}.py").write_text(text)
        return ChildSubject(name, "peer", "shm", name)

    return add


def measure(subject: ChildSubject, plan: list[Case]) -> list[Row]:
    """Rows of a run with this subject alone, and a good one after it."""
    settings = put.Settings(rounds=1, seconds=0.001)
    good = ChildSubject("good", "floor", "shm", "memcpy")
    outcomes, failed = put.take_turns([subject, good], plan, settings, lambda _: None)
    return put.rows_of([subject, good], plan, outcomes, failed)


def test_a_subject_that_dies_has_its_reason_in_its_row(ends) -> None:
    death = "print('last words'); os.kill(os.getpid(), signal.SIGKILL)"
    bad, good = measure(ends("dies", death), [SMALL])
    assert good.figures is not None
    assert not good.reason
    assert bad.figures is None
    assert "ended during 'measure' with signal SIGKILL" in bad.reason


def test_a_subject_that_hangs_is_ended(ends, monkeypatch) -> None:
    monkeypatch.setattr(subjects, "CASE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(child_process, "_GRACE_S", 0.1)
    bad, good = measure(ends("hangs", "time.sleep(1000)"), [SMALL])
    assert good.figures is not None
    assert bad.figures is None
    assert "no answer to 'measure' in 1" in bad.reason


def test_a_subject_that_fails_one_case_has_the_others(ends) -> None:
    write = "assert len(self._copies[0]) == 1, 'no pages'; super().write(slot)"
    paged = Case("paged", 1 << 10, peers=1, window=4)
    failed, _, went, _ = measure(ends("picky", write), [paged, SMALL])
    assert failed.figures is None
    assert failed.reason == "picky initiator: AssertionError: no pages"
    assert went.figures is not None


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("lazy", "pass"),
        ("wrong", "super().write(slot); self._targets[0][7] = ~self.memory[7]"),
    ],
)
def test_bytes_are_verified_at_the_target(ends, name: str, write: str) -> None:
    bad, _ = measure(ends(name, write), [SMALL])
    assert bad.figures is None
    assert "wrong bytes at target 0" in bad.reason


def test_what_a_library_prints_is_no_answer(ends) -> None:
    chatty = ends("chatty", "os.write(1, b'{}\\n'); print(3); super().write(slot)")
    row, _ = measure(chatty, [SMALL])
    assert row.figures is not None


def test_a_package_that_is_missing_is_asked_for(ends) -> None:
    subject = ends("absent", "pass", first_line="import no_such_package\n")
    assert "no_such_package" in measure(subject, [SMALL])[0].reason
    subject.missing = subjects.INSTALL_PEERS
    row = measure(subject, [SMALL])[0]
    assert row.figures is None
    assert row.reason == "not installed: pip install 'jaxfabric[peers]'"


def test_an_interpreter_that_is_missing_is_a_reason() -> None:
    subject = ChildSubject("x", "peer", "shm", "memcpy", python="/no/python")
    assert "/no/python" in measure(subject, [SMALL])[0].reason


def test_an_interrupt_leaves_what_was_measured(ends) -> None:
    @dataclasses.dataclass
    class Interrupted(ChildSubject):
        def measure(self, plan, seconds):
            yield next(iter(super().measure(plan, seconds)))
            raise KeyboardInterrupt

    other = Case("paged", 1 << 10, peers=1, window=4)
    rows = measure(Interrupted("memcpy", "floor", "shm", "memcpy"), [SMALL, other])
    assert [bool(row.figures) for row in rows] == [True, False, False, False]
    assert [row.reason for row in rows] == ["", *3 * ["not measured"]]


def test_children_end_with_their_context() -> None:
    start = functools.partial(Child, python=sys.executable, environment={})
    with start("Target", "memcpy", 4096, {}) as child:
        child.wait_until_ready()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
    with start("Target", "memcpy", -1, {}) as child:
        with pytest.raises(SubjectFailed, match="memcpy target: OSError"):
            child.wait_until_ready()


# --- fi_rma_bw and ib_write_bw -----------------------------------------------

FAKE_TOOL = """\
#!{python}
import socket, sys
port = int(next(a for a in sys.argv if a.startswith("-E=")).removeprefix("-E="))
if sys.argv[-1] == "127.0.0.1":
    socket.create_connection(("127.0.0.1", port)).close()
    print("bytes   iters   total       time     MB/sec    usec/xfer   Mxfers/sec")
    print("1k      1k      1m        0.34s    193.46      {us}       0.00")
else:
    socket.create_server(("127.0.0.1", port)).accept()
"""


def test_the_tool_of_libfabric_is_run_and_read(tmp_path, monkeypatch) -> None:
    subject = fi_rma_bw.FiRmaBw(provider="tcp", medium="tcp")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(NotInstalled, match="not on PATH"):
            list(subject.measure([SMALL], 0.001))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool = tmp_path / "fi_rma_bw"
    tool.write_text(FAKE_TOOL.format(python=sys.executable, us="5.25"))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    ((case, outcome),) = subject.measure([SMALL], 0.001)
    assert case == SMALL
    assert isinstance(outcome, Measurement)
    found = summarize(case.size, [outcome])
    assert found.op_s == pytest.approx(1e6 / 5.25)
    assert (found.p50_us, found.mean_us) == (None, 5.25)
    tool.write_text(FAKE_TOOL.format(python=sys.executable, us="nothing"))
    ((_, outcome),) = subject.measure([SMALL], 0.001)
    assert "printed no figures" in str(outcome)


@pytest.mark.parametrize(
    ("printed", "seconds"),
    [
        ("15.15\n", (1 << 16) / (15.15 * (1 << 20))),
        ("0.00\n", None),
        ("Couldn't connect\n15.15\n", None),
    ],
)
def test_ib_write_bw_prints_mebibytes_per_second(
    printed: str, seconds: float | None
) -> None:
    subject = ib_write_bw.IbWriteBw(medium="verbs", device="rxe0")
    assert subject.seconds_per_write(printed, 1 << 16) == seconds
    command = " ".join(subject.command(1 << 16, 100, 4, 7))
    assert "-d rxe0 " in command
    assert command.endswith("-p 7 -u 16 -s 65536 -n 100 -t 4")


# --- All of it ---------------------------------------------------------------


@pytest.mark.parametrize("places", [(), ("--one-place",)])
def test_a_quick_run_over_floors_and_shm(
    places: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "put.json"
    text = run_child(
        *("-m", "jaxfabric._cli", "bench", "put", "--quick", "--counted"),
        *("--transport", "shm", "--subjects", "memcpy,jaxfabric"),
        *("--sizes", "1KiB,64KiB", "--json", str(file), *places),
    )
    assert ("in one place" in text) == bool(places)
    found = json.loads(file.read_text())
    assert set(found) == {
        "benchmark",
        "machine",
        "settings",
        "versions",
        "rows",
        "against_best_peer",
    }
    assert found["machine"]["cores"] == os.cpu_count()
    assert len(found["rows"]) == 3 * 3 * 2  # subjects, kinds, sizes
    for row in found["rows"]:
        assert not row["reason"], row
        assert row["mb_s"] == pytest.approx(row["op_s"] * row["size"] / 1e6)
        assert row["p50_us"] > 0
        assert row["operations"] > 0
        assert row["medium"] == "shm"
        assert f"{row['mb_s']:.1f}" in text
    assert {row["role"] for row in found["rows"]} == {"floor", "ours"}
    assert "proves nothing about hardware" in text
    assert found["machine"]["processor"] in text


def test_pages_of_kv_caches_have_the_sizes_that_were_asked_for(
    tmp_path: pathlib.Path,
) -> None:
    file = tmp_path / "kv.json"
    text = run_child(
        *("-m", "jaxfabric._cli", "bench", "kv", "--quick", "--transport", "shm"),
        *("--subjects", "memcpy,jaxfabric", "--page-sizes", "8KiB,1KiB"),
        *("--pages", "6", "--json", str(file)),
    )
    found = json.loads(file.read_text())
    assert found["benchmark"] == "kv"
    assert len(found["rows"]) == 3 * 2  # subjects (ours counted, too), page sizes
    for row, page in zip(found["rows"], [1 << 10] * 3 + [1 << 13] * 3, strict=True):
        assert (row["pages"], row["page_bytes"]) == (6, page)
        assert not row["reason"], row
        assert f"{6 * row['op_s']:.0f}" in text
    assert "6 pages of 8 KiB" in text
    assert "pages/s" in text


def test_subjects_follow_the_transports() -> None:
    def names(*transports: str) -> list[str]:
        settings = put.Settings(transports=transports)
        return [subject.name for subject in put.subjects_of(settings)]

    assert names("shm") == ["memcpy", "jaxfabric shm", "NIXL shm", "fi_rma_bw shm"]
    assert names("ofi/tcp") == [
        *("sockets", "jaxfabric ofi/tcp", "NIXL tcp", "Mooncake tcp", "fi_rma_bw tcp")
    ]
    assert names("ofi/efa-direct") == ["jaxfabric ofi/efa-direct"]
    assert names("verbs") == ["jaxfabric verbs", "ib_write_bw"]


def test_it_draws(tmp_path: pathlib.Path) -> None:
    rows = [
        Row(
            Case(kind, size, 2, 4),
            name,
            role,
            "shm",
            summarize(size, [Measurement([1e-6 * size], 10, 0.1)]),
        )
        for kind in cases.KINDS
        for size in (1024, 4096)
        for name, role in (("memcpy", "floor"), ("jaxfabric shm", "ours"))
    ]
    result = put.Result(put.Settings(), rows, {}, "a machine", 0.0, {})
    file = tmp_path / "put.svg"
    report.plot(result, file)
    assert "jaxfabric shm" in file.read_text() or file.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kinds", "double"), "'double' is none of single, paged, scatter"),
        (("--sizes", "3KiB"), "power of two"),
        (("--subjects", "nccl"), "'nccl' is none of memcpy"),
        (("--transport", "shm,nope"), "'nope' is none of shm, verbs, ofi/efa-direct"),
        (("--transport", "fake"), "'fake' is none of shm"),  # joins no processes
        (("--transport", " "), "is empty"),
    ],
)
def test_bad_options_are_refused(
    arguments: tuple[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(put, "run", lambda *_: pytest.fail("it has started"))
    result = CliRunner().invoke(_bench_app.app, ["put", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("command", ["kv", "moe"])
def test_no_benchmark_starts_with_a_transport_that_there_is_not(command: str) -> None:
    result = CliRunner().invoke(_bench_app.app, [command, "--transport", "nope"])
    assert result.exit_code == 2
    assert "'nope' is none of shm" in " ".join(result.output.split())


@pytest.mark.parametrize(("floor", "code"), [("", 1), (",sockets", 0)])
def test_a_transport_that_cannot_be_used_is_said_once(
    floor: str, code: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXFABRIC_LIBFABRIC", "/nowhere/libfabric.so.1")
    file = tmp_path / "put.json"
    subjects = ("--subjects", f"jaxfabric{floor}", "--transport", "ofi/tcp")
    result = CliRunner().invoke(
        _bench_app.app, ["put", "--quick", *subjects, "--json", str(file)]
    )
    assert result.exit_code == code, result.output
    assert result.output.count("/nowhere/libfabric.so.1") == 1
    assert ("nothing was measured" in result.output) == bool(code)
    assert ("single 64 KiB" in result.output) == (not code)
    rows = json.loads(file.read_text())["rows"]
    ours = [row for row in rows if row["role"] == "ours"]
    assert len(ours) == 3 * 3  # kinds, sizes
    for row in ours:
        assert "/nowhere/libfabric.so.1" in row["reason"]


def test_a_reason_that_differs_stays_beside_its_case() -> None:
    cases_ = [dataclasses.replace(SMALL, size=size) for size in (1 << 10, 1 << 12)]
    one = summarize(1, [Measurement([1e-6], 1, 1.0)])
    rows = [
        *(Row(case, "never", "peer", "shm", None, "gone") for case in cases_),
        *(Row(c, "twice", "peer", "shm", None, c.label) for c in cases_),
        Row(cases_[0], "once", "peer", "shm", one),
        Row(cases_[1], "once", "peer", "shm", None, "gone"),
    ]
    assert report.failed_throughout(rows) == {"never": "gone"}
