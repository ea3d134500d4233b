"""The options of `@pytest.mark.jaxfabric`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

MAX_PROCESSES = 1024


class MarkError(ValueError):
    """The mark cannot be used as it is written."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one test needs.

    Attributes:
      processes: ranks that run the test's body.
      devices_per_process: JAX devices of each.
      timeout_s: seconds until all ranks' stacks are shown and the test fails; None
        takes the `jaxfabric_timeout_s` of the run.
      fresh: the test gets a cluster of its own, which is thrown away afterwards.
      lost: ranks whose death is part of the test (implies `fresh`).
    """

    processes: int = 1
    devices_per_process: int = 1
    timeout_s: float | None = None
    fresh: bool = False
    lost: frozenset[int] = frozenset()

    @property
    def shape(self) -> tuple[int, int]:
        """(processes, devices_per_process): tests of one shape share a cluster."""
        return self.processes, self.devices_per_process


def parse(marks: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> Spec:
    """Merges (args, kwargs) of marks, the one nearest to the test last.

    Raises:
      MarkError: an option is unknown or out of range.
    """
    options: dict[str, Any] = {}
    for args, kwargs in marks:
        if args:
            raise MarkError(
                "jaxfabric mark: options are keywords, as in "
                f"@pytest.mark.jaxfabric(processes=4); got {args!r}"
            )
        options.update(kwargs)
    known = {field.name for field in dataclasses.fields(Spec)}
    if unknown := sorted(set(options) - known):
        raise MarkError(
            f"jaxfabric mark: unknown {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
    options["lost"] = frozenset(options.get("lost", ()))
    spec = Spec(**options)
    if spec.lost:
        spec = dataclasses.replace(spec, fresh=True)
    _check(spec)
    return spec


def _check(spec: Spec) -> None:
    for name in ("processes", "devices_per_process"):
        value = getattr(spec, name)
        if not isinstance(value, int) or not 1 <= value <= MAX_PROCESSES:
            raise MarkError(
                f"jaxfabric mark: {name}={value!r}; it is an int from 1 to "
                f"{MAX_PROCESSES}"
            )
    if spec.timeout_s is not None and not spec.timeout_s > 0:
        raise MarkError(f"jaxfabric mark: timeout_s={spec.timeout_s!r}; it is > 0")
    if not all(0 <= rank < spec.processes for rank in spec.lost):
        raise MarkError(
            f"jaxfabric mark: lost={sorted(spec.lost)} has ranks outside "
            f"0..{spec.processes - 1}"
        )
