"""Runs CI's stages, each with a time limit, and reports how they ended.

The end of the output says all that matters, since a log may be cut at its front: the
last lines of each failed stage, the table, what was skipped, and a closing line that
names the failures. Standard library only, as stages.py.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TextIO

import stages
from stages import ROOT, SKIP_CODE, Stage

WORK = ROOT / "build" / "ci"  # virtual environments and build trees

RUN_LIMIT_S = 44 * 60  # for a whole run of STAGES: 45 minutes, less two KILL_AFTER_S
KILL_AFTER_S = 15  # from SIGTERM to SIGKILL when a stage's time is over

# Of a failed stage, shown again at the end.
TAIL_LINES = 15
TAIL_COLUMNS = 200
REASON_COLUMNS = 300

# Lines of pytest, GoogleTest and ctest that name a failed test.
FAILED_TEST = re.compile(
    r"(?:FAILED|ERROR) (\S+::\S+)"
    r"|\[  FAILED  \] ([^\s,]+\.[^\s,]+)"
    r"|\s*\d+ - (\S+) \((?:Failed|Timeout|SEGFAULT|.*Exception.*)\)"
)


@dataclass(frozen=True)
class Result:
    """How a stage ended."""

    stage: Stage
    verdict: str  # "passed", "failed" or "skipped"
    seconds: float
    reason: str = ""
    skips: tuple[str, ...] = ()  # tests that were skipped inside, with reasons
    tail: tuple[str, ...] = ()  # the last lines of its output


def _show(stream: TextIO, output: list[str]) -> None:
    with stream:
        for line in stream:
            print(line, end="", flush=True)
            output.append(line)


def _environment() -> dict[str, str]:
    """The stages' variables: what several builds compile alike is compiled once."""
    variables = {
        "CI": "true",
        "PIP_QUIET": "2",
        # Most of what is installed is never imported; what is, is compiled then.
        "PIP_COMPILE": "0",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    if shutil.which("ccache"):
        variables["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
        variables["CCACHE_DIR"] = str(WORK / "ccache")
        variables["CXX"] = "g++"  # as pip's builds call it: names are compared, too
    return os.environ | variables


def run_stage(stage: Stage, left_s: float = math.inf) -> Result:
    """Runs one stage, showing its output as it comes.

    Args:
        stage: what to run.
        left_s: what is left of the whole run's time, in seconds.
    """
    if left_s < 1:
        return Result(stage, "failed", 0, "not begun: the run's time was over")
    limit_s = int(min(stage.cap_s, left_s))
    print(f"\n=== {stage.name} (at most {limit_s} s)", flush=True)
    started = time.monotonic()
    timeout = ["timeout", f"--kill-after={KILL_AFTER_S}", str(limit_s)]
    process = subprocess.Popen(
        [*timeout, "bash", "-euo", "pipefail", "-c", stage.script],
        cwd=ROOT,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    output: list[str] = []
    # On a thread: whatever a stage left behind may hold the pipe open for ever.
    assert process.stdout is not None
    reader = threading.Thread(target=_show, args=(process.stdout, output), daemon=True)
    reader.start()
    code = process.wait()
    reader.join(KILL_AFTER_S)
    seconds = time.monotonic() - started
    lines = [line.rstrip() for line in output if line.strip()]
    skips = tuple(line.strip() for line in lines if line.startswith("SKIPPED "))
    if code == 0:
        return Result(stage, "passed", seconds, skips=skips)
    if code == SKIP_CODE:
        return Result(stage, "skipped", seconds, lines[-1] if lines else "")
    reason = f"exit code {code}"
    # timeout's own code, and a kill that came when the time was over: memory that
    # ran out ends a process by SIGKILL, too.
    if code == 124 or (code == 137 and seconds >= limit_s):
        over = (
            "its cap of" if limit_s == stage.cap_s else "the run's time, which left it"
        )
        reason = f"over {over} {limit_s} s"
    if names := failed_tests(lines):
        reason += f": {', '.join(names)}"
    said = [line for line in lines if not line.startswith("SKIPPED ")]
    tail = tuple(line[:TAIL_COLUMNS] for line in said[-TAIL_LINES:])
    return Result(stage, "failed", seconds, reason, skips, tail)


def failed_tests(lines: list[str]) -> list[str]:
    """Returns the names of the tests that a stage's output calls failed, each once."""
    found = (FAILED_TEST.match(line) for line in lines)
    return list(dict.fromkeys(match[match.lastindex or 0] for match in found if match))


def report(results: list[Result]) -> str:
    """Returns failed stages' last lines, table, skipped tests and closing line."""
    failed = [result for result in results if result.verdict == "failed"]
    lines = []
    for r in failed:
        lines += ["", f"--- the end of {r.stage.name} ({r.reason}):"]
        lines += [f"  {line}" for line in r.tail]
    lines += ["", f"{'stage':<16}{'seconds':>8}{'cap':>7}  verdict"]
    for r in results:
        verdict = f"{r.verdict}: {_cut(r.reason)}" if r.reason else r.verdict
        lines.append(
            f"{r.stage.name:<16}{r.seconds:>8.0f}{r.stage.cap_s:>7}  {verdict}"
        )
    total = sum(r.seconds for r in results)
    lines.append(f"{'all':<16}{total:>8.0f}{RUN_LIMIT_S:>7}")
    skips = fold_skips(results)
    lines += ["", f"skipped ({sum(skips.values())}):"]
    for skip, count in skips.items():
        lines.append(f"  {skip}" + (f" x {count}" if count > 1 else ""))
    lines += ["", closing_line(results)]
    return "\n".join(lines)


def fold_skips(results: list[Result]) -> Counter[str]:
    """Counts skipped tests by stage and reason, wherever in the stage they lie.

    A line of a stage is "SKIPPED [3] tests/test_x.py:7: why", as pytest says it, or
    without the number of tests.
    """
    folded: Counter[str] = Counter()
    for r in results:
        for skip in r.skips:
            parts = re.fullmatch(r"SKIPPED (?:\[(\d+)\] )?(?:\S+:\d+: )?(.*)", skip)
            assert parts is not None
            folded[f"{r.stage.name}: {parts[2]}"] += int(parts[1] or 1)
    return folded


def closing_line(results: list[Result]) -> str:
    """Returns how many stages passed, failed and were skipped, and which and why."""
    parts = []
    for verdict in ("passed", "failed", "skipped"):
        chosen = [r for r in results if r.verdict == verdict]
        names = "; ".join(f"{r.stage.name}: {_cut(r.reason)}" for r in chosen)
        told = f" ({names})" if chosen and verdict != "passed" else ""
        parts.append(f"{len(chosen)} {verdict}{told}")
    return ", ".join(parts)


def _cut(reason: str) -> str:
    return reason[:REASON_COLUMNS]


def _chosen(names: list[str], known: dict[str, Stage]) -> list[Stage]:
    chosen = [known[name] for name in names] or list(stages.STAGES)
    if stages.MACHINE not in chosen:
        chosen.insert(0, stages.MACHINE)
    return chosen


def main(names: list[str]) -> int:
    """Runs the named stages, or all of STAGES within RUN_LIMIT_S.

    Returns:
        The exit code: 0 if no stage failed.
    """
    deadline = math.inf if names else time.monotonic() + RUN_LIMIT_S
    known = {stage.name: stage for stage in stages.STAGES + stages.LONG_STAGES}
    if names == ["--list"]:
        for stage in known.values():
            print(f"{stage.name:<16}{stage.cap_s:>6} s")
        return 0
    if unknown := [name for name in names if name not in known]:
        print(f"no stage {unknown[0]!r}; there are: {', '.join(known)}")
        return 2
    WORK.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(WORK / "wheel", ignore_errors=True)
    results = [
        run_stage(stage, deadline - time.monotonic()) for stage in _chosen(names, known)
    ]
    print(report(results), flush=True)
    return int(any(r.verdict == "failed" for r in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
