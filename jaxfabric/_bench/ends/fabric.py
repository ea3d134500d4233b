"""Our engine, `jf.TransferEngine`, over the transport that the options name."""

from __future__ import annotations

import functools
import operator
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
        self.begin: Callable[[int], Any]
        # Each Python frame between the clock and the engine would count as ours.
        self.finish = operator.methodcaller("result")

    def connect(self, cards: list[dict[str, Any]]) -> None:
        """See `ends.Initiator`."""
        import jaxfabric as jf

        for card in cards:
            self._engine.connect(bytes.fromhex(card["address"])).result()
            self._targets.append(jf.MrDesc.from_bytes(bytes.fromhex(card["region"])))

    def prepare(self, case: Case) -> None:
        """See `ends.Initiator`."""
        if case.kind == "single":
            self.begin = self._single(case)
            return
        call = {"paged": self._paged, "scatter": self._scatter}[case.kind]
        submit = [call(case, slot) for slot in range(case.window)]
        self.begin = lambda slot: submit[slot]()

    def _single(self, case: Case) -> Callable[[int], Any]:
        spans = [span for slot in range(case.window) for span in case.spans(slot)]
        sources = [span.source for span in spans]
        targets = [span.target for span in spans]
        nbytes = spans[0].length
        submit, region = self._engine.submit_single_write, self._region
        target, id = self._targets[0], self._id
        # What functools.partial does with keywords costs as much as a small write.
        return lambda slot: submit(
            region,
            target,
            id,
            source_offset=sources[slot],
            target_offset=targets[slot],
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
            source_offset=case.base(slot),
            target_offset=case.base(slot),
        )

    def _scatter(self, case: Case, slot: int) -> Callable[[], Any]:
        slices = [
            (self._targets[span.peer], span.source, span.target, span.length)
            for span in case.spans(slot)
        ]
        return functools.partial(
            self._engine.submit_scatter, self._region, slices, self._id
        )

    def write(self, slot: int) -> None:
        """See `ends.Initiator`."""
        self.begin(slot).result()

    def versions(self) -> dict[str, str]:
        """See `ends.Initiator`."""
        import jaxfabric as jf

        return {"jaxfabric": jf.__version__}

    def close(self) -> None:
        """See `ends.Initiator`."""
        self._engine.close()
