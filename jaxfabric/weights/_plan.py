"""Plans: which rank of one job writes which boxes of its shards to which of another."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import zlib
from typing import Any

from jaxfabric._errors import FabricError, PlanMismatchError
from jaxfabric.weights._buckets import (
    BLOCK,
    Bucket,
    Move,
    bucket_size,
    in_buckets,
    scale_shape,
)
from jaxfabric.weights._copies import (
    Copies,
    copies_of,
    loads_of,
    received_by,
    sent_by,
)
from jaxfabric.weights._dtypes import E4M3, wide_float
from jaxfabric.weights._layout import TreeLayout
from jaxfabric.weights._match import Link, Rename, check_cover, match, view
from jaxfabric.weights._tiles import tile_shape, tiles_of

BUCKET_BYTES = 32 << 20
_BUCKET_BYTES_MIN = 1 << 18  # a row of quantised blocks fits
_TEXT_BYTES_MAX = 1 << 28
_MAGIC = b"jf.plan"
_FORMAT = 2  # also of how a plan is carried out: both jobs must do it alike


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who writes what to whom; made once by `plan`, the same in both jobs.

    Attributes:
      source, target: the layouts it leads from and to.
      links: which part of which leaf becomes which part of which.
      bucket_bytes: no write is larger.
    """

    source: TreeLayout
    target: TreeLayout
    links: tuple[Link, ...]
    bucket_bytes: int

    def sends(self, rank: int) -> dict[int, list[Bucket]]:
        """What a source rank writes: for each target rank, buckets in order."""
        return self._buckets(sent_by(self._copies, rank))

    def receives(self, rank: int) -> dict[int, list[Bucket]]:
        """What a target rank is written: for each source rank, buckets in order."""
        return self._buckets(received_by(self._copies, rank))

    @functools.cached_property
    def digest(self) -> str:
        """Equal for equal plans, in every process."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """All of it; `from_bytes` reads it."""
        return self._bytes

    @functools.cached_property
    def _bytes(self) -> bytes:
        text = json.dumps(
            [
                [
                    (
                        *(link.source, link.target),
                        *(link.source_start, link.target_start, link.extent),
                        link.scales,
                    )
                    for link in self.links
                ],
                self.bucket_bytes,
            ],
            separators=(",", ":"),
        )
        parts = [
            self.source.to_bytes(),
            self.target.to_bytes(),
            zlib.compress(text.encode(), 6),
        ]
        begin = _MAGIC + bytes([_FORMAT])
        return begin + b"".join(
            len(part).to_bytes(8, "little") + part for part in parts
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Reads what `to_bytes` gave; raises FabricError on anything else."""
        try:
            source, target, text = _split(data)
            inflate = zlib.decompressobj()
            links, bucket_bytes = json.loads(inflate.decompress(text, _TEXT_BYTES_MAX))
            read = cls(
                TreeLayout.from_bytes(source),
                TreeLayout.from_bytes(target),
                tuple(_read_link(link) for link in links),
                int(bucket_bytes),
            )
            read.check()
        except (
            *(ValueError, TypeError, IndexError, OverflowError),
            *(zlib.error, RecursionError),
        ) as error:
            raise FabricError(f"jf.weights: these bytes are no plan: {error}") from None
        return read

    @functools.cached_property
    def _copies(self) -> list[Copies]:
        return copies_of(self.source, self.target, self.links)

    def _buckets(self, moves: dict[int, list[Move]]) -> dict[int, list[Bucket]]:
        return {
            rank: list(
                in_buckets(
                    ((move, self.links[move.link].scales >= 0) for move in of_rank),
                    bucket_size(
                        sum(move.nbytes for move in of_rank),
                        self.bucket_bytes,
                        len(self.source.ranks),
                    ),
                )
            )
            for rank, of_rank in moves.items()
        }

    # --- For people ---

    def check(self) -> None:
        """Raises ValueError or PlanMismatchError if the links do not fit the layouts.

        It is called for each plan that is made, and for each that comes as bytes: a
        target leaf that is not filled, or twice, is named.
        """
        if type(self.bucket_bytes) is not int:
            raise ValueError(
                f"jf.weights.plan: bucket_bytes={self.bucket_bytes!r} is no integer"
            )
        if not _BUCKET_BYTES_MIN <= self.bucket_bytes < 1 << 32:
            raise ValueError(
                f"jf.weights.plan: bucket_bytes={self.bucket_bytes} must be at least "
                f"{_BUCKET_BYTES_MIN} and below 2**32"
            )
        for link in self.links:
            for layout, number, start in (
                (self.source, link.source, link.source_start),
                (self.target, link.target, link.target_start),
            ):
                if number < 0:
                    raise ValueError("a link has no leaf")
                leaf = layout.leaves[number]
                wanted = view(leaf.shape, len(link.extent))
                if len(start) != len(wanted) or not all(
                    0 <= begin and size > 0 and begin + size <= most
                    for begin, size, most in zip(
                        start, link.extent, wanted, strict=True
                    )
                ):
                    raise ValueError(f"a link leads outside of {leaf.name}")
            if link.scales >= 0:
                self._check_blocks(link)
        check_cover(self.target, self.links, self.source)

    def _check_blocks(self, link: Link) -> None:
        """Quantised blocks lie in one tile of either side, with their scales."""
        source = self.source.leaves[link.source]
        target = self.target.leaves[link.target]
        scales = self.target.leaves[link.scales]
        dimensions = min(len(source.shape), len(target.shape))
        if dimensions < 2 or target.dtype != E4M3 or not wide_float(source.dtype):
            raise PlanMismatchError(
                f"jf.weights.plan: {source.name}, {source.dtype}{source.shape}, cannot "
                f"be quantised into {target.name}, {target.dtype}: blocks have two "
                "dimensions of floats of two bytes or more"
            )
        if scales.shape != scale_shape(target.shape) or scales.dtype != "float32":
            raise PlanMismatchError(
                f"jf.weights.plan: {scales.name} has shape {scales.shape}, which are "
                f"no scales of {target.name}"
            )
        for layout, leaf, start in (
            (self.source, source, link.source_start),
            (self.target, target, link.target_start),
        ):
            sizes = tile_shape(leaf, tiles_of(layout, leaf))
            for axis in (-2, -1):
                whole = sizes[axis] == leaf.shape[axis]
                if (not whole and sizes[axis] % BLOCK) or start[axis] % BLOCK:
                    raise PlanMismatchError(
                        f"jf.weights.plan: {leaf.name} of shape {leaf.shape} is cut "
                        f"into tiles of {sizes}, through blocks of {BLOCK}x{BLOCK}; "
                        "cut it at multiples of them, or elsewhere, or quantise in "
                        "the trainer's program and push payload and scales"
                    )
        if (target.mesh, target.spec) != (scales.mesh, scales.spec):
            raise PlanMismatchError(
                f"jf.weights.plan: {scales.name} is sharded otherwise than "
                f"{target.name}, whose scales it takes"
            )

    def loads(self, *, quantised: bool = False) -> dict[tuple[int, int], int]:
        """Bytes from each source rank to each target rank, scales left out.

        Pairs that have nothing to do with each other are absent.

        Args:
          quantised: only of what is quantised on its way.
        """
        chosen = [
            copies
            for copies in self._copies
            if not quantised or self.links[int(copies.links[0])].scales >= 0
        ]
        return loads_of(chosen, self.source, self.target)

    def summary(self) -> str:
        """What it does, in words.

        Example::

          print(jf.weights.plan(trainer, sampler).summary())
        """
        loads = self.loads()
        sent = dict.fromkeys(self.source.ranks, 0)
        taken = dict.fromkeys(self.target.ranks, 0)
        for (source, target), nbytes in loads.items():
            sent[source] += nbytes
            taken[target] += nbytes
        quantised = sum(link.scales >= 0 for link in self.links)
        cast = sum(
            self.source.leaves[link.source].dtype
            != self.target.leaves[link.target].dtype
            for link in self.links
        )
        return "\n".join(
            [
                f"{len(self.source.leaves)} leaves on {len(self.source.ranks)} ranks "
                f"become {len(self.target.leaves)} leaves on "
                f"{len(self.target.ranks)} ranks.",
                f"{_readable(sum(loads.values()))} travel, in buckets of up to "
                f"{_readable(self.bucket_bytes)}; the target's tree has "
                f"{_readable(self.target.nbytes)}.",
                f"A source rank sends {_span(sent)}, a target rank receives "
                f"{_span(taken)}.",
                f"{cast} parts change their dtype, {quantised} of them in blocks of "
                f"{BLOCK}x{BLOCK} with scales.",
            ]
        )


