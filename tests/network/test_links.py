"""Transfers over TCP between two network namespaces with limited links."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from network.link_pair import (
    PROGRAM,
    LinkPair,
    link_pair,
    median_ratio,
    rates_in_turns,
)
from network.namespaces import Hosts, two_hosts

pytestmark = pytest.mark.usefixtures("network_namespaces")

REGION_BYTES = 8 << 20


class Links:
    """Pairs of programs on the two hosts, over some of their links."""

    def __init__(self, hosts: Hosts, build: Path, libfabric: str) -> None:
        self.hosts = hosts
        self._program = str(build / PROGRAM)
        self._libfabric = libfabric

    def pair(self, links: list[int]) -> contextlib.AbstractContextManager[LinkPair]:
        """A writer on host 0 and a receiver on host 1, with a NIC for each link."""
        commands = []
        for host in range(2):
            nics = ",".join(self.hosts.address(host, link) for link in links)
            program = [self._program, "tcp", nics, str(REGION_BYTES), self._libfabric]
            commands.append(self.hosts.command(host, program))
        return link_pair((commands[0], commands[1]), REGION_BYTES)


@contextlib.contextmanager
def _links(build: Path, libfabric: str, rates: list[str]) -> Iterator[Links]:
    with two_hosts(rates) as hosts:
        yield Links(hosts, build, libfabric)


def _count(megabits_per_second: float, seconds: float) -> int:
    """How often the region passes such a link in that time."""
    return max(1, round(megabits_per_second * 1e6 / 8 * seconds / REGION_BYTES))


def _rates(
    links: Links, megabits: list[float], seconds: float
) -> tuple[list[float], list[float]]:
    """What engines of one link each get together, and what one over all links gets.

    In turns; those of one link run at the same time, so that they need as much of the
    machine as the other.
    """
    counts = [_count(rate, seconds) for rate in megabits]
    count = _count(sum(megabits), seconds)
    with contextlib.ExitStack() as stack:
        singles = [
            stack.enter_context(links.pair([link])) for link in range(len(megabits))
        ]
        group = stack.enter_context(links.pair(list(range(len(megabits)))))

        def sum_of_singles(id: int) -> float:
            work = list(zip(singles, counts, strict=True))
            for pair in singles:
                pair.writer.ask(f"fill {id}").check()
            for pair, count in work:
                pair.begin(id, count)
            return sum(pair.finish(id, count) for pair, count in work)

        measures = [sum_of_singles, lambda id: group.transfer(id, count)]
        of_singles, of_group = rates_in_turns(measures)
        return of_singles, of_group


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_engine_fills_equal_links(build: Path, libfabric: str, count: int) -> None:
    with _links(build, libfabric, ["500mbit"] * count) as links:
        singles, together = _rates(links, [500] * count, 0.4)
    # The best of each, as no link can be faster than its limit.
    assert max(together) >= 0.95 * max(singles)


@pytest.mark.slow
def test_a_slow_link_slows_only_itself(build: Path, libfabric: str) -> None:
    # An equal split over the four would reach 31 %.
    rates = ["1gbit", "1gbit", "1gbit", "250mbit"]
    with _links(build, libfabric, rates) as links:
        # Long enough for the end, where only the slow one is busy, to be short.
        megabits = [1000.0, 1000.0, 1000.0, 250.0]
        singles, together = _rates(links, megabits, 1.0)
    assert median_ratio(together, singles) >= 0.95


def test_a_link_that_is_down_for_3_s_loses_nothing(build: Path, libfabric: str) -> None:
    with _links(build, libfabric, ["500mbit"] * 2) as links, links.pair([0, 1]) as pair:
        pair.writer.ask("fill 1").check()
        begin = time.monotonic()
        count = _count(1000, 2)
        pair.begin(1, count, timeout_s=30)
        time.sleep(0.5)
        links.hosts.set_link(1, up=False)
        time.sleep(3)
        links.hosts.set_link(1, up=True)
        pair.finish(1, count, timeout_s=30)
        # The link's absence was felt, and nobody was lost: the next one works.
        assert time.monotonic() - begin > 3
        pair.transfer(2, _count(1000, 0.3))


def test_a_killed_target_is_an_error_soon(build: Path, libfabric: str) -> None:
    with _links(build, libfabric, ["500mbit"] * 2) as links, links.pair([0, 1]) as pair:
        pair.begin(1, _count(1000, 20), timeout_s=60)
        time.sleep(0.3)
        pair.receiver.process.kill()
        killed = time.monotonic()
        answer = pair.writer.answer(60)
        assert answer.error is not None
        assert time.monotonic() - killed < 5
