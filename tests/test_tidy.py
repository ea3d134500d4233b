"""Style that tools do not know: layers, lengths, banned calls, docstrings.

Each rule is a function from a file to its violations, so that the rules
themselves are tested on small bad examples at the end of this file.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
THIS = Path("tests/test_tidy.py")  # quotes what it forbids

# Lowest first: a folder may include itself and what stands before it.
LAYERS = ("base", "transport", "engine", "moe", "handlers", "python")

LENGTH_MAX = {"header": 250, "source": 500, "python": 400, "test": 600}
FUNCTION_LINES_MAX = 70
CPP_COLUMNS_MAX = 80

# Who may read the environment; tests take their seeds from it.
CPP_ENVIRONMENT = (Path("xla_ffi/base/env.cc"), Path("tests"))
PYTHON_ENVIRONMENT = (
    Path("jaxfabric/_config.py"),  # the documented table of variables
    Path("jaxfabric/_cli"),  # sets variables for the processes it starts
    Path("jaxfabric/testing"),
    Path("tests"),
    Path(".ci"),
)
# nanobind turns C++ exceptions into Python's; below it there is Status alone.
CPP_EXCEPTIONS = Path("xla_ffi/python")
# Arguments that come in a later step are refused there, by name.
# The MoE arguments that come later, and JAX's word for missing rules.
NOT_IMPLEMENTED = (Path("jaxfabric/moe"), Path("jaxfabric/_primitives"))

VAGUE_NAMES = re.compile(r"(^|_)(utils?|helpers?|common|core|manager|misc)(_|$)")


def files(*suffixes: str) -> list[Path]:
    """The project's files with these suffixes, relative to the root."""
    folders = [".ci", "benchmarks", "cmake", "cuda", "docs", "examples", "jaxfabric"]
    folders += ["tests", "third_party", "xla_ffi"]
    found = [p for p in ROOT.iterdir() if p.is_file()]
    for folder in folders:
        found += [p for p in (ROOT / folder).rglob("*") if p.is_file()]
    kept = (p.relative_to(ROOT) for p in found if "__pycache__" not in p.parts)
    return sorted(p for p in kept if p.suffix in suffixes)


CPP = files(".h", ".cc", ".cu", ".cuh")
PYTHON = files(".py")
TEXT = sorted(
    {*CPP, *PYTHON, *files("", ".md", ".txt", ".toml", ".pyi")}
    | {*files(".cmake", ".bzl", ".sh", ".BUILD")}
)


def lines_with(pattern: str, text: str) -> list[str]:
    """`line number: line` of each line in which the pattern is found."""
    numbered = enumerate(text.splitlines(), 1)
    return [f"{n}: {line.strip()}" for n, line in numbered if re.search(pattern, line)]


def without_comments(text: str) -> str:
    """C++ without // comments and string literals, lines kept."""
    return re.sub(r'"(\\.|[^"\\\n])*"', '""', re.sub(r"//[^\n]*", "", text))


def read(path: Path) -> str:
    """A project file's text."""
    return (ROOT / path).read_text(encoding="utf-8")


# --- C++ ---------------------------------------------------------------------


def include_violations(path: Path, text: str) -> Iterator[str]:
    """Arrows between the folders of xla_ffi/ point down only."""
    folder = path.parts[1] if path.parts[0] == "xla_ffi" else ""
    for include in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', text, re.MULTILINE):
        top = include.split("/")[0]
        if top == "nanobind" or include == "Python.h":
            if folder != "python":
                yield f"{include}: only xla_ffi/python knows Python"
        elif top == "xla":
            if folder != "handlers" and path.parts[0] != "cuda":
                yield f"{include}: only xla_ffi/handlers and cuda/ know XLA"
        elif top == "cuda" and path.parts[0] != "cuda":
            yield f"{include}: nothing includes cuda/"
        elif folder and top in LAYERS and LAYERS.index(top) > LAYERS.index(folder):
            yield f"{include}: {folder} may not know {top}"


def guard_violations(path: Path, text: str) -> Iterator[str]:
    """Guards are the path in capitals, as in the Google style."""
    parts = path.with_suffix("").parts
    name = "_".join(parts[1:] if parts[0] == "xla_ffi" else parts)
    guard = f"JAXFABRIC_{name}_{path.suffix[1:]}_".upper()
    if f"#ifndef {guard}\n#define {guard}\n" not in text:
        yield f"wants the include guard {guard}"


def cpp_call_violations(path: Path, text: str) -> Iterator[str]:
    """Calls that have a replacement in xla_ffi/base."""
    code = without_comments(text)
    if not any(path.is_relative_to(allowed) for allowed in CPP_ENVIRONMENT):
        for line in lines_with(r"\b(secure_)?getenv\b", code):
            yield f"{line} (the environment is read in {CPP_ENVIRONMENT[0]})"
    for line in lines_with(
        r"\b(u|nano|clock_nano)?sleep\s*\(|\bsleep_(for|until)", code
    ):
        yield f"{line} (wait for an event with a Deadline)"
    if not path.is_relative_to(CPP_EXCEPTIONS):
        for line in lines_with(r"^\s*(throw\b|try\s*\{)|\bcatch\s*\(", code):
            yield f"{line} (return a Status)"
    # libstdc++ waits process-privately: a peer process never wakes it.
    for name in set(re.findall(r"\batomic(?:_ref)?<[^;={(]*>\s*&?\s*(\w+)", code)):
        waits = rf"\b{name}(\[[^\]]*\])?\s*(\.|->)\s*(wait|notify_one|notify_all)\s*\("
        for line in lines_with(waits, code):
            yield f"{line} (std::atomic never wakes another process; use Doorbell)"


