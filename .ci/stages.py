"""The stages of CI: what each runs, and how long it may take.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "ci"  # virtual environments and build trees

TOTAL_CAP_S = 40 * 60  # the sum of all caps in STAGES; tests/test_ci.py adds them up
KILL_AFTER_S = 15  # from SIGTERM to SIGKILL when a stage runs over its cap
SKIP_CODE = 77  # a stage that exits with it is skipped; its last line says why

APT_PACKAGES = (
    "bazel-bootstrap bazel-rules-java ca-certificates cmake g++ googletest iproute2 "
    "libfabric-dev libgmock-dev libgtest-dev libhwloc15 libibverbs-dev ninja-build "
    "python3-dev python3-venv"
)


@dataclass(frozen=True)
class Stage:
    """One stage: a bash script that runs in the checkout, under a time cap."""

    name: str
    cap_s: int
    script: str


@dataclass(frozen=True)
class Result:
    """How a stage ended."""

    stage: Stage
    verdict: str  # "passed", "failed" or "skipped"
    seconds: float
    reason: str = ""
    skips: tuple[str, ...] = ()  # tests that were skipped inside, with reasons


def readme_commands(readme: str) -> tuple[str, str]:
    """Returns the README's two promises: the example's and the tests' command.

    CI runs these lines themselves, so that the README cannot become untrue.

    Args:
        readme: the text of README.md.

    Raises:
        ValueError: the first code block does not hold exactly two lines.
    """
    block = re.search(r"^```[a-z]*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    lines = block.group(1).splitlines() if block else []
    if len(lines) != 2:
        raise ValueError(f"README.md's first code block has {len(lines)} lines, not 2")
    return lines[0], lines[1]


EXAMPLE_COMMAND, TEST_COMMAND = readme_commands((ROOT / "README.md").read_text())


def _venv(name: str, python: str = "python3") -> str:
    """Enters the virtual environment `name`, after creating it if need be."""
    return f"""
[ -x build/ci/{name}/bin/pip ] || {python} -m venv --clear build/ci/{name}
. build/ci/{name}/bin/activate
"""


def _cpp(name: str, *flags: str) -> str:
    """Builds the C++ tests, which need neither Python nor jaxlib, and runs them."""
    return f"""
cmake -S . -B build/ci/{name} -G Ninja -DJAXFABRIC_BUILD_TESTS=ON \
  -DJAXFABRIC_BUILD_PYTHON=OFF {" ".join(flags)}
cmake --build build/ci/{name}
ctest --test-dir build/ci/{name} --output-on-failure --no-tests=error -j2
awk '/: Skipped$/ {{ at = $1; getline; print "SKIPPED " at " " $0 }}' \
  build/ci/{name}/Testing/Temporary/LastTest.log
"""


MACHINE = Stage(
    "machine",
    60,
    f"""
dpkg -s {APT_PACKAGES} >/dev/null 2>&1 && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends {APT_PACKAGES}
""",
)

LINT = Stage(
    "lint",
    420,
    _venv("py311")
    + """
pip install '.[dev]'
ruff check
ruff format --check
mypy
find xla_ffi tests benchmarks -name '*.cc' -o -name '*.h' | sort |
  xargs clang-format --dry-run -Werror
cmake -S . -B build/ci/tidy -G Ninja -DPython_EXECUTABLE=$(command -v python)
find xla_ffi -name '*.cc' | sort |
  xargs -P$(nproc) -n1 clang-tidy --quiet -p build/ci/tidy
""",
)

SMOKE_PY312 = Stage(
    "smoke-py312",
    190,
    f"""
python=
for candidate in python3.12 "$(pyenv root 2>/dev/null)"/versions/3.12.*/bin/python; do
  "$candidate" -c 'import venv' 2>/dev/null && python=$candidate && break
done
[ -n "$python" ] || {{ echo 'no Python 3.12 on PATH or in pyenv'; exit {SKIP_CODE}; }}
"""
    + _venv("py312", '"$python"')
    + """
pip install --upgrade --upgrade-strategy=eager '.[test]'
pytest -m smoke
""",
)

BAZEL = Stage(
    "bazel",
    265,
    _venv("py311")
    + """
pip install 'jaxlib>=0.9.1,<0.11.1' 'nanobind>=3'
PYTHON_BIN_PATH=$(command -v python) \
  bazel --batch --output_user_root="$PWD/build/ci/bazel-root" test //...
""",
)

# Two hosts on one machine, each started as a cluster would start it; and the
# example's losses, which the README's test command leaves to this stage.
HOSTS = Stage(
    "hosts",
    130,
    _venv("py311")
    + """
pip install '.[test]'
python -P tests/hosts/run_two_hosts.py
pytest -m 'example and not slow'
""",
)

# The engine over network namespaces, and over libfabric's efa provider on a software
# device: what must be right. What must be fast is measured by `.ci/run network-rates`.
_NETWORK_BUILD = (
    _venv("py311")
    + """
