"""The stages of CI: what each runs, and how long all of them may take.

Standard library only: this runs before anything is installed.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "ci"  # virtual environments and build trees

RUN_LIMIT_S = 44 * 60  # for a whole run of STAGES: 45 minutes, less two KILL_AFTER_S
KILL_AFTER_S = 15  # from SIGTERM to SIGKILL when a stage's time is over
SKIP_CODE = 77  # a stage that exits with it is skipped; its last line says why

APT_PACKAGES = (
    "bazel-bootstrap bazel-rules-java busybox-static ca-certificates ccache cmake g++ "
    "googletest ibverbs-providers ibverbs-utils iproute2 kmod libfabric-dev "
    "libgmock-dev libgtest-dev libhwloc15 libibverbs-dev ninja-build perftest "
    "python3-dev python3-venv qemu-system-x86 rdma-core"
)


@dataclass(frozen=True)
class Stage:
    """One stage: a bash script that runs in the checkout.

    The cap is about twice what the script takes: it ends what hangs. What a run may
    take as a whole is limited by RUN_LIMIT_S.
    """

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


def _install(extra: str) -> str:
    """Installs the package with an extra, from a wheel that is built once in a run.

    Only README's commands build their own.
    """
    return f"""
compgen -G 'build/ci/wheel/*.whl' >/dev/null ||
  pip wheel --no-deps --wheel-dir build/ci/wheel .
pip install --force-reinstall --no-deps build/ci/wheel/*.whl
pip install "$(echo build/ci/wheel/*.whl)[{extra}]"
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
    180,
    f"""
dpkg -s {APT_PACKAGES} >/dev/null 2>&1 && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends {APT_PACKAGES}
""",
)

STYLE = Stage(
    "style",
    300,
    _venv("py311")
    + _install("dev")
    + """
ruff check
ruff format --check
mypy
find xla_ffi tests benchmarks -name '*.cc' -o -name '*.h' | sort |
  xargs clang-format --dry-run -Werror
""",
)

CLANG_TIDY = Stage(
    "clang-tidy",
    600,
    _venv("py311")
    + _install("dev")
    + """
cmake -S . -B build/ci/tidy -G Ninja -DPython_EXECUTABLE=$(command -v python)
find xla_ffi -name '*.cc' -printf '%s %p\\n' | sort -rn | cut -d' ' -f2 |
  xargs -P$(nproc) -n1 clang-tidy --quiet -p build/ci/tidy
""",
)

SMOKE_PY312 = Stage(
    "smoke-py312",
    240,
    f"""
python=
for candidate in python3.12 "$(pyenv root 2>/dev/null)"/versions/3.12.*/bin/python; do
  "$candidate" -c 'import venv' 2>/dev/null && python=$candidate && break
done
[ -n "$python" ] || {{ echo 'no Python 3.12 on PATH or in pyenv'; exit {SKIP_CODE}; }}
"""
    + _venv("py312", '"$python"')
    + _install("test")
    + """
pip install --upgrade --upgrade-strategy=eager "$(echo build/ci/wheel/*.whl)[test]"
pytest -m smoke
""",
)


def _bazel(targets: str) -> str:
    return (
        _venv("py311")
        + f"""
pip install 'jaxlib>=0.9.1,<0.11.1' 'nanobind>=3'
PYTHON_BIN_PATH=$(command -v python) \
  bazel --batch --output_user_root="$PWD/build/ci/bazel-root" test {targets}
"""
    )


# The layers and the module; the sanitizers' stages have run the C++ tests before.
BAZEL = Stage("bazel", 300, _bazel("//xla_ffi/..."))

# Two hosts on one machine; and the example's losses, which README's tests leave out.
HOSTS = Stage(
    "hosts",
    240,
    _venv("py311")
    + _install("test")
    + """
python -P tests/hosts/run_two_hosts.py
pytest -m 'example and not slow'
""",
)


def _network(*targets: str) -> str:
    """Builds programs that tests of networks drive, in a folder that they share."""
    return (
        _venv("py311")
        + _install("test")
        + f"""
cmake -S . -B build/ci/cpp -G Ninja -DJAXFABRIC_BUILD_TESTS=ON \
  -DJAXFABRIC_BUILD_PYTHON=OFF
cmake --build build/ci/cpp --target {" ".join(targets)}
export JAXFABRIC_TEST_BUILD=build/ci/cpp
"""
    )


# The engine over network namespaces, and over libfabric's efa provider on a software
# device: `network` holds what must be right, `network-rates` what must be fast. The
# rates are compared with what is measured at the same time.
NETWORK = Stage(
    "network",
    480,
    _network("link_peer", "ofi_test", "softefa", "softefa_test")
    + """
