"""PageLayout: what a paged KV cache looks like, by names and sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  # so that np.dtype knows bfloat16 and its like
import numpy as np

from jaxfabric._errors import FabricError

_SIZE_MAX = 1 << 32
_BYTES_MAX = 1 << 48
_NAME_CHARS_MAX = 256
_ORDER = ("layers", "pages", "caches", "page_tokens", "heads", "head_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageLayout:
    """The paged KV cache of one process: one array, its dimensions by name.

    Both sides of a transfer have one, and tell it to each other when they connect.

    Args:
      model: name of the model and its revision; both sides must have the same.
      layers: of the model, those that have a cache.
      pages: in this process's pool; sides may differ.
      page_tokens: tokens that a page holds; sides may differ.
      heads: KV heads of the whole model, not only of this process.
      head_size: numbers in a head.
      dtype: name of the dtype of a number, such as ``"bfloat16"``.
      caches: 2 for keys and values; 1 for one latent cache.
      tp_size: processes that share the heads (tensor parallel degree), each with
        ``heads // tp_size`` of them; sides may differ. Of more processes than heads,
        ``tp_size // heads`` that follow each other hold the same head.
      tp_rank: which of them this is.
      order: the dimensions, outermost first; ``head_size`` is the last one.

    Raises:
      ValueError: a size is not positive, or they do not fit each other.

    Example::

      layout = jf.kv.PageLayout(model="tiny", layers=4, pages=64, page_tokens=16,
                                heads=8, head_size=64, dtype="bfloat16")
      layout.shape        # (4, 64, 2, 16, 8, 64)
    """

    model: str
    layers: int
    pages: int
    page_tokens: int
    heads: int
    head_size: int
    dtype: str
    caches: int = 2
    tp_size: int = 1
    tp_rank: int = 0
    order: tuple[str, ...] = _ORDER

    def __post_init__(self) -> None:
        for name in (*_ORDER, "tp_size"):
            size = getattr(self, name)
            if type(size) is not int or not 0 < size < _SIZE_MAX:
                raise ValueError(
                    f"PageLayout: {name}={size!r} must be an integer, at least 1 and "
                    "below 2**32"
                )
        if type(self.tp_rank) is not int or not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(
                f"PageLayout: tp_rank={self.tp_rank!r} must be at least 0 and below "
                f"tp_size={self.tp_size}"
            )
        if self.heads % self.tp_size and self.tp_size % self.heads:
            raise ValueError(
                f"PageLayout: heads={self.heads} cannot be shared evenly by "
                f"tp_size={self.tp_size} processes"
            )
        if not isinstance(self.model, str) or len(self.model) > _NAME_CHARS_MAX:
            raise ValueError("PageLayout: model is a string of up to 256 characters")
        try:
            kind = np.dtype(self.dtype)
        except (TypeError, ValueError, SyntaxError):
            kind = np.dtype(object)
        if kind.hasobject or kind.name != self.dtype:
            raise ValueError(
                f"PageLayout: dtype={self.dtype!r} is no name of a dtype of numbers, "
                "such as 'bfloat16' or 'float8_e4m3fn'"
            )
        object.__setattr__(self, "order", tuple(self.order))
        if sorted(self.order) != sorted(_ORDER) or self.order[-1] != "head_size":
            raise ValueError(
                f"PageLayout: order={self.order} must hold each of {_ORDER} once, and "
                "head_size last"
            )
        if self.nbytes >= _BYTES_MAX:
            raise ValueError(f"PageLayout: {self.nbytes} bytes; fewer than 2**48 fit")

    @property
    def local_heads(self) -> range:
        """The heads of this process, as numbers of the whole model's."""
        count = max(1, self.heads // self.tp_size)
        first = self.tp_rank // self.replicas * count
        return range(first, first + count)

    @property
    def replicas(self) -> int:
        """How many processes hold the same heads."""
        return max(1, self.tp_size // self.heads)

    def sizes(self) -> dict[str, int]:
        """The size of each dimension in this process, outermost first."""
        named = {name: getattr(self, name) for name in self.order}
        named["heads"] = len(self.local_heads)
        return named

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of this process's pool."""
        return tuple(self.sizes().values())

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype, as NumPy's."""
        return np.dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of this process's pool."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def strides(self) -> dict[str, int]:
        """Bytes from one entry of each dimension to the next."""
        strides: dict[str, int] = {}
        step = self.numpy_dtype.itemsize
        for name, size in reversed(self.sizes().items()):
            strides[name] = step
            step *= size
        return {name: strides[name] for name in self.order}

    def pages_for(self, num_tokens: int) -> int:
        """How many pages so many tokens need."""
        return -(-num_tokens // self.page_tokens)

    def to_json(self) -> dict[str, Any]:
        """As values that JSON knows, for the handshake."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> PageLayout:
        """Reads what `to_json` gave; raises FabricError on anything else."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, Mapping) or set(value) != names:
            raise FabricError("PageLayout: a peer sent no description of a layout")
        order = value["order"]
        if not isinstance(order, list | tuple) or not all(
            isinstance(name, str) for name in order
        ):
            raise FabricError("PageLayout: a peer sent an order that is no list")
        if not isinstance(value["dtype"], str):
            raise FabricError("PageLayout: a peer sent a dtype that is no name")
        try:
            return cls(**{**value, "order": tuple(order)})
        except (ValueError, TypeError) as error:
            raise FabricError(f"a peer sent a bad layout: {error}") from None