pip install '.[test]'
cmake -S . -B build/ci/cpp -G Ninja -DJAXFABRIC_BUILD_TESTS=ON \
  -DJAXFABRIC_BUILD_PYTHON=OFF
cmake --build build/ci/cpp --target link_peer ofi_test softefa softefa_test
export JAXFABRIC_TEST_BUILD=build/ci/cpp
"""
)
NETWORK = Stage(
    "network",
    240,
    _NETWORK_BUILD
    + """
build/ci/cpp/tests/softefa/softefa_test --gtest_brief=1
pytest tests/network
""",
)

# The README's commands get environments of their own, or an earlier stage could
# bring what their extras forgot. The others share one and install what they need.
STAGES = (
    MACHINE,
    Stage("tests-py311", 620, _venv("py311") + TEST_COMMAND),
    HOSTS,
    Stage("example", 165, _venv("example") + EXAMPLE_COMMAND),
    SMOKE_PY312,
    Stage("cpp-asan", 290, _cpp("cpp-asan", "-DJAXFABRIC_SANITIZE=address")),
    Stage("cpp-tsan", 260, _cpp("cpp-tsan", "-DJAXFABRIC_SANITIZE=thread")),
    LINT,
    BAZEL,
)

# Longer forms, run by name only: the networks until the C++ stages leave them time.
# Bazel runs the C++ tests plain; `cpp` is the same through CMake.
LONG_STAGES = (
    NETWORK,
    Stage("cpp", 300, _cpp("cpp")),
    Stage("network-rates", 300, _NETWORK_BUILD + "pytest -m slow tests/network -s\n"),
    Stage("long", 5400, _venv("py311") + "pip install '.[test]'\npytest -m slow"),
    Stage(
        "parity",
        1800,
        _venv("parity") + "pip install '.[test,parity]'\npytest tests -k parity",
    ),
)


def _show(stream: TextIO, output: list[str]) -> None:
    with stream:
        for line in stream:
            print(line, end="", flush=True)
            output.append(line)


def run_stage(stage: Stage) -> Result:
    """Runs one stage, showing its output as it comes."""
    print(f"\n=== {stage.name} (at most {stage.cap_s} s)", flush=True)
    started = time.monotonic()
    timeout = ["timeout", f"--kill-after={KILL_AFTER_S}", str(stage.cap_s)]
    process = subprocess.Popen(
        [*timeout, "bash", "-euo", "pipefail", "-c", stage.script],
        cwd=ROOT,
        env=os.environ | {"CI": "true", "PIP_PROGRESS_BAR": "off"},
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
    lines = [line.strip() for line in output if line.strip()]
    skips = tuple(line for line in lines if line.startswith("SKIPPED "))
    if code == 0:
        return Result(stage, "passed", seconds, skips=skips)
    if code == SKIP_CODE:
        return Result(stage, "skipped", seconds, lines[-1] if lines else "")
    over = code in (124, 137)
    reason = f"over its cap of {stage.cap_s} s" if over else f"exit code {code}"
    return Result(stage, "failed", seconds, reason, skips)


def report(results: list[Result]) -> str:
    """Returns the table of verdicts, the skipped tests and the closing line."""
    lines = ["", f"{'stage':<14}{'seconds':>8}{'cap':>7}  verdict"]
    for r in results:
        verdict = f"{r.verdict}: {r.reason}" if r.reason else r.verdict
        lines.append(
            f"{r.stage.name:<14}{r.seconds:>8.0f}{r.stage.cap_s:>7}  {verdict}"
        )
    skips = [f"{r.stage.name}: {skip}" for r in results for skip in r.skips]
    skips += [f"{r.stage.name}: {r.reason}" for r in results if r.verdict == "skipped"]
    lines += ["", f"skipped ({len(skips)}):", *(f"  {skip}" for skip in skips), ""]
    count = {
        v: sum(r.verdict == v for r in results) for v in ("passed", "failed", "skipped")
    }
    lines.append(", ".join(f"{n} {verdict}" for verdict, n in count.items()))
    return "\n".join(lines)


def main(names: list[str]) -> int:
    """Runs the named stages, or all of STAGES; returns the exit code."""
    known = {stage.name: stage for stage in STAGES + LONG_STAGES}
    if names == ["--list"]:
        for stage in known.values():
            print(f"{stage.name:<14}{stage.cap_s:>6} s")
        return 0
    if unknown := [name for name in names if name not in known]:
        print(f"no stage {unknown[0]!r}; there are: {', '.join(known)}")
        return 2
    chosen = [known[name] for name in names] or list(STAGES)
    if MACHINE not in chosen:
        chosen.insert(0, MACHINE)
    WORK.mkdir(parents=True, exist_ok=True)
    results = [run_stage(stage) for stage in chosen]
    print(report(results), flush=True)
    return int(any(r.verdict == "failed" for r in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
