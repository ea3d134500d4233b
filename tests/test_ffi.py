"""The native module meets a jaxlib: versions first, registration when needed."""

from __future__ import annotations

import importlib
import pathlib
import sys
from collections.abc import Iterator

import jax
import pytest
from ranks import run_child

from jaxfabric import _ffi


@pytest.fixture
def fresh() -> Iterator[None]:
    _ffi.native.cache_clear()
    yield
    _ffi.native.cache_clear()


def test_an_old_jaxlib_is_refused_before_anything_is_registered(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[str] = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *a, **k: registered)
    monkeypatch.setattr(_ffi, "runtime_ffi_api", lambda: (0, 1))
    _ffi.register_targets.cache_clear()
    with pytest.raises(ImportError, match=r"0\.3, but jaxlib .* has 0\.1.*pip install"):
        _ffi.register_targets()
    assert not registered


@pytest.mark.parametrize("running", [(0, 3), (0, 5), (1, 0), None])
def test_the_same_a_newer_and_an_unknown_jaxlib_are_taken(
    fresh: None, monkeypatch: pytest.MonkeyPatch, running: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(_ffi, "runtime_ffi_api", lambda: running)
    assert _ffi.native() is not None


def test_the_version_of_the_running_jaxlib_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    found = _ffi.runtime_ffi_api()
    assert found is not None
    assert found >= (0, 3)
    # A jaxlib without headers is not refused.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _ffi.runtime_ffi_api() is None


def test_a_missing_native_module_says_how_to_get_it(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jaxfabric

    monkeypatch.delattr(jaxfabric, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "jaxfabric._native", None)
    with pytest.raises(ImportError, match=r"native module is missing.*pip install"):
        _ffi.native()


def test_importing_starts_no_backend_and_loads_nothing_native() -> None:
    """So that jax.distributed.initialize may come after it."""
    code = """
import sys
import jax, jaxfabric
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
assert "jaxfabric._native" not in sys.modules
"""
    run_child("-c", code)
