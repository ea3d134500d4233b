"""One-sided writes of TransferEngines, and what their receivers count."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxfabric import _ffi
from jaxfabric._errors import FabricError, from_native
from jaxfabric._net_addr import MrDesc
from jaxfabric._transfer_base import TransferBase, native_errors
from jaxfabric._transfer_future import TransferFuture
from jaxfabric._transfer_memory import Region, address_of, as_array, page_indices

IDS_MAX = 1 << 27


class ScatterTarget(NamedTuple):
    """One slice of a scatter: where it goes, where it is, and how long it is."""

    desc: MrDesc | bytes
    source_offset: int = 0
    target_offset: int = 0
    nbytes: int = 0


class ImmCounter:
    """Counts what arrives under one id; from `TransferEngine.imm_counter`."""

    def __init__(self, engine: Writes, id: int) -> None:
        self._engine = engine
        self.id = id

    @property
    def value(self) -> int:
        """Transfers that have arrived and that nobody has waited for yet."""
        return self._engine.imm_count(self.id)

    def wait(
        self, count: int, timeout_s: float | None = None, *, peers: Sequence[int] = ()
    ) -> None:
        """Waits for ``count`` transfers and takes them off the counter.

        Raises:
          DeadlineError: they did not come in time; says how many did.
          PeerLostError: one of ``peers``, who were to send them, is gone.
        """
        self._engine.expect_imm_count(
            self.id, count, peers=peers, timeout_s=timeout_s
        ).result()


def _check_id(id: int | None) -> int | None:
    if id is None:
        return None
    try:
        number = operator.index(id)  # also NumPy's
    except TypeError:
        number = -1
    if 0 <= number < IDS_MAX:
        return number
    raise ValueError(f"id={id!r}: ids are integers, at least 0 and below 2**27")


def _check_sizes(what: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{what}: {name}={size} is negative")


def _check_range(what: str, offset: int, nbytes: int, size: int) -> None:
    if offset + nbytes > size:
        raise FabricError(
            f"{what}: {nbytes} bytes at offset {offset} lie outside the source of "
            f"{size} bytes"
        )


def _describing(target: MrDesc | bytes, what: str) -> MrDesc:
    """The peer's memory, also as bytes that `MrDesc.to_bytes` gave."""
    if isinstance(target, MrDesc):
        return target
    if isinstance(target, (bytes, bytearray, memoryview)):
        return MrDesc.from_bytes(bytes(target))
    hint = "; pass region.desc of the peer's region" * isinstance(target, Region)
    raise TypeError(
        f"{what}: the target is a {type(target).__name__}, not an MrDesc or its bytes"
        f"{hint}"
    )


