"""Which libfabric the ofi transports open.

It is opened at run time by its path. PyPI's ``mpich`` wheel carries a recent one with
the EFA provider beside it; a distribution's is often too old for EFA.
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib

from jaxfabric._config import config

_WHEEL = "mpich"  # what the extra jaxfabric[ofi] installs
_LIBRARY = "libfabric.so.1"


def libfabric_path() -> str:
    """The setting ``libfabric``, else the wheel's library, else "": the system's."""
    return config.settings.libfabric or _path_in_wheel()


@functools.cache
def _path_in_wheel() -> str:
    try:
        files = importlib.metadata.files(_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    for file in files:
        path = pathlib.Path(str(file.locate()))
        if file.name == _LIBRARY and path.is_file():
            return str(path.resolve())
    return ""