def plan(
    source: TreeLayout,
    target: TreeLayout,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    rename: Rename | None = None,
    cast: bool = False,
    scales: str | None = None,
) -> Plan:
    """Plans how the parameters of one job get into another's shards.

    Each source rank writes straight to the target ranks that need what it holds;
    where several have it, they share it by bytes, so that links are used evenly: large
    leaves are cut for that. It is a pure function: both jobs make the same plan.

    Args:
      source, target: of the trainer and of the sampler.
      bucket_bytes: no write is larger; 256 KiB to 4 GiB.
      rename: for each source leaf (a mapping, or a function of its name) the name of
        the target leaf; or a `Place` in one, a `Split` into several, or ``None`` to
        leave it out. What a mapping does not have keeps its name.
      cast: whether leaves of another dtype are rounded to the target's, once: floats
        (float64 through float32), and integers that fit. Not to or from float8, which
        needs scales.
      scales: how the scales of a leaf are called, such as ``"{}_scale_inv"``: target
        leaves of float8_e4m3fn that have such a leaf (float32, one number for each
        128x128 block of the last two dimensions) are quantised in blocks. What is
        float8_e4m3fn at the source already is copied, and so are its scales.

    Raises:
      PlanMismatchError: a target leaf would not be filled, or twice; shapes or dtypes
        do not fit; it names the leaves.
      ValueError: ``bucket_bytes`` is out of range.

    Example::

      plan = jf.weights.plan(trainer, sampler, rename={"embed": "tok_embeddings"})
      print(plan.summary())
    """
    if not source.leaves or not target.leaves:
        which = "target" if source.leaves else "source"
        raise PlanMismatchError(f"jf.weights.plan: the {which}'s tree has no leaves")
    made = Plan(
        source,
        target,
        match(source, target, rename, cast=cast, scales=scales),
        bucket_bytes,
    )
    made.check()
    return made


