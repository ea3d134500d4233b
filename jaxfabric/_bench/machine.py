"""The machine's line, to stand beside every number."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform


def processor() -> str:
    """The processor's name, as Linux gives it."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def describe() -> dict[str, str | int | float | None]:
    """What this machine is, and how busy, now."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
    }


def line() -> str:
    """`describe` in a line."""
    facts = describe()
    return (
        f"{facts['processor']}, {facts['cores']} cores, load {facts['load']}; "
        f"Linux {facts['kernel']}; python {facts['python']}, jax {facts['jax']}"
    )
