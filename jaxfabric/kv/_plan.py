"""Which bytes of a sender's pool go where in a receiver's: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxfabric._errors import PlanMismatchError
from jaxfabric.kv._layout import PageLayout

# What no plan can bridge. Pages, page_tokens and sharding may differ.
_MUST_AGREE = ("model", "dtype", "layers", "heads", "head_size", "caches", "order")


class PageCopies(NamedTuple):
    """Copies of equal length: ``nbytes`` from ``source[i]`` to ``target[i]``.

    Attributes:
      nbytes: of each copy.
      source: int64[n], offsets in the sender's pool, in bytes.
      target: int64[n], offsets in the receiver's.
    """

    nbytes: int
    source: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]


def check_bridge(sender: PageLayout, receiver: PageLayout) -> None:
    """Raises PlanMismatchError, with both values, if no plan leads from one to other.

    Example::

      check_bridge(prefill, decode)   # model 'a' at the sender, 'b' at the receiver
    """
    for name in _MUST_AGREE:
        here, there = getattr(sender, name), getattr(receiver, name)
        if here != there:
            raise PlanMismatchError(
                f"jf.kv: {name} is {here!r} at the sender and {there!r} at the "
                "receiver; only pages, page_tokens, tp_size and tp_rank may differ"
            )
    if not shared_heads(sender, receiver):
        raise PlanMismatchError(
            f"jf.kv: the sender, tp_rank {sender.tp_rank} of {sender.tp_size}, has "
            f"heads {_span(sender.local_heads)}, and the receiver, tp_rank "
            f"{receiver.tp_rank} of {receiver.tp_size}, heads "
            f"{_span(receiver.local_heads)}: none in common; connect others"
        )
    sources = source_ranks(sender.tp_size, receiver)
    if sender.tp_rank not in sources:
        raise PlanMismatchError(
            f"jf.kv: tp_rank {sender.tp_rank} of {sender.tp_size} senders holds the "
            f"same heads as others; tp_rank {receiver.tp_rank} of {receiver.tp_size} "
            f"receivers gets them from {list(sources)}: connect those (source_ranks)"
        )


def shared_heads(sender: PageLayout, receiver: PageLayout) -> range:
    """The heads that both have, as numbers of the whole model's."""
    ours, theirs = sender.local_heads, receiver.local_heads
    return range(max(ours.start, theirs.start), min(ours.stop, theirs.stop))


def source_ranks(tp_size: int, receiver: PageLayout) -> tuple[int, ...]:
    """Which of ``tp_size`` senders send to this receiver: they have heads of its.

    Where several senders hold the same head, one of them sends it; receivers that
    hold the same head get it from different ones, if they can.

    Example::

      source_ranks(2, layout_of_one)      # (0, 1): both must send
    """
    heads = receiver.local_heads
    if tp_size > receiver.heads:
        replicas = tp_size // receiver.heads
        return tuple(head * replicas + receiver.tp_rank % replicas for head in heads)
    each = receiver.heads // tp_size
    return tuple(range(heads.start // each, (heads.stop - 1) // each + 1))


def plan_copies(
    sender: PageLayout,
    receiver: PageLayout,
    layers: Sequence[int],
    sender_pages: Sequence[int],
    receiver_pages: Sequence[int],
    num_tokens: int,
    tokens: tuple[int, int] | None = None,
) -> PageCopies:
    """The copies that move some layers of one request.

    Token ``t`` of the request is in page ``sender_pages[t // page_tokens]`` of the
    sender, and so at the receiver. The heads that both sides have are copied. The rest
    of the last page may be copied, too: it belongs to the request.

    Args:
      sender, receiver: layouts that `check_bridge` has passed.
      layers: which ones.
      sender_pages, receiver_pages: of the whole request, in the order of its tokens.
      num_tokens: of the whole request.
      tokens: the first, and the one after the last, to be copied; ``None`` for all.
        Ranges that follow each other never write the same bytes.

    Raises:
      ValueError: too few pages, or a range, layer or page that does not exist.

    Example::

      nbytes, source, target = plan_copies(prefill, decode, [0], [3, 5], [0, 9], 32)
    """
    first, last = (0, num_tokens) if tokens is None else tokens
    if not 0 <= first <= last <= num_tokens:
        raise ValueError(
            f"tokens {first} to {last} are not a range of the request's {num_tokens}"
        )
    _check_numbers("layers", layers, sender.layers)
    ours = _pages("sender", sender, sender_pages, num_tokens)
    theirs = _pages("receiver", receiver, receiver_pages, num_tokens)
    heads = shared_heads(sender, receiver)

    # So many tokens lie next to each other on both sides, wherever one begins.
    step = math.gcd(sender.page_tokens, receiver.page_tokens, first)
    if last < num_tokens:
        step = math.gcd(step, last)
    nbytes, joined = _run(sender, receiver, len(heads), step)
    begins = np.arange(first, last, step if "page_tokens" in joined else 1)
    inner = [
        np.arange(1 if "caches" in joined else sender.caches),
        np.arange(1 if "heads" in joined else len(heads)),
    ]

    def offsets(
        layout: PageLayout, pages: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        stride = layout.strides()
        token = (
            pages[begins // layout.page_tokens] * stride["pages"]
            + begins % layout.page_tokens * stride["page_tokens"]
        )
        head = inner[1] + heads.start - layout.local_heads.start
        axes = (
            np.asarray(layers, np.int64) * stride["layers"],
            token,
            inner[0] * stride["caches"],
            head * stride["heads"],
        )
        return sum(np.ix_(*axes), np.zeros((), np.int64)).ravel()

    source, target = offsets(sender, ours), offsets(receiver, theirs)
    by_target = np.argsort(target, kind="stable")  # the engine joins neighbours
    return PageCopies(nbytes, source[by_target], target[by_target])


def _run(
    sender: PageLayout, receiver: PageLayout, heads: int, tokens: int
) -> tuple[int, set[str]]:
    """Bytes of a run that is contiguous on both sides, and the dimensions in it."""
    nbytes = sender.numpy_dtype.itemsize * sender.head_size
    sizes = {"heads": heads, "page_tokens": tokens, "caches": sender.caches}
    joined: set[str] = set()
    for name in reversed(sender.order[:-1]):
        if name not in sizes:
            break
        nbytes *= sizes[name]
        joined.add(name)
        if not sizes[name] == sender.sizes()[name] == receiver.sizes()[name]:
            break  # what lies outside of a part of it does not follow it
    return nbytes, joined


def _pages(
    side: str, layout: PageLayout, pages: Sequence[int], num_tokens: int
) -> npt.NDArray[np.int64]:
    needed = layout.pages_for(num_tokens)
    if len(pages) != needed:
        raise ValueError(
            f"{num_tokens} tokens need {needed} pages of {layout.page_tokens} at the "
            f"{side}, got {len(pages)}"
        )
    _check_numbers(f"pages of the {side}", pages, layout.pages)
    return np.asarray(pages, np.int64)


def _check_numbers(what: str, numbers: Sequence[int], size: int) -> None:
    if len(numbers) and not (min(numbers) >= 0 and max(numbers) < size):
        raise ValueError(f"{what}: {list(numbers)[:8]} are not all in 0 to {size - 1}")


def _span(heads: range) -> str:
    return f"{heads.start} to {heads.stop - 1}"