build/ci/cpp/tests/softefa/softefa_test --gtest_brief=1
pytest tests/network
""",
)
NETWORK_RATES = Stage(
    "network-rates",
    480,
    _network("link_peer", "softefa") + "pytest -m slow tests/network -s\n",
)

# The kernel's own verbs over soft-RoCE, in virtual machines: one with four rails, and
# two with a cable between them. They end with SKIP_CODE where there can be none.
RXE = Stage(
    "rxe",
    480,
    _network("link_peer", "verbs_test")
    + """
python -m tests.rxe --rails 4 --timeout-s 240 -- pytest tests/rxe
python -m tests.rxe --hosts 2 --rails 2 --timeout-s 150 -- \
  pytest tests/rxe/test_two_hosts.py
""",
)

# No GPU here: that the kernels compile, load without a driver, and say why they skip.
CUDA = Stage(
    "cuda",
    300,
    f"command -v nvcc >/dev/null || {{ echo 'no nvcc'; exit {SKIP_CODE}; }}\n"
    + _venv("py311")
    + """
pip install 'jaxlib>=0.9.1,<0.11.1' 'nanobind>=3'
cmake -S . -B build/ci/cuda -G Ninja -DJAXFABRIC_BUILD_CUDA=ON \
  -DJAXFABRIC_BUILD_TESTS=ON -DJAXFABRIC_CUDA_ARCHITECTURES=90 \
  -DPython_EXECUTABLE=$(command -v python)
cmake --build build/ci/cuda --target jaxfabric_cuda cuda_moe_test \
  cuda_primitives_test cuda_moe_bench
ctest --test-dir build/ci/cuda -R cuda_ --output-on-failure --no-tests=error
awk '/: Skipped$/ { at = $1; getline; print "SKIPPED " at " " $0 }' \
  build/ci/cuda/Testing/Temporary/LastTest.log
""",
)

# What tells most for its time comes first: a run that reaches its limit fails the
# stages that are left. README's commands get environments of their own, or an earlier
# stage could bring what their extras forgot. The others share one.
STAGES = (
    MACHINE,
    Stage("tests-py311", 1000, _venv("py311") + TEST_COMMAND),
    STYLE,
    HOSTS,
    NETWORK,
    Stage("example", 300, _venv("example") + EXAMPLE_COMMAND),
    Stage("cpp-asan", 500, _cpp("cpp-asan", "-DJAXFABRIC_SANITIZE=address")),
    Stage("cpp-tsan", 700, _cpp("cpp-tsan", "-DJAXFABRIC_SANITIZE=thread")),
    BAZEL,
    SMOKE_PY312,
    CUDA,
    CLANG_TIDY,
)

# Longer forms, run by name only. `cpp` and `bazel-tests` run the C++ tests plain.
LONG_STAGES = (
    NETWORK_RATES,
    RXE,
    Stage("cpp", 600, _cpp("cpp")),
    Stage("bazel-tests", 600, _bazel("//...")),
    Stage("long", 5400, _venv("py311") + _install("test") + "pytest -m slow"),
    Stage(
        "parity",
        1800,
        _venv("parity") + _install("test,parity") + "pytest tests -k parity",
    ),
)


def _show(stream: TextIO, output: list[str]) -> None:
    with stream:
        for line in stream:
            print(line, end="", flush=True)
            output.append(line)


def _environment() -> dict[str, str]:
    """The stages' variables: what several builds compile alike is compiled once."""
    variables = {"CI": "true", "PIP_PROGRESS_BAR": "off"}
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
    lines = [line.strip() for line in output if line.strip()]
    skips = tuple(line for line in lines if line.startswith("SKIPPED "))
    if code == 0:
        return Result(stage, "passed", seconds, skips=skips)
    if code == SKIP_CODE:
        return Result(stage, "skipped", seconds, lines[-1] if lines else "")
    reason = f"exit code {code}"
    if code in (124, 137):
        over = (
            "its cap of" if limit_s == stage.cap_s else "the run's time, which left it"
        )
        reason = f"over {over} {limit_s} s"
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
    """Runs the named stages, or all of STAGES within RUN_LIMIT_S.

    Returns:
        The exit code: 0 if no stage failed.
    """
    deadline = math.inf if names else time.monotonic() + RUN_LIMIT_S
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
    shutil.rmtree(WORK / "wheel", ignore_errors=True)
    results = [run_stage(stage, deadline - time.monotonic()) for stage in chosen]
    print(report(results), flush=True)
    return int(any(r.verdict == "failed" for r in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
