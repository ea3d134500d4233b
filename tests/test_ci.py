"""CI's stages: time limits are enforced, and verdicts are told right."""

from __future__ import annotations

import importlib
import re
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`.ci/run_stages.py` as a module that leaves a real run's files alone."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    module = importlib.import_module("run_stages")
    monkeypatch.setattr(module, "WORK", tmp_path)
    return module


def _only(
    ci: ModuleType, stages: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Makes these all stages that there are, the first one instead of `machine`."""
    monkeypatch.setattr(ci.stages, "MACHINE", stages[0])
    monkeypatch.setattr(ci.stages, "STAGES", stages)
    monkeypatch.setattr(ci.stages, "LONG_STAGES", ())


def test_a_whole_run_ends_within_forty_five_minutes(ci: ModuleType) -> None:
    # The stage that is under way at the limit has two waits of KILL_AFTER_S to end.
    assert ci.RUN_LIMIT_S + 2 * ci.KILL_AFTER_S <= 45 * 60
    assert all(0 < stage.cap_s < ci.RUN_LIMIT_S for stage in ci.stages.STAGES)


def test_a_run_over_its_limit_fails_the_stages_that_are_left(
    ci: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (
        ci.Stage("good", 20, "true"),
        ci.Stage("endless", 20, "sleep 60"),
        ci.Stage("late", 20, "echo it ran; exit 77"),
    )
    _only(ci, stages, monkeypatch)
    monkeypatch.setattr(ci, "RUN_LIMIT_S", 3)
    started = time.monotonic()
    assert ci.main([]) == 1
    assert time.monotonic() - started < 10
    table = capsys.readouterr().out
    assert re.search(r"^good .* passed$", table, re.MULTILINE)
    late = r"failed: over the run's time, which left it [23] s$"
    assert re.search(rf"^endless .* {late}", table, re.MULTILINE)
    late = r"failed: not begun: the run's time was over$"
    assert re.search(rf"^late .* {late}", table, re.MULTILINE)
    assert "it ran" not in table
    closing = table.splitlines()[-1]
    assert re.fullmatch(
        r"1 passed, 2 failed \(endless: over the run's time, which left it [23] s; "
        r"late: not begun: the run's time was over\), 0 skipped",
        closing,
    )


def test_stages_that_are_named_have_their_own_caps_alone(
    ci: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (ci.Stage("good", 20, "true"), ci.Stage("named", 20, "sleep 2"))
    _only(ci, stages, monkeypatch)
    monkeypatch.setattr(ci, "RUN_LIMIT_S", 1)
    assert ci.main(["named"]) == 0


def test_stage_names_are_unique(ci: ModuleType) -> None:
    names = [stage.name for stage in ci.stages.STAGES + ci.stages.LONG_STAGES]
    assert len(set(names)) == len(names)


def test_every_stage_is_explained_to_contributors(ci: ModuleType) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    stages = {*ci.stages.STAGES, *ci.stages.LONG_STAGES} - {ci.stages.MACHINE}
    assert [stage.name for stage in stages if f"`{stage.name}`" not in text] == []


def test_sanitizers_run_over_the_libfabric_of_the_package(ci: ModuleType) -> None:
    # Debian's can neither fence nor renew, so those tests would be skipped.
    assert any("mpich" in requirement for requirement in ci.stages.OFI_REQUIREMENTS)
    scripts = {stage.name: stage.script for stage in ci.stages.STAGES}
    for name in ("cpp-asan", "cpp-tsan"):
        assert ci.stages.OFI_REQUIREMENTS[0] in scripts[name]
        assert "export JAXFABRIC_LIBFABRIC" in scripts[name]


def test_ci_runs_the_readmes_own_two_commands(ci: ModuleType) -> None:
    example, tests = ci.stages.readme_commands((ROOT / "README.md").read_text())
    assert "examples/train_moe.py" in example
    assert "pytest" in tests
    scripts = {stage.name: stage.script for stage in ci.stages.STAGES}
    assert scripts["example"].endswith(example)
    assert scripts["tests-py311"].endswith(tests)


@pytest.mark.parametrize("block", ["", "```sh\none\n```\n", "```\n1\n2\n3\n```\n"])
def test_a_readme_without_exactly_two_commands_is_refused(
    ci: ModuleType, block: str
) -> None:
    with pytest.raises(ValueError, match="not 2"):
        ci.stages.readme_commands(f"# Title\n{block}Text\n")


def test_a_stage_over_its_cap_is_ended_and_fails(ci: ModuleType) -> None:
    started = time.monotonic()
    result = ci.run_stage(ci.Stage("endless", 1, "sleep 60"))
    assert result.verdict == "failed"
    assert result.reason == "over its cap of 1 s"
    assert time.monotonic() - started < 30


def test_a_process_left_behind_does_not_hold_the_stage(
    ci: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ci, "KILL_AFTER_S", 1)
    started = time.monotonic()
    result = ci.run_stage(ci.Stage("orphan", 20, "setsid sleep 12 & exit 0"))
    assert result.verdict == "passed"
    assert time.monotonic() - started < 10


def test_any_failing_line_fails_the_stage(ci: ModuleType) -> None:
    result = ci.run_stage(ci.Stage("broken", 10, "false | true\necho unreachable"))
    assert (result.verdict, result.reason) == ("failed", "exit code 1")


def test_a_kill_before_the_cap_is_not_called_the_cap(ci: ModuleType) -> None:
    result = ci.run_stage(ci.Stage("out-of-memory", 20, "exit 137"))
    assert result.reason == "exit code 137"


def test_skips_are_folded_by_reason(ci: ModuleType) -> None:
    skipped = ci.run_stage(ci.Stage("absent", 10, "echo no such tool; exit 77"))
    script = """
echo 'SKIPPED [11] tests/test_x.py:3: no RDMA device'
echo 'SKIPPED [1] tests/test_y.py:8: no RDMA device'
echo 'SKIPPED /a/b.cc:7: one piece: always'
"""
    inner = ci.run_stage(ci.Stage("partial", 10, script))
    lines = ci.report([skipped, inner]).splitlines()
    assert "skipped (13):" in lines
    assert "  partial: no RDMA device x 12" in lines
    assert "  partial: one piece: always" in lines
    assert lines[-1] == "1 passed, 0 failed, 1 skipped (absent: no such tool)"


def test_a_failed_stages_last_lines_are_shown_again_before_the_table(
    ci: ModuleType,
) -> None:
    script = "seq 1 100; printf '%0500d\\n' 7; echo 'the reason'; exit 3"
    failed = ci.run_stage(ci.Stage("bad", 10, script))
    passed = ci.run_stage(ci.Stage("good", 10, "echo not shown"))
    text = ci.report([failed, passed])
    end, _, table = text.partition("\nstage ")
    assert "--- the end of bad (exit code 3):" in end
    assert end.rstrip().endswith("the reason")
    shown = end.split("(exit code 3):\n")[1].splitlines()
    assert [line.strip() for line in shown if line][:2] == ["88", "89"]
    assert max(map(len, shown)) < 210
    assert "not shown" not in text
    assert re.search(r"^bad .* failed: exit code 3$", table, re.MULTILINE)


def test_failed_tests_are_named_in_the_table_and_the_closing_line(
    ci: ModuleType,
) -> None:
    script = """
echo 'FAILED tests/test_x.py::test_one[ofi/tcp] - AssertionError: no'
echo 'ERROR tests/test_y.py::test_two'
echo '[  FAILED  ] SuiteTest.Three (35 ms)'
echo '[  FAILED  ] SuiteTest.Three'
echo '[  FAILED  ] Ranks/SuiteTest.Five/2, where GetParam() = 4 (3 ms)'
echo '          4 - ofi_fence_test (Failed)'
echo '[  FAILED  ] 1 test, listed below:'
exit 1
"""
    failed = ci.run_stage(ci.Stage("bad", 10, script))
    names = (
        "tests/test_x.py::test_one[ofi/tcp], tests/test_y.py::test_two, "
        "SuiteTest.Three, Ranks/SuiteTest.Five/2, ofi_fence_test"
    )
    assert failed.reason == f"exit code 1: {names}"
    lines = ci.report([failed]).splitlines()
    assert lines[-1] == f"0 passed, 1 failed (bad: exit code 1: {names}), 0 skipped"
    assert any(re.fullmatch(rf"bad .* {re.escape(names)}", line) for line in lines)


def test_the_closing_line_names_failures_which_set_the_exit_code(
    ci: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (ci.Stage("good", 10, "true"), ci.Stage("bad", 10, "exit 3"))
    _only(ci, stages, monkeypatch)
    assert ci.main([]) == 1
    closing = capsys.readouterr().out.splitlines()[-1]
    assert closing == "1 passed, 1 failed (bad: exit code 3), 0 skipped"
    assert ci.main(["good"]) == 0
    assert ci.main(["nonsense"]) == 2


def test_run_lists_every_stage() -> None:
    run = subprocess.run(
        ["bash", str(ROOT / ".ci/run"), "--list"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "tests-py311" in run.stdout
    assert "long" in run.stdout
