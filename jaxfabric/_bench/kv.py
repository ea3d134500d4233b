"""`jaxfabric bench kv`: writes of a layer's pages, of the sizes that KV caches have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from . import put
from .case import Case, window_for

PAGE_SIZES = (1 << 10, 8 << 10, 16 << 10, 64 << 10)
# Pages of one operation: of a layer of a prompt of 1,024 tokens, 16 in a page.
PAGES = 64


def plan(page_sizes: tuple[int, ...], pages: int, window: int) -> list[Case]:
    """One case for each page size, each operation of so many pages.

    >>> [case.label for case in plan((1024, 8192), 64, 16)]
    ['64 pages of 1 KiB', '64 pages of 8 KiB']
    """
    return [
        Case("paged", pages * page, 1, window_for(pages * page, window), page)
        for page in sorted(page_sizes)
    ]


def run(
    settings: put.Settings,
    page_sizes: tuple[int, ...],
    pages: int,
    say: Callable[[str], None],
) -> put.Result:
    """Measures all page sizes; see `put.run`."""
    cases = plan(page_sizes, pages, settings.window)
    chosen = dataclasses.replace(
        settings, kinds=("paged",), sizes=tuple(case.size for case in cases)
    )
    return put.run(chosen, say, cases, "kv")