def _span(nbytes: dict[int, int]) -> str:
    return f"{_readable(min(nbytes.values()))} to {_readable(max(nbytes.values()))}"


def _readable(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    raise AssertionError


def _split(data: bytes) -> list[bytes]:
    begin, data = data[: len(_MAGIC) + 1], data[len(_MAGIC) + 1 :]
    if begin[:-1] != _MAGIC:
        raise ValueError("they do not begin as one of this version of jaxfabric does")
    if begin[-1] != _FORMAT:
        raise ValueError(
            f"their format is {begin[-1]}, and {_FORMAT} is expected: use the same "
            "jaxfabric on both sides, and make saved plans anew"
        )
    parts = []
    while data:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 + length:
            raise ValueError("it is cut off")
        parts.append(data[8 : 8 + length])
        data = data[8 + length :]
    if len(parts) != 3:
        raise ValueError(f"it has {len(parts)} parts, not 3")
    return parts


def _read_link(value: Any) -> Link:
    source, target, source_start, target_start, extent, scales = value

    def box(numbers: Any) -> tuple[int, ...]:
        return tuple(_number(number) for number in numbers)

    return Link(
        _number(source),
        _number(target),
        box(source_start),
        box(target_start),
        box(extent),
        _number(scales),
    )


def _number(value: Any) -> int:
    if type(value) is not int or not -1 <= value < 1 << 40:
        raise ValueError("a link has what is no number")
    return value
