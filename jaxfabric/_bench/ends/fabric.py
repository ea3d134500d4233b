"""Our engine, `jf.TransferEngine`, over the transport that the options name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..case import Case
from . import OPERATION_TIMEOUT_S, allocate

# The receiver counts under it, if transfers are counted.
COUNT_ID = 1


def open_engine(options: dict[str, Any]) -> Any:
    """An engine whose operations end before the benchmark loses patience."""
    # Not above: where it is missing that is an answer, as with the peers' packages.
    import jaxfabric as jf

    return jf.TransferEngine(
        options["transport"],
        job="jaxfabric bench",
        nics=options["nics"],
        timeout_s=OPERATION_TIMEOUT_S,
    )


class Target:
    """An engine with one region."""

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None:
        self._engine = open_engine(options)
        self._counted = options["counted"]
        self._region = self._engine.alloc(bytes_)
        self.memory = self._region.array

    def card(self) -> dict[str, Any]:
        """See `ends.Target`."""
        address = self._engine.address().to_bytes().hex()
        return {"address": address, "region": self._region.desc.to_bytes().hex()}

    def prepare(self, case: Case, peer: int) -> None:
        """See `ends.Target`."""

    def wait(self, operations: int) -> None:
        """See `ends.Target`; there must not be more, either."""
        if self._counted:
            counter = self._engine.imm_counter(COUNT_ID)
            counter.wait(operations)
            if counter.value:
                raise ValueError(f"{counter.value} transfers more than {operations}")

    def close(self) -> None:
        """See `ends.Target`."""
        self._engine.close()


class Initiator:
    """Private memory, registered, as the peers have it."""

    def __init__(self, bytes_: int, options: dict[str, Any]) -> None:
        self._engine = open_engine(options)
        self.memory = allocate(bytes_)
        self._region = self._engine.register_memory(self.memory)
        self._id = COUNT_ID if options["counted"] else None
        self._targets: list[Any] = []
        self._submit: list[Callable[[], Any]] = []

    def connect(self, cards: list[dict[str, Any]]) -> None:
        """See `ends.Initiator`."""
        import jaxfabric as jf

        for card in cards:
            self._engine.connect(bytes.fromhex(card["address"])).result()
            self._targets.append(jf.MrDesc.from_bytes(bytes.fromhex(card["region"])))

    def prepare(self, case: Case) -> None:
        """See `ends.Initiator`."""
        call = {"single": self._single, "paged": self._paged, "scatter": self._scatter}
        self._submit = [call[case.kind](case, slot) for slot in range(case.window)]

    def _single(self, case: Case, slot: int) -> Callable[[], Any]:
        (span,) = case.spans(slot)
        submit, region = self._engine.submit_single_write, self._region
        target, id = self._targets[0], self._id
        source_offset, target_offset, nbytes = span.source, span.target, span.length
        # What functools.partial does with keywords costs as much as a small write.
        return lambda: submit(
            region,
            target,
            id,
            source_offset=source_offset,
            target_offset=target_offset,
            nbytes=nbytes,
        )

    def _paged(self, case: Case, slot: int) -> Callable[[], Any]:
        pages = case.target_pages().astype(np.uint64)
        return functools.partial(
            self._engine.submit_paged_writes,
            self._region,
            np.arange(len(pages), dtype=np.uint64),
            self._targets[0],
            pages,
            case.page_bytes,
            self._id,
            source_offset=slot * case.size,
            target_offset=slot * case.size,
        )

    def _scatter(self, case: Case, slot: int) -> Callable[[], Any]:
        slices = [
            (self._targets[span.peer], span.source, span.target, span.length)
            for span in case.spans(slot)
        ]
        return functools.partial(
            self._engine.submit_scatter, self._region, slices, self._id
        )

    def begin(self, slot: int) -> Any:
        """See `ends.Initiator`."""
        return self._submit[slot]()

    def finish(self, operation: Any) -> None:
        """See `ends.Initiator`."""
        operation.result()

    def write(self, slot: int) -> None:
        """See `ends.Initiator`."""
        self._submit[slot]().result()

    def versions(self) -> dict[str, str]:
        """See `ends.Initiator`."""
        import jaxfabric as jf

        return {"jaxfabric": jf.__version__}

    def close(self) -> None:
        """See `ends.Initiator`."""
        self._engine.close()
