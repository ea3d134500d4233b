"""The stages of CI: what each runs, and how long it may take; run_stages.py runs them.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
    take as a whole is limited by RUN_LIMIT_S of run_stages.py.
    """

    name: str
    cap_s: int
    script: str


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

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OFI_REQUIREMENTS = _PROJECT["project"]["optional-dependencies"]["ofi"]


def _venv(name: str, python: str = "python3") -> str:
    """Enters the virtual environment `name`, after creating it if need be.

    Packages are built without the GPU side: it compiles for minutes, and has a stage.
    """
    return f"""
export JAXFABRIC_BUILD_CUDA=OFF
[ -x build/ci/{name}/bin/pip ] || {python} -m venv --clear build/ci/{name}
. build/ci/{name}/bin/activate
"""


def _install(extra: str, options: str = "") -> str:
    """Installs the package with an extra, from a wheel that is built once in a run.

    Only README's commands build their own.
    """
    return f"""
compgen -G 'build/ci/wheel/*.whl' >/dev/null ||
  pip wheel --no-deps --wheel-dir build/ci/wheel .
pip install --force-reinstall --no-deps build/ci/wheel/*.whl
pip install {options} "$(echo build/ci/wheel/*.whl)[{extra}]"
"""


def _cpp(name: str, *flags: str) -> str:
    """Builds the C++ tests, which need neither Python nor jaxlib, and runs them.

    Over libfabric 2, which can do more than Debian's: the one that users install.
    """
    requirements = " ".join(f"'{requirement}'" for requirement in OFI_REQUIREMENTS)
    return f"""
{_venv("py311")}
pip install {requirements}
JAXFABRIC_LIBFABRIC=$(find "$VIRTUAL_ENV" -name libfabric.so.1 -print -quit)
[ -n "$JAXFABRIC_LIBFABRIC" ]
export JAXFABRIC_LIBFABRIC
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


def _clang_tidy(*options: str) -> str:
    return (
        _venv("py311")
        + _install("dev")
        + f"""
cmake -S . -B build/ci/tidy -G Ninja -DPython_EXECUTABLE=$(command -v python)
find xla_ffi -name '*.cc' -printf '%s %p\\n' | sort -rn | cut -d' ' -f2 |
  xargs -P$(nproc) -n1 clang-tidy --quiet -p build/ci/tidy {" ".join(options)}
"""
    )


# Following paths through functions (clang-analyzer-*) was five sixths of the time. With
# an eighth of the usual number of steps for each function it is half; `clang-tidy-deep`
# goes to the end.
CLANG_TIDY = Stage(
    "clang-tidy",
    400,
    _clang_tidy(
        *("--extra-arg=-Xclang", "--extra-arg=-analyzer-config"),
        *("--extra-arg=-Xclang", "--extra-arg=max-nodes=30000"),
    ),
)

SMOKE_PY312 = Stage(
    "smoke-py312",
    400,
    f"""
python=
for candidate in python3.12 "$(pyenv root 2>/dev/null)"/versions/3.12.*/bin/python; do
  "$candidate" -c 'import venv' 2>/dev/null && python=$candidate && break
done
[ -n "$python" ] || {{ echo 'no Python 3.12 on PATH or in pyenv'; exit {SKIP_CODE}; }}
"""
    + _venv("py312", '"$python"')
    + _install("test", "--upgrade --upgrade-strategy=eager")
    + "pytest -m smoke\n",
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
    _network("link_peer", "ofi_test", "ofi_fence_test", "softefa", "softefa_test")
    + """
build/ci/cpp/tests/softefa/softefa_test --gtest_brief=1
pytest tests/network
""",
)
NETWORK_RATES = Stage(
    "network-rates",
    300,
    _network("link_peer", "softefa")
    + "pytest -m slow tests/network --ignore=tests/network/test_serving.py -s\n",
)

# The kernel's own verbs over soft-RoCE, in virtual machines: one with up to four rails,
# and two with a cable between them. It ends with SKIP_CODE where there can be none.
RXE = Stage(
    "rxe",
    480,
    _network("link_peer", "verbs_test", "verbs_hosts_test")
    + """
python -m tests.rxe.suite
pytest tests/rxe/test_machine.py
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
  cuda_moe_errors_test cuda_primitives_test cuda_moe_bench
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
    NETWORK_RATES,
    Stage("example", 300, _venv("example") + EXAMPLE_COMMAND),
    Stage("cpp-asan", 500, _cpp("cpp-asan", "-DJAXFABRIC_SANITIZE=address")),
    Stage("cpp-tsan", 700, _cpp("cpp-tsan", "-DJAXFABRIC_SANITIZE=thread")),
    RXE,
    BAZEL,
    SMOKE_PY312,
    CUDA,
    CLANG_TIDY,
)

# Longer forms, run by name only. `cpp` and `bazel-tests` run the C++ tests plain.
LONG_STAGES = (
    Stage(
        "serving",
        900,
        _network("link_peer", "softefa")
        + "pytest -m 'not example' -s \\\n"
        + "  tests/network/test_serving.py tests/test_kv_serve_jobs.py\n",
    ),
    # The stage `cuda` compiles for one kind of GPU only.
    Stage(
        "cuda-architectures",
        900,
        _venv("py311")
        + """
pip install 'jaxlib>=0.9.1,<0.11.1' 'nanobind>=3'
cmake -S . -B build/ci/cuda-all -G Ninja -DJAXFABRIC_BUILD_CUDA=ON \
  -DPython_EXECUTABLE=$(command -v python)
cmake --build build/ci/cuda-all --target jaxfabric_cuda
""",
    ),
    Stage("clang-tidy-deep", 1200, _clang_tidy()),
    Stage("cpp", 600, _cpp("cpp")),
    Stage("bazel-tests", 600, _bazel("//...")),
    Stage("long", 5400, _venv("py311") + _install("test") + "pytest -m slow"),
    Stage(
        "parity",
        1800,
        _venv("parity") + _install("test,parity") + "pytest tests -k parity",
    ),
)
