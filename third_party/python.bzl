"""Makes a repository of the C++ headers that Python packages ship."""

# Prints one folder a line: CPython's headers, XLA's FFI headers, nanobind.
_FIND = """
import importlib.util, sysconfig
def folder(package):
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit("no package " + package)
    return spec.submodule_search_locations[0]
print(sysconfig.get_path("include"))
print(folder("jaxlib") + "/include")
print(folder("nanobind"))
"""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "python",
    hdrs = glob(["cpython/**/*.h"]),
    includes = ["cpython"],
)

cc_library(
    name = "xla_ffi",
    hdrs = glob(["xla/xla/ffi/**/*.h"]),
    includes = ["xla"],
)

cc_library(
    name = "nanobind",
    srcs = ["nanobind/src/nb_combined.cpp"],
    hdrs = glob(["nanobind/**/*.h"]),
    copts = ["-fno-strict-aliasing", "-fvisibility=hidden", "-w"],
    includes = ["nanobind/ext/robin_map/include", "nanobind/include"],
    local_defines = ["NB_COMPACT_ASSERTIONS"],
    textual_hdrs = glob(
        ["nanobind/src/*.cpp"],
        exclude = ["nanobind/src/nb_combined.cpp"],
    ),
    deps = [":python"],
)
"""

def _python_headers(repository):
    python = repository.os.environ.get("PYTHON_BIN_PATH")
    python = python or str(repository.which("python3"))
    found = repository.execute([python, "-c", _FIND])
    if found.return_code:
        fail("%s: %s (PYTHON_BIN_PATH names another Python)" % (
            python,
            found.stderr.strip(),
        ))
    cpython, xla, nanobind = found.stdout.strip().split("\n")
    repository.symlink(cpython, "cpython")
    repository.symlink(xla, "xla")
    repository.symlink(nanobind, "nanobind")
    repository.file("BUILD", _BUILD + 'exports_files(["python_bin"])\n')
    repository.file("python_bin", '#!/bin/sh\nexec "%s" "$@"\n' % python)

python_headers = repository_rule(
    implementation = _python_headers,
    environ = ["PATH", "PYTHON_BIN_PATH"],
    local = True,
)
