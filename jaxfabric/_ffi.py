"""The native module and its FFI targets: loaded, checked, then registered lazily.

XLA refuses a handler that was built for a newer FFI API than its own, and then takes
the whole CPU backend down. So versions are compared before anything is registered.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import re
from types import ModuleType
from typing import Any

import jax

from jaxfabric._errors import from_native
from jaxfabric._libfabric import libfabric_path

_OLDEST_JAXLIB = "0.9.1"


@functools.cache
def native() -> ModuleType:
    """The extension module; raises ImportError with the way out."""
    try:
        from jaxfabric import _native  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError(
            "jaxfabric's native module is missing. In a checkout, install it "
            "(pip install -e .) and start Python with -P, or run `pytest` instead of "
            f"`python -m pytest`: the source tree has no compiled module ({error})"
        ) from error
    _check_versions(_native.ffi_api_version(), runtime_ffi_api())
    return _native


def runtime_ffi_api() -> tuple[int, int] | None:
    """FFI API of the running jaxlib, as its header says, if it ships one."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        return None
    header = pathlib.Path(spec.origin).parent / "include/xla/ffi/api/c_api.h"
    if not header.is_file():
        return None
    text = header.read_text()
    found = [
        re.search(rf"#define XLA_FFI_API_{part} (\d+)", text)
        for part in ("MAJOR", "MINOR")
    ]
    return None if None in found else (int(found[0][1]), int(found[1][1]))  # type: ignore[index]


def _check_versions(built: tuple[int, int], running: tuple[int, int] | None) -> None:
    if running is None or running >= tuple(built):
        return
    raise ImportError(
        f"jaxfabric was built for XLA FFI API {built[0]}.{built[1]}, but jaxlib "
        f"{_jaxlib_version()} has {running[0]}.{running[1]}, and registering would "
        "break its CPU backend. Install a newer jax "
        f"(pip install 'jax>={_OLDEST_JAXLIB}'), or build jaxfabric against this one "
        "(pip install --no-build-isolation --no-binary jaxfabric jaxfabric)"
    )


def _jaxlib_version() -> str:
    import jaxlib

    return str(jaxlib.__version__)


def transport_states() -> list[tuple[str, str, str, str]]:
    """Each transport's name, state, reason and fix, in words.

    States are ``"usable"``, ``"not built"``, ``"library missing"`` and
    ``"no device"``.
    """
    return list(native().transport_states(libfabric_path()))


def open_for_caps(transport: str) -> dict[str, Any]:
    """Opens a transport's first NIC, and closes it; what it says of itself.

    ``write_bytes_max``, ``queue_depth`` and ``emulated_writes``.

    Raises:
      FabricError: it cannot be opened, with the reason.
    """
    try:
        return dict(native().open_for_caps(transport, libfabric_path()))
    except native().StatusError as error:
        raise from_native(error) from None


@functools.cache
def register_targets() -> None:
    """Registers the handlers, once; to be called when something is lowered."""
    for name, capsule in native().targets().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