def memory_order_violations(path: Path, text: str) -> Iterator[str]:
    """Memory order is written at each atomic access.

    Own methods are CamelCase, so these lower-case names are std::atomic's.
    """
    code = without_comments(text)
    operations = r"load|store|exchange|fetch_\w+|compare_exchange_\w+|test_and_set"
    for call in re.finditer(rf"(?:\.|->)({operations})\s*\(", code):
        depth, end = 1, call.end()
        while depth and end < len(code):
            depth += {"(": 1, ")": -1}.get(code[end], 0)
            end += 1
        if "memory_order" not in code[call.end() : end]:
            line = code.count("\n", 0, call.start()) + 1
            yield f"{line}: {call[1]}{code[call.end() - 1 : end]} names no memory order"


def column_violations(path: Path, text: str) -> Iterator[str]:
    """clang-format leaves long comments and literals alone."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > CPP_COLUMNS_MAX and "http" not in line:
            yield f"{number}: {len(line)} columns, {CPP_COLUMNS_MAX} at most"


# --- Python ------------------------------------------------------------------


def environment_violations(path: Path, text: str) -> Iterator[str]:
    """Variables are read in one documented place."""
    if any(path.is_relative_to(allowed) for allowed in PYTHON_ENVIRONMENT):
        return
    names = "environ|getenv|putenv"
    code = "\n".join(line.split("#")[0] for line in text.splitlines())
    for line in lines_with(rf"\bos\.({names})\b|from os import .*({names})", code):
        yield f"{line} (variables belong to jaxfabric/_config.py)"


def function_length_violations(path: Path, text: str) -> Iterator[str]:
    """Counts code, not the docstring: worked examples are welcome."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        count = node.end_lineno - node.lineno + 1
        first = node.body[0]
        if ast.get_docstring(node) is not None and first.end_lineno is not None:
            count -= first.end_lineno - first.lineno + 1
        if count > FUNCTION_LINES_MAX:
            yield f"{node.lineno}: {node.name} has {count} lines of code"


def not_implemented_violations(path: Path, text: str) -> Iterator[str]:
    """No loose ends, but for the arguments that announce a later step."""
    if any(path.is_relative_to(folder) for folder in (*NOT_IMPLEMENTED, "tests")):
        return
    yield from lines_with(r"\bNotImplemented(Error)?\b", text)


def public_modules() -> list[str]:
    """Modules of jaxfabric whose path has no underscored part."""
    modules = []
    for path in PYTHON:
        parts = path.with_suffix("").parts
        if parts[0] != "jaxfabric":
            continue
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") for part in parts):
            modules.append(".".join(parts))
    return modules


def docstring_violations(module: ModuleType) -> Iterator[str]:
    """Public names of a module, and public methods of its classes, say what they do."""
    if not module.__doc__:
        yield "the module has no docstring"
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if inspect.isclass(value):
            # A dataclass without a docstring gets "Name(field: type, ...)".
            if not value.__doc__ or value.__doc__.startswith(f"{value.__name__}("):
                yield f"{name} has no docstring"
            for attribute, member in vars(value).items():
                function = getattr(member, "fget", getattr(member, "__func__", member))
                if attribute.startswith("_") or not inspect.isfunction(function):
                    continue
                if not inspect.getdoc(getattr(value, attribute)):
                    yield f"{name}.{attribute} has no docstring"
        elif callable(value) and not getattr(value, "__doc__", None):
            yield f"{name} has no docstring"


# --- Every file --------------------------------------------------------------


def length_violations(path: Path, text: str) -> Iterator[str]:
    """Over the limit means: split by noun."""
    kind = "header" if path.suffix in (".h", ".cuh") else "source"
    if path.parts[0] == "tests":
        kind = "test"
    elif path.suffix == ".py":
        kind = "python"
    count = len(text.splitlines())
    if count > LENGTH_MAX[kind]:
        yield f"{count} lines, a {kind} has {LENGTH_MAX[kind]} at most"


def marker_violations(path: Path, text: str) -> Iterator[str]:
    """Nothing is left for later in a comment."""
    if path != THIS:
        yield from lines_with(r"\b(TODO|FIXME|XXX|HACK)\b", text)


def machine_path_violations(path: Path, text: str) -> Iterator[str]:
    """No path of the machine that something was written on."""
    if path != THIS:
        yield from lines_with(r"(?<![\w.])/(root|work|home)/|/tmp/s\b", text)


