"""bench weights: its models, and that what it times is right."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import jaxfabric as jf
from jaxfabric._bench import weights, weights_model, weights_rank, weights_report
from jaxfabric._cli import _bench_app

pytest.importorskip("xxhash", reason="jf.weights needs jaxfabric[weights]")


@pytest.mark.parametrize("counts", [(4, 2), (1, 1), (2, 8), (8, 1)])
def test_every_size_has_a_plan(counts: tuple[int, int]) -> None:
    source, target = weights_model.layouts(1 << 22, *counts)
    assert (len(source.ranks), len(target.ranks)) == counts
    plan = jf.weights.plan(source, target)
    assert sum(plan.loads().values()) == source.nbytes == target.nbytes
    assert weights_model.layouts(1 << 30, *counts)[0].nbytes == 1 << 30


def test_the_model_on_paper_has_so_many_parameters() -> None:
    source, target = weights_model.large_layouts()
    assert len(source.ranks) == 256
    assert len(target.ranks) == 128
    parameters = sum(math.prod(leaf.shape) for leaf in source.leaves)
    assert parameters == pytest.approx(1.03e12, rel=0.01)
    text = weights_report.plan_only()
    for words in ("e4m3 on 128", "not a measurement", "together", "1233"):
        assert words in text


def test_contents_differ_wherever_a_mistake_could_hide() -> None:
    source, _ = weights_model.layouts(1 << 22, 4, 2)
    whole = [
        weights_rank.content(leaf, number, tuple(slice(0, n) for n in leaf.shape))
        for number, leaf in enumerate(source.leaves)
    ]
    seen = {one.tobytes() for one in whole}
    assert len(seen) == len(whole)
    for one in whole:
        assert np.isfinite(one.astype(np.float32)).all()
        for axis in range(one.ndim):
            assert (np.diff(one.view(np.uint16).astype(int), axis=axis) != 0).all()
    tiles = weights_rank.tiles_with_content(source, 3)
    assert sum(tile.nbytes for tile in tiles.values()) == source.nbytes // 4


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "weights.json"
    options = ["--bytes=2MiB", "--sources=2", "--targets=1", "--rounds=2"]
    run = CliRunner().invoke(
        _bench_app.app, ["weights", *options, f"--json={file}"], catch_exceptions=False
    )
    assert run.exit_code == 0, run.output
    for words in (
        "over shm",
        "push, whole",
        "push, span",
        "memory-traffic floor",
        "phases, ms",
        "phases, core ms of all ranks",
        "memory-traffic floor / whole push",
        "trainer 0 grew",
    ):
        assert words in run.output
    return json.loads(file.read_text())


def test_every_subject_is_verified_and_timed(measured: dict[str, Any]) -> None:
    (found,) = measured["results"]
    assert not found["failed"]
    assert len(found["floors"]) == 2
    for floors in found["floors"]:
        assert 0 < floors["wire_transfer_s"] <= floors["wire_s"]
    assert set(found["rounds"]) == set(weights.SUBJECTS)
    for rounds in found["rounds"].values():
        assert len(rounds) == 2
        assert all(each["seconds"] > 0 for each in rounds)
    for push in found["rounds"]["push"]:
        assert 0 < push["transfer_s"] <= push["span_s"]
        assert push["span_s"] <= push["total_s"] <= push["seconds"]
        assert push["writes"] >= 2
        core = {
            name: push["core"][name] for name in push["core"] if "of it" not in name
        }
        assert set(core) == {"pack", "seal", "transfer", "verify", "unpack", "take"}
        assert all(seconds > 0 for seconds in core.values())
        assert sum(core.values()) == pytest.approx(push["core_s"])
        assert push["core"]["of it write"] < core["transfer"]
    for peak in found["peaks"]:
        assert peak["own"] > 0
    names = [row.name for row in weights_report.rows_of(measured, found)]
    assert names[:3] == ["wire", "memcpy, once", "memory-traffic floor of a push"]


def test_a_push_that_quantises_is_verified_and_timed(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "weights.json"
    options = ["--bytes=2MiB", "--sources=1", "--targets=1", "--rounds=1", "--quantise"]
    run = CliRunner().invoke(
        _bench_app.app, ["weights", *options, f"--json={file}"], catch_exceptions=False
    )
    assert run.exit_code == 0, run.output
    assert "quantised to e4m3 on the way" in run.output
    assert "quantising, once" in run.output
    measured = json.loads(file.read_text())
    assert measured["target_nbytes"] < 0.6 * measured["nbytes"]
    (found,) = measured["results"]
    assert set(found["rounds"]) == {"push"}
    floors = found["floors"][0]
    assert floors["quantise"] > 0


def test_wrong_bits_are_told() -> None:
    class Wrong(weights.Ranks):
        def __init__(self) -> None:
            self.trainer, self.sampler = [], []

        def ask(self, *rest: Any, **more: Any) -> list[dict[str, Any]]:
            return [{"wrong": []}, {"wrong": ["layers.0.wq"]}]

    with pytest.raises(weights.RankFailed, match=r"push: 1 tiles .*layers\.0\.wq"):
        Wrong().check("push")


def test_a_rank_that_cannot_start_is_named() -> None:
    settings = weights.Settings(nbytes=1 << 20, sources=1, targets=1)
    with pytest.raises(weights.RankFailed, match=r"trainer 0: start: .*no-such"):
        with weights._started(settings, "no-such"):
            pass


@pytest.mark.parametrize(
    "options",
    [
        ["--bytes=1KiB"],
        ["--bytes=x"],
        ["--sources=3"],
        ["--subjects=push;nonsense"],
        ["--quantise", "--subjects=gather and broadcast"],
    ],
)
def test_bad_options_are_refused(options: list[str]) -> None:
    run = CliRunner().invoke(_bench_app.app, ["weights", *options])
    assert run.exit_code == 2, run.output


def test_quantiles_are_of_what_was_measured() -> None:
    values = [float(value) for value in range(1, 201)]
    assert weights_report.quantile(values, 0.5) == 100
    assert weights_report.quantile(values, 0.99) == 198
    rates = {"copy": 4.0, "hash": 2.0, "copy_core": 8.0, "hash_core": 4.0}
    assert weights_report.traffic_s(4, 4, 2, rates) == 4 + 4
    assert weights_report.traffic_s(4, 4, 2, rates, "_core") == 2 + 2
