"""The package: its metadata, the installed files, and the traps of a flat layout."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    """The parsed pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def installed_folder() -> Path:
    """Where the imported jaxfabric lives."""
    spec = importlib.util.find_spec("jaxfabric")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def test_one_wheel_serves_every_python(pyproject: dict[str, Any]) -> None:
    assert pyproject["tool"]["scikit-build"]["wheel"]["py-api"] == "cp310"
    module = (ROOT / "xla_ffi/python/CMakeLists.txt").read_text()
    assert "STABLE_ABI BACKEND_MODULE nanobind_backend" in module
    assert any(r.startswith("nanobind-backend") for r in dependencies(pyproject))


def dependencies(pyproject: dict[str, Any]) -> list[str]:
    """What `pip install jaxfabric` brings along."""
    found: list[str] = pyproject["project"]["dependencies"]
    return found


def test_headers_are_not_newer_than_the_oldest_supported_jaxlib(
    pyproject: dict[str, Any],
) -> None:
    assert "jaxlib>=0.9.1,<0.11.1" in pyproject["build-system"]["requires"]
    assert "jax>=0.9.1" in dependencies(pyproject)


def test_the_module_is_built_for_the_stable_abi() -> None:
    modules = [path.name for path in installed_folder().glob("_native*.so")]
    assert modules == ["_native.abi3.so"]


def test_types_are_shipped() -> None:
    assert (installed_folder() / "py.typed").exists()
    assert (installed_folder() / "_native.pyi").exists()


def test_the_version_has_one_source(pyproject: dict[str, Any]) -> None:
    import jaxfabric

    try:
        installed = importlib.metadata.version("jaxfabric")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("jaxfabric runs from a source tree and is not installed")
    assert installed == pyproject["project"]["version"]
    assert jaxfabric.__version__ == installed


def test_import_leaves_jax_without_a_backend() -> None:
    # A later jax.distributed.initialize() fails once a backend is up.
    script = (
        "import jaxfabric; from jax._src import xla_bridge; "
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", script], check=True, timeout=120
    )


def test_nothing_puts_the_source_tree_before_the_installed_package() -> None:
    assert not (ROOT / "tests/__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_the_license_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