def name_violations(path: Path, text: str) -> Iterator[str]:
    """A file is named after what it holds."""
    if VAGUE_NAMES.search(path.stem):
        yield "vague name: say what it holds"


RULES = [
    *(
        (rule, path)
        for rule in (include_violations, cpp_call_violations)
        for path in CPP
    ),
    *((memory_order_violations, path) for path in CPP),
    *((column_violations, path) for path in CPP),
    *((guard_violations, path) for path in CPP if path.suffix in (".h", ".cuh")),
    *((environment_violations, path) for path in PYTHON),
    *((function_length_violations, path) for path in PYTHON),
    *((not_implemented_violations, path) for path in PYTHON),
    *((length_violations, path) for path in CPP + PYTHON),
    *((name_violations, path) for path in CPP + PYTHON),
    *((marker_violations, path) for path in TEXT),
    *((machine_path_violations, path) for path in TEXT),
]
RULE_NAMES = sorted({rule.__name__ for rule, _ in RULES})


@pytest.mark.parametrize("name", RULE_NAMES)
def test_rule(name: str) -> None:
    found = [
        f"{path}:{violation}"
        for rule, path in RULES
        if rule.__name__ == name
        for violation in rule(path, read(path))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("name", public_modules())
def test_public_names_have_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert hasattr(module, "__all__"), "a public module lists its names"
    found = list(docstring_violations(module))
    assert not found, "\n" + "\n".join(found)


def test_bazel_links_the_conformance_suite_where_cmake_does() -> None:
    header = '#include "tests/cpp/transport_conformance.h"'
    tests = (ROOT / "tests/cpp").glob("*_test.cc")
    conforming = {test.name for test in tests if header in test.read_text()}
    build = read(Path("tests/BUILD"))
    listed = re.search(r"CONFORMANCE_TESTS = \[(.*?)\]", build, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r'"cpp/(.*)"', listed[1])) == conforming


def test_the_rules_see_the_project() -> None:
    assert Path("xla_ffi/base/status.h") in CPP
    assert Path("jaxfabric/__init__.py") in PYTHON
    assert Path("README.md") in TEXT
    assert "jaxfabric" in public_modules()


# --- The rules themselves ----------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (include_violations, "xla_ffi/base/a.h", '#include "engine/b.h"\n'),
        (include_violations, "xla_ffi/moe/a.h", "#include <nanobind/nanobind.h>\n"),
        (include_violations, "xla_ffi/engine/a.h", '#include "xla/ffi/api/ffi.h"\n'),
        (include_violations, "xla_ffi/moe/a.h", '#include "cuda/b.h"\n'),
        (guard_violations, "xla_ffi/base/a.h", "#ifndef A_H\n#define A_H\n"),
        (cpp_call_violations, "xla_ffi/base/a.cc", 'std::getenv("A");'),
        (cpp_call_violations, "xla_ffi/base/a.cc", "usleep(3);"),
        (cpp_call_violations, "xla_ffi/base/a.cc", "sleep_for(1s);"),
        (cpp_call_violations, "xla_ffi/base/a.cc", "  throw 1;"),
        (cpp_call_violations, "xla_ffi/a.cc", "std::atomic<int> a;\na.wait(1);"),
        (memory_order_violations, "xla_ffi/base/a.cc", "a.load();"),
        (memory_order_violations, "xla_ffi/base/a.cc", "a->store(f(1, 2));"),
        (memory_order_violations, "xla_ffi/base/a.cc", "a.fetch_add(\n  1);"),
        (column_violations, "xla_ffi/base/a.cc", "/" * 81),
        (environment_violations, "jaxfabric/a.py", "import os\nos.environ['A']"),
        (environment_violations, "jaxfabric/a.py", "from os import getenv"),
        (function_length_violations, "a.py", "def f():\n" + "    g()\n" * 70),
        (not_implemented_violations, "jaxfabric/a.py", "raise NotImplementedError"),
        (length_violations, "xla_ffi/base/a.h", "\n" * 251),
        (length_violations, "jaxfabric/a.py", "\n" * 401),
        (marker_violations, "a.md", "TODO: later"),
        (machine_path_violations, "a.md", "see /root/notes"),
        (name_violations, "jaxfabric/_moe_utils.py", ""),
    ],
)
def test_a_rule_finds_what_it_forbids(rule, path: str, text: str) -> None:
    assert list(rule(Path(path), text))


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (
            include_violations,
            "xla_ffi/moe/a.h",
            '#include "engine/b.h"\n#include <a>\n',
        ),
        (cpp_call_violations, "xla_ffi/base/env.cc", 'std::getenv("A");'),
        (cpp_call_violations, "xla_ffi/a.cc", "counter.wait(1); // usleep(1)"),
        (memory_order_violations, "a.cc", "a.load(std::memory_order_acquire);"),
        (function_length_violations, "a.py", 'def f():\n    """' + "\n" * 99 + '"""'),
        (machine_path_violations, "a.md", "build/work/x, /tmp/something"),
    ],
)
def test_a_rule_leaves_good_code_alone(rule, path: str, text: str) -> None:
    assert not list(rule(Path(path), text))
