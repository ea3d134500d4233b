"""Layouts, engines and oracles for the tests of jf.kv."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transfer_cases import POISON, engine

import jaxfabric as jf

DIMS = ("layers", "pages", "caches", "page_tokens", "heads", "head_size")


def layout(**changes: Any) -> jf.kv.PageLayout:
    """A small one."""
    small = {
        "model": "tiny",
        "layers": 3,
        "pages": 24,
        "page_tokens": 4,
        "heads": 4,
        "head_size": 8,
        "dtype": "float32",
    }
    return jf.kv.PageLayout(**{**small, **changes})


def content(of: jf.kv.PageLayout, num_tokens: int, seed: int) -> np.ndarray:
    """A request's whole cache: [layers, tokens, caches, heads, head_size]."""
    shape = (of.layers, num_tokens, of.caches, of.heads, of.head_size)
    return np.random.default_rng(seed).integers(0, 99, shape).astype(of.numpy_dtype)


def named(pool: np.ndarray, of: jf.kv.PageLayout) -> np.ndarray:
    """A view of a pool with its dimensions in the order of DIMS."""
    return pool.transpose([of.order.index(name) for name in DIMS])


def fill(
    pool: np.ndarray, of: jf.kv.PageLayout, pages: Sequence[int], cache: np.ndarray
) -> None:
    """Puts this process's heads of a request's cache into pages, token by token."""
    view = named(pool, of)
    heads = of.local_heads
    for token in range(cache.shape[1]):
        page, place = pages[token // of.page_tokens], token % of.page_tokens
        view[:, page, :, place] = cache[:, token, :, heads.start : heads.stop]


def taken(
    pool: np.ndarray, of: jf.kv.PageLayout, pages: Sequence[int], num_tokens: int
) -> np.ndarray:
    """What is in pages: [layers, tokens, caches, local heads, head_size]."""
    view = named(pool, of)[:, list(pages)]
    layers, count, caches, size, *head = view.shape
    tokens = view.transpose(0, 1, 3, 2, 4, 5).reshape(
        layers, count * size, caches, *head
    )
    return tokens[:, :num_tokens]


def poison_pages(pool: np.ndarray, of: jf.kv.PageLayout, pages: Sequence[int]) -> None:
    """Fills them with what no test writes."""
    raw = np.full(of.head_size * of.numpy_dtype.itemsize, POISON, np.uint8)
    named(pool, of)[:, list(pages)] = raw.view(of.numpy_dtype)


def is_poison(pool: np.ndarray, of: jf.kv.PageLayout, pages: Sequence[int]) -> bool:
    """Whether nobody has written into them."""
    held = np.ascontiguousarray(named(pool, of)[:, list(pages)])
    return bool((held.view(np.uint8) == POISON).all())


class Poisoned:
    """Watches the pages that a receiver gives out and takes back."""

    def __init__(self, rx: jf.kv.PageReceiver) -> None:
        self.faults: list[str] = []
        self.freed = 0
        pages, of = rx._pages, rx.layout
        take, give = pages.take, pages.give
        poison_pages(rx.pool, of, range(of.pages))

        def checked_take(count: int) -> tuple[int, ...]:
            numbers = take(count)
            if not is_poison(rx.pool, of, numbers):
                self.faults.append(f"pages {numbers} were written after they were free")
            return numbers

        def checked_give(numbers: Any) -> None:
            poison_pages(rx.pool, of, numbers)
            self.freed += len(numbers)
            try:
                give(numbers)
            except ValueError as error:
                self.faults.append(str(error))

        pages.take, pages.give = checked_take, checked_give  # type: ignore[method-assign]


@contextlib.contextmanager
def sides(
    transport: str,
    senders: Sequence[jf.kv.PageLayout],
    receivers: Sequence[jf.kv.PageLayout],
    **options: Any,
) -> Iterator[tuple[list[jf.kv.PageSender], list[jf.kv.PageReceiver]]]:
    """Senders and receivers of one process, each with an engine of its own."""
    with contextlib.ExitStack() as stack:

        def open_engine(name: str) -> jf.TransferEngine:
            return stack.enter_context(engine(transport, name=name))

        rx = [
            stack.enter_context(jf.kv.PageReceiver(open_engine(f"decode{i}"), each))
            for i, each in enumerate(receivers)
        ]
        tx = [
            stack.enter_context(
                jf.kv.PageSender(open_engine(f"prefill{i}"), each, **options)
            )
            for i, each in enumerate(senders)
        ]
        yield tx, rx


def connected(sender: jf.kv.PageSender, receiver: jf.kv.PageReceiver) -> int:
    """The receiver's number at the sender."""
    return int(sender.connect(receiver.engine.address()).result())


def send_all(request: jf.kv.Sending, layers: int, tail: bytes = b"") -> None:
    """All that a prefill sends."""
    for layer in range(layers):
        request.send(layer)
    request.send_tail(tail)
