"""Settings: one table, from which the environment and ``jf.config`` are read.

============================ ============== ===========================================
variable                     default        meaning
============================ ============== ===========================================
JAXFABRIC_TRANSPORT          (best)         transport of every Fabric that names none
JAXFABRIC_NICS               (see Fabric)   NICs of the network transports, by name or
                                            IP address: "eth0,eth1", "mlx5_0:1"
JAXFABRIC_LIBFABRIC          (best)         the libfabric.so.1 of the ofi transports
JAXFABRIC_VERBS              (good ones)    options of the transport verbs, see
                                            docs/operators.md: "gid_index=3"
JAXFABRIC_TIMEOUT_S          30             time limit of operations, seconds
JAXFABRIC_MAILBOX_BYTES      268435456      largest message between two ranks, bytes;
                                            costs memory only as far as it is used, on
                                            GPUs four times itself for each peer
JAXFABRIC_WINDOW_BYTES       1073741824     memory for all windows of a Fabric, bytes;
                                            costs memory only as far as it is used, on
                                            GPUs all of it
JAXFABRIC_SPIN_S             0.000005       how long a worker looks again before it
                                            sleeps, seconds
============================ ============== ===========================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import operator
import os
from collections.abc import Iterator
from typing import Any

from jaxfabric._time_limit import checked_limit

_PREFIX = "JAXFABRIC_"
# Of a process's addresses; multiples of sizes below it do not wrap around.
_BYTES_END = 1 << 47


@dataclasses.dataclass(frozen=True)
class Settings:
    """The values in force; see the table of this module."""

    transport: str | None = None
    nics: str | None = None
    libfabric: str | None = None
    verbs: str | None = None
    timeout_s: float = 30.0
    mailbox_bytes: int = 256 << 20
    window_bytes: int = 1 << 30
    spin_s: float = 5e-6


def _from_environment() -> Settings:
    settings = Settings()
    for field in dataclasses.fields(Settings):
        variable = f"{_PREFIX}{field.name.upper()}"
        text = os.environ.get(variable)
        if text:
            settings = _replace(settings, variable, field.name, text)
    return settings


_KINDS: dict[str, type] = {
    "transport": str,
    "nics": str,
    "libfabric": str,
    "verbs": str,
    "timeout_s": float,
    "spin_s": float,
}


def _checked_bytes(source: str, value: int) -> int:
    """The size, if it is one; raises an error that names ``source``."""
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{source}={value!r}: expected int") from None
    if not 0 <= size < _BYTES_END:
        raise ValueError(
            f"{source}={size}: must not be negative, and below {_BYTES_END}"
        )
    return size


def misspelt_variables() -> dict[str, str]:
    """Variables that nobody reads, each with the one that it is nearly called."""
    names = [field.name.upper() for field in dataclasses.fields(Settings)]
    found = {}
    for variable in sorted(os.environ):
        if not variable.startswith(_PREFIX):
            continue
        name = variable.removeprefix(_PREFIX)
        likely = difflib.get_close_matches(name, names, 1, cutoff=0.65)
        if likely and name not in names:
            found[variable] = _PREFIX + likely[0]
    return found


def _replace(settings: Settings, source: str, name: str, value: Any) -> Settings:
    kind = _KINDS.get(name, int)
    converted: Any
    try:
        if kind is int and not isinstance(value, str):
            converted = operator.index(value)
        else:
            converted = None if value is None and kind is str else kind(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{source}={value!r}: expected {kind.__name__}, as in the table of "
            "jaxfabric._config"
        ) from None
    if kind is float and not converted >= 0:
        raise ValueError(f"{source}={value!r}: must not be negative")
    if kind is float and name != "timeout_s" and math.isinf(converted):
        raise ValueError(f"{source}={value!r}: must be finite")
    if name == "timeout_s":
        converted = checked_limit(source, converted)
    if kind is int:
        _checked_bytes(source, converted)
    changed: dict[str, Any] = {name: converted}
    return dataclasses.replace(settings, **changed)


# XLA's CPU pools hang or stall when calls of several devices share too few threads.
POOL_THREADS_MIN = 64
THREADS_PER_DEVICE = 4


def widen_xla_pool() -> None:
    """Sets PJRT_NPROC, unless it is set, for a JAX that has not started yet.

    XLA reads it when it opens its CPU backend. Where that has happened, `Fabric`
    warns; see `pool_is_narrow`.
    """
    if "NPROC" not in os.environ:
        width = max(os.cpu_count() or 1, POOL_THREADS_MIN)
        os.environ.setdefault("PJRT_NPROC", str(width))


def pool_is_narrow(local_devices: int) -> bool:
    """Whether XLA was told to use fewer threads than its devices here need."""
    if local_devices == 1:
        return False
    return (pool_threads() or 0) < THREADS_PER_DEVICE * local_devices


def pool_threads() -> int | None:
    """How many threads XLA was told to use; ``None`` if it was not told."""
    text = os.environ.get("PJRT_NPROC") or os.environ.get("NPROC") or ""
    return int(text) if text.isdigit() else None


class Config:
    """``jf.config``: settings for Fabrics that are opened from now on.

    Example::

      jf.config.update(timeout_s=120)
      with jf.config(transport="shm"):
          fabric = jf.Fabric(mesh)
    """

    def __init__(self) -> None:
        self._settings: Settings | None = None

    @property
    def settings(self) -> Settings:
        """The values in force; the environment is read at the first use."""
        if self._settings is None:
            self._settings = _from_environment()
        return self._settings

    def update(self, **values: Any) -> None:
        """Changes settings; raises TypeError for unknown names."""
        known = {field.name for field in dataclasses.fields(Settings)}
        settings = self.settings
        for name, value in values.items():
            if name not in known:
                raise TypeError(
                    f"jf.config has no setting {name!r}; there are "
                    f"{', '.join(sorted(known))}"
                )
            settings = _replace(settings, name, name, value)
        self._settings = settings

    @contextlib.contextmanager
    def __call__(self, **values: Any) -> Iterator[Settings]:
        """The same for the time of a ``with`` block."""
        before = self.settings
        self.update(**values)
        try:
            yield self.settings
        finally:
            self._settings = before


config = Config()


def fabric_sizes(
    mailbox_bytes: int | None, window_bytes: int | None
) -> tuple[int, int]:
    """What a Fabric is asked for, or the settings in force; raises if it is none."""
    if mailbox_bytes is None:
        mailbox_bytes = config.settings.mailbox_bytes
    if window_bytes is None:
        window_bytes = config.settings.window_bytes
    return (
        _checked_bytes("jf.Fabric: mailbox_bytes", mailbox_bytes),
        _checked_bytes("jf.Fabric: window_bytes", window_bytes),
    )
