"""bench moe: its routes and counts, and that wrong or failing subjects are told."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from moe_cases import NEEDS_NATIVE, make_mesh
from typer.testing import CliRunner

import jaxfabric as jf
from jaxfabric._bench import (
    machine,
    moe,
    moe_case,
    moe_operands,
    moe_programs,
    moe_rank,
    moe_report,
    nvlink,
    rank_times,
)
from jaxfabric._bench.moe_case import Case, Row
from jaxfabric._cli import _bench_app
from jaxfabric.moe import _wire

TINY = moe.Settings(
    tokens=(8,),
    routings=("uniform",),
    hidden=64,
    experts=8,
    top_k=3,
    seconds=0.01,
    iterations=6,
    decode_length=2,
    queued=True,
)


@pytest.mark.parametrize("routing", moe_case.ROUTINGS)
def test_routes_and_what_they_come_to(routing: str) -> None:
    case = Case(300, routing, ranks=4, hidden=8, experts=16, top_k=5)
    ids = case.ids()
    assert ids.shape == (1200, 5)
    assert all(len(set(row)) == 5 for row in ids.tolist())
    assert (ids == case.ids()).all()
    counts = np.zeros((4, 4), int)
    for token, row in enumerate(ids.tolist()):
        for rank in {expert // 4 for expert in row}:
            counts[token // 300, rank] += 1
    load = case.load()
    assert (load.counts == counts).all()
    assert load.sent == max(counts.sum(0).max(), counts.sum(1).max())
    assert load.remote < load.sent
    by_expert = np.bincount(ids.ravel(), minlength=16)
    assert load.imbalance == pytest.approx(by_expert.max() / 375)
    assert (load.imbalance > 1.5) == (routing == "skewed")


def test_bytes_of_a_row() -> None:
    case = Case(1, "uniform", 2, hidden=7168)
    assert case.row_bytes("bf16") == 14336
    assert case.row_bytes("e4m3") == 7168 + 4 * _wire.blocks(7168)
    odd = dataclasses.replace(case, hidden=129)
    assert odd.row_bytes("e4m3") == 129 + 8


def test_phases_and_chains() -> None:
    settings = moe.Settings(tokens=(512, 513))
    assert settings.case(512, "uniform", 2).label == "decode, 512 tokens, uniform"
    assert settings.case(513, "skewed", 2).phase == "prefill"
    assert (settings.length(512), settings.length(513)) == (50, 20)
    assert moe_rank.lengths_of(settings, 512) == [1, 50]
    assert moe.Settings.from_json(json.loads(json.dumps(dataclasses.asdict(TINY)))) == (
        TINY
    )
    assert tuple(moe_programs.SUBJECTS) == moe.SUBJECTS


def test_a_figure_is_of_the_slowest_rank() -> None:
    calls = []
    times = rank_times.time_for(lambda: calls.append(1), seconds=0, most=9)
    assert len(times.seconds) == 5  # at least
    assert len(calls) == 3 + 5
    calls.clear()
    times = rank_times.time_queued(lambda: calls.append(1), seconds=0, most=9)
    assert len(times.seconds) == 5
    assert len(calls) == 3 + 1 + 5  # one before it to begin at
    times = rank_times.Times(np.arange(1, 102) / 1e3)
    assert (times.p50, times.p99) == pytest.approx((0.051, 0.1))


@NEEDS_NATIVE
def test_every_subject_on_devices_of_a_process() -> None:
    mesh = make_mesh(4)
    with jf.Fabric(mesh):
        rows = list(moe_rank.rows_of_tokens(8, mesh, TINY, moe_rank.Floor(True)))
        assert moe_rank.barrier_us(mesh, TINY) > 0
    assert tuple(row.subject for row in rows) == moe.SUBJECTS
    for row in rows:
        if row.subject == "lax.ragged_all_to_all":
            assert row.reason == "XLA has none on CPU"
            continue
        assert not row.reason, row
        assert row.p50_us is not None
        assert row.floor_us is not None
        assert row.p50_us > 0
        assert row.p99_us is None  # of six iterations
        assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


def ragged_on_cpu(case: Case) -> Any:
    """The subject's result, from gathered rows."""
    counts = case.load().counts
    begins = np.cumsum(counts, 1) - counts

    def step(rows: Any, counts_of_all: Any) -> Any:
        del counts_of_all
        me = jax.lax.axis_index(moe_operands.AXIS)
        everyone = jax.lax.all_gather(rows, moe_operands.AXIS)
        parts = [
            np.concatenate(
                [
                    s * len(rows) + begins[s, d] + np.arange(counts[s, d])
                    for s in range(4)
                ]
            )
            for d in range(4)
        ]
        index = np.full((4, len(rows)), -1)
        for d, part in enumerate(parts):
            index[d, : len(part)] = part
        mine = jax.numpy.asarray(index)[me]
        taken = everyone.reshape(-1, rows.shape[1])[mine]
        return jax.numpy.where(mine[:, None] < 0, 0, taken)

    return step