class Writes(TransferBase):
    """The part of TransferEngine that writes, and waits for what was written."""

    def _locate(self, source: Any, what: str) -> tuple[int, int, int]:
        """The region, offset and size of a Region, or of an array within one."""
        if isinstance(source, Region):
            if self._regions.get(source.key) is not source:
                raise FabricError(
                    f"{what}: {source!r} is not registered with this engine, or no "
                    "longer; pass what its own register_memory() or alloc() gave"
                )
            return source.key, 0, source.nbytes
        array = as_array(source, what)
        begin = address_of(array)
        for region in list(self._regions.values()):  # threads may add some
            offset = begin - region.address
            if 0 <= offset and offset + array.nbytes <= region.nbytes:
                return region.key, offset, array.nbytes
        raise ValueError(
            f"{what}: this array of {array.nbytes} bytes lies in no registered memory; "
            "pass what register_memory() or alloc() gave, or a part of its array"
        )

    def submit_single_write(
        self,
        source: Any,
        target: MrDesc | bytes,
        id: int | None = None,
        *,
        source_offset: int = 0,
        target_offset: int = 0,
        nbytes: int | None = None,
        timeout_s: float | None = None,
    ) -> TransferFuture:
        """Writes ``nbytes`` of ``source`` into a peer's memory; one count there.

        The future is done once the source may be reused. That all bytes are there is
        for the receiver to know, by the count under ``id``.

        Args:
          source: a `Region`, or an array that lies within one.
          target: the peer's description of its region, or that as bytes.
          id: counted under at the receiver, below 2**27; ``None`` counts nowhere.
          source_offset: in bytes, from the begin of ``source``.
          target_offset: in bytes, from the begin of the target region.
          nbytes: ``None`` for all that follows ``source_offset``. 0 only counts.
          timeout_s: of the operation; ``None`` is the engine's.

        Raises:
          FabricError: out of range, or not a peer's; or ``source`` is not registered
            here; nothing was written.
          ValueError: ``id`` is out of range.

        Example::

          engine.submit_single_write(kv[layer], desc, id=layer, target_offset=4096)
        """
        # Small writes are many: what is right costs no call here.
        if type(source) is Region and self._regions.get(source.key) is source:
            key, begin, size = source.key, 0, source.nbytes
        else:
            key, begin, size = self._locate(source, "submit_single_write")
        if type(target) is not MrDesc:
            target = _describing(target, "submit_single_write")
        length = max(0, size - source_offset) if nbytes is None else nbytes
        if not 0 <= source_offset <= size - length <= size or target_offset < 0:
            _check_sizes(
                "submit_single_write",
                source_offset=source_offset,
                target_offset=target_offset,
                nbytes=length,
            )
            _check_range("submit_single_write", source_offset, length, size)
        try:
            native = self._native.submit_single_write(
                key,
                begin + source_offset,
                target.native,
                target_offset,
                length,
                None if id is None else _check_id(id),
                timeout_s,
            )
        except _ffi.native().StatusError as error:
            raise from_native(error) from None
        return TransferFuture(native, self)

    def submit_paged_writes(
        self,
        source: Any,
        source_pages: Any,
        target: MrDesc | bytes,
        target_pages: Any,
        page_bytes: int,
        id: int | None = None,
        *,
        source_stride: int | None = None,
        target_stride: int | None = None,
        source_offset: int = 0,
        target_offset: int = 0,
        timeout_s: float | None = None,
    ) -> TransferFuture:
        """Writes page ``source_pages[i]`` to page ``target_pages[i]``; one count.

        Page ``p`` begins at ``offset + p * stride`` bytes; the stride is
        ``page_bytes`` unless given. Up to 2**20 pages that do not follow each other.

        Example::

          # pages 3 and 5 of mine become pages 0 and 9 of theirs
          engine.submit_paged_writes(mine, [3, 5], desc, [0, 9], 4096, id=1).result()
        """
        what = "submit_paged_writes"
        key, begin, size = self._locate(source, what)
        desc = _describing(target, what)
        strides = [
            page_bytes if stride is None else stride
            for stride in (source_stride, target_stride)
        ]
        _check_sizes(
            what,
            page_bytes=page_bytes,
            source_offset=source_offset,
            target_offset=target_offset,
            source_stride=strides[0],
            target_stride=strides[1],
        )
        pages = page_indices(source_pages, what)
        if pages.size:
            last = source_offset + int(pages.max()) * strides[0]
            _check_range(what, last, page_bytes, size)
        with native_errors():
            return self._future(
                self._native.submit_paged_writes(
                    key,
                    pages,
                    strides[0],
                    begin + source_offset,
                    desc.native,
                    page_indices(target_pages, what),
                    strides[1],
                    target_offset,
                    page_bytes,
                    _check_id(id),
                    timeout_s,
                )
            )

    def submit_scatter(
        self,
        source: Any,
        targets: Sequence[ScatterTarget],
        id: int | None = None,
        *,
        timeout_s: float | None = None,
    ) -> TransferFuture:
        """Writes a slice of ``source`` to each target; one count for each of them.

        It is done when all are; if some fail, it fails with the first reason once
        the others have ended.

        Example::

          engine.submit_scatter(
              source, [jf.ScatterTarget(desc, 100 * i, 0, 100)
                       for i, desc in enumerate(descs)], id=2)
        """
        key, begin, size = self._locate(source, "submit_scatter")
        native = []
        for target in targets:
            desc, *sizes = ScatterTarget(*target)
            _check_sizes("submit_scatter", offsets_and_nbytes=min(sizes))
            _check_range("submit_scatter", sizes[0], sizes[2], size)
            desc = _describing(desc, "submit_scatter")
            native.append((desc.native, begin + sizes[0], sizes[1], sizes[2]))
        with native_errors():
            return self._future(
                self._native.submit_scatter(key, native, _check_id(id), timeout_s)
            )

    def submit_barrier(
        self, group: int, id: int = 0, *, timeout_s: float | None = None
    ) -> TransferFuture:
        """Done once each member of ``group`` has come to its barrier ``id`` as often.

        It says nothing about writes: their counts do.

        Args:
          group: from `add_peer_group`; each member has a group of the others.
          id: tells barriers apart; any u32.
        """
        with native_errors():
            return self._future(self._native.submit_barrier(group, id, timeout_s))

    def expect_imm_count(
        self,
        id: int,
        count: int,
        callback: Callable[[TransferFuture], object] | None = None,
        *,
        peers: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> TransferFuture:
        """Done once ``count`` more transfers have come under ``id``; takes them.

        What came before the call counts. Earlier callers of the same id come first.

        Args:
          id: as the senders gave it.
          count: whole transfers, however they were split.
          callback: called with the future once it is done, on a thread for callbacks.
          peers: from whom they are to come: it fails at once if one of them is lost.
          timeout_s: of the operation; ``None`` is the engine's.

        Raises:
          FabricError: a transfer under this id was given up when a part of it had
            been sent, which could not be told from what comes later; the future
            fails so, too. Give out a new id.
        """
        if count < 0:
            raise ValueError(f"expect_imm_count: count={count} is negative")
        with native_errors():
            future = self._future(
                self._native.expect_imm_count(
                    _check_id(id), count, list(peers), timeout_s
                )
            )
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def imm_counter(self, id: int) -> ImmCounter:
        """The counter of one id.

        Example::

          engine.imm_counter(7).wait(2, timeout_s=5)
        """
        _check_id(id)
        return ImmCounter(self, id)

    def imm_count(self, id: int) -> int:
        """Transfers that came under ``id`` and that nobody has waited for yet."""
        with native_errors():
            return int(self._native.imm_count(_check_id(id)))