@NEEDS_NATIVE
def test_wrong_results_are_told_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(4)
    case = TINY.case(8, "uniform", 4)
    given = moe_operands.operands(case, mesh)
    pair = moe_programs.SUBJECTS["lax.all_to_all by hand"]
    ragged = dataclasses.replace(
        moe_programs.SUBJECTS["lax.ragged_all_to_all"], step=ragged_on_cpu
    )

    def twice(subject: moe_programs.Subject) -> moe_programs.Subject:
        def step(case: Case) -> Any:
            right = subject.step(case)
            return lambda *operands: 2 * right(*operands)

        return dataclasses.replace(subject, step=step)

    for subject in (pair, ragged):
        for one, words in ((subject, ""), (twice(subject), "wrong by")):
            once = moe_programs.chain(one, case, mesh, 1)
            told = moe_rank.check(one, case, mesh, once, given)
            assert words in told
            assert bool(words) == bool(told)

    # One that is wrong, and one that raises, have a reason each; others go on.
    def fails(case: Case) -> Any:
        raise NotImplementedError("not on this\nmachine")

    broken = {
        **moe_programs.SUBJECTS,
        "pair": twice(pair),
        "dispatch": dataclasses.replace(
            moe_programs.SUBJECTS["dispatch"], step=lambda case: lambda *a: fails(case)
        ),
    }
    monkeypatch.setattr(moe_rank, "SUBJECTS", broken)
    settings = dataclasses.replace(TINY, subjects=("dispatch", "pair", "combine"))
    with jf.Fabric(mesh):
        rows = list(moe_rank.rows_of_tokens(8, mesh, settings, moe_rank.Floor(True)))
    assert rows[0].reason == "not on this"
    assert "wrong by" in rows[1].reason
    assert [row.p50_us is None for row in rows] == [True, True, False]


def test_without_gpus_there_is_no_nvlink_floor() -> None:
    if moe.gpu_count() > 1:
        pytest.skip("this machine has GPUs")
    with pytest.raises(nvlink.NotMeasured):
        nvlink.copy_rate()
    floor = moe_rank.Floor(on_cpu=False)
    assert floor.describe().startswith("no NVLink floor: ")
    assert floor.us(TINY.case(8, "uniform", 2), "bf16") is None


def test_it_shows_and_draws(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Row(
            Case(tokens, routing, 2), name, role, what, "bf16", 10.0 * tokens, 1.5, 9, 2
        )
        for tokens in (1, 1024)
        for routing in moe_case.ROUTINGS
        for name, role, what in (
            ("dispatch", "ours", "dispatch"),
            ("pair", "ours", "pair"),
            ("lax.all_to_all", "peer", "exchange"),
        )
    ]
    rows.append(dataclasses.replace(rows[0], p50_us=None, reason="no such thing"))
    result = {
        "machine": machine.describe() | {"load_after": 1.0},
        "machine_line": "a machine",
        "devices": "2 ranks",
        "transport": "shm",
        "floor": "memcpy",
        "barrier_us": 3.5,
        "imbalance": {row.case.label: 1.5 for row in rows},
        "rows": [row.to_json() for row in rows],
    }
    moe_report.show(result)
    text = capsys.readouterr().out
    for words in (
        "a machine",
        "barrier 3.5 us",
        "prefill, 1024 tokens",
        "no such thing",
    ):
        assert words in text
    assert "10240.0" in text
    assert moe_report.of_floor(rows[-2]) == "5120.0"
    moe_report.plot(result, tmp_path / "moe.svg")
    assert (tmp_path / "moe.svg").stat().st_size > 10_000


@NEEDS_NATIVE
def test_the_command_over_two_processes(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "moe.json"
    command = [
        *(sys.executable, "-m", "jaxfabric._cli", "bench", "moe", "--quick"),
        *("-n", "2", "--platform", "cpu", "--routing", "skewed", "--json", str(file)),
        *("--subjects", "dispatch, e4m3;pair;lax.all_to_all", "--tokens", "4"),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["devices"].startswith("2 ranks (cpu) of 2 processes")
    assert found["transport"] == "shm"
    assert [row["tokens"] for row in found["rows"]] == [4] * 3
    for row in found["rows"]:
        assert not row["reason"], row
        assert row["routing"] == "skewed"
        assert f"{row['p50_us']:.1f}" in done.stdout
    assert found["machine"]["processor"] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--routing", "odd"), "'odd' is none of uniform, skewed"),
        (("--subjects", "nccl"), "'nccl' is none of dispatch"),
        (("--tokens", "4,x"), "no list of numbers"),
        (("--experts", "6", "-n", "4"), "6 experts do not divide by 4 ranks"),
        (("--top-k", "9", "--experts", "8"), "--top-k 9 of 8 experts"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(_bench_app.app, ["moe", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
