"""jf.kv under random cancels, deadlines and kills: no page leaks, none is written late.

Freed pages are filled with poison, and must still be full of it when they are given
out again. JAXFABRIC_KV_SEED chooses another sequence of events.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kv_cases import (
    connected,
    content,
    fill,
    is_poison,
    layout,
    poison_pages,
    sides,
    taken,
)
from transfer_cases import until

import jaxfabric as jf
from jaxfabric.kv import State

SEED = int(os.environ.get("JAXFABRIC_KV_SEED", "6"))
CHILD = Path(__file__).parent / "kv_child.py"
IN_FLIGHT = 12
KILLED = 3  # requests of a process that is killed
FATES = {
    "well": 6,
    "sender cancels": 5,
    "receiver cancels": 5,
    "both cancel": 2,
    "receiver's deadline": 2,
    "nobody sends": 1,
    "sender closes": 0.1,
}


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


class Storm:
    """Requests of random fates, up to IN_FLIGHT at a time, over one receiver."""

    def __init__(
        self, senders: list[jf.kv.PageSender], rx: jf.kv.PageReceiver, seed: int
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.rx, self.watch = rx, Poisoned(rx)
        self.senders = senders
        self.peers = [connected(tx, rx) for tx in senders]
        self.pages = 0
        self.events = 0
        self.live: list[tuple[str, Any, Any, Any]] = []
        self.request_id = int(self.rng.integers(1 << 62))
        self.cache = [content(tx.layout, 11, 7 + i) for i, tx in enumerate(senders)]
        for tx, cache in zip(senders, self.cache, strict=True):
            fill(tx.pool, tx.layout, range(tx.layout.pages_for(11)), cache)

    def begin(self) -> None:
        """One more request, of which some layers are sent."""
        rng = self.rng
        fate = rng.choice(
            list(FATES), p=np.array([*FATES.values()]) / sum(FATES.values())
        )
        tokens = int(rng.integers(1, 12))
        which = int(rng.integers(len(self.senders)))
        tx = self.senders[which]
        self.request_id += 1
        early = bool(rng.integers(2))
        request = sending = None
        limit_s = 1e-3 * float(rng.integers(1, 20)) if "deadline" in fate else 30.0
        if early:
            request = self.rx.expect(self.request_id, tokens, limit_s)
        if fate != "nobody sends":
            pages = range(tx.layout.pages_for(tokens))
            sending = tx.begin(
                self.request_id, self.peers[which], pages=pages, num_tokens=tokens
            )
        if not early:
            request = self.rx.expect(self.request_id, tokens, limit_s)
        assert request is not None
        self.pages += len(request.pages)
        self.live.append((str(fate), request, sending, which))
        whole = fate == "well"
        layers = tx.layout.layers if whole else int(rng.integers(tx.layout.layers + 1))
        try:
            for layer in range(layers if sending is not None else 0):
                sending.send(layer)  # type: ignore[union-attr]
            if (
                sending is not None
                and layers == tx.layout.layers
                and rng.integers(2) + whole
            ):
                sending.send_tail(b"%d" % self.request_id)
        except jf.FabricError:
            assert not whole  # it has failed meanwhile

    def end_one(self) -> None:
        """Whatever is to happen to the oldest one, or to any of them."""
        place = int(self.rng.integers(len(self.live)))
        fate, request, sending, which = self.live.pop(place)
        self.events += 1
        if "cancel" in fate or fate == "nobody sends":
            time.sleep(float(self.rng.choice([0.0, 0.0, 1e-3])))
        if fate in ("receiver cancels", "both cancel", "nobody sends"):
            request.cancel()
        if fate in ("sender cancels", "both cancel"):
            sending.cancel()
        if fate == "sender closes":
            self.reopen(which)
        error = request.exception(30)
        if fate == "well" and error is None:
            np.testing.assert_array_equal(
                taken(self.rx.pool, self.rx.layout, request.pages, request.num_tokens),
                self.cache[which][:, : request.num_tokens],
            )
            assert request.tail == b"%d" % request.request_id
        elif error is not None:
            assert isinstance(error, jf.FabricError)
        request.release()
        if sending is not None:
            sending.exception(30)

    def reopen(self, which: int) -> None:
        """Another PageSender takes the place of one; the rest of its requests fail."""
        old = self.senders[which]
        old.close()
        new = self.senders[which] = jf.kv.PageSender(
            old.engine, old.layout, pool=old._memory.region
        )
        self.peers[which] = connected(new, self.rx)

    def kill(self, transport: str) -> None:
        """A process that has begun some requests is killed."""
        first = self.request_id + 1
        self.request_id += KILLED
        ids = range(first, self.request_id + 1)
        requests = [self.rx.expect(i, 10) for i in ids]
        self.pages += sum(len(request.pages) for request in requests)
        child = subprocess.Popen(
            [
                *(sys.executable, "-P", str(CHILD), "sender", transport),
                *(
                    json.dumps(layout().to_json()),
                    self.rx.engine.address().to_bytes().hex(),
                ),
                *map(str, ids),
            ],
            stdin=subprocess.PIPE,
        )
        try:
            until(lambda: requests[0].state is not State.WAITING)
            time.sleep(float(self.rng.random()) * 3e-3)
            child.send_signal(signal.SIGKILL)
            child.wait(10)
            for request in requests:
                if request.state is State.WAITING:  # it came no further
                    request.cancel()
                assert isinstance(request.exception(20), jf.FabricError)
                self.events += 1
        finally:
            child.kill()
            child.communicate()

    def run(self, events: int, transport: str, kills: int) -> None:
        """Until so many requests have met their fate."""
        due = [events * kill // kills for kill in range(kills)]
        while self.events < events:
            if due and self.events >= due[0]:
                due.pop(0)
                self.kill(transport)
            while len(self.live) < IN_FLIGHT:
                self.begin()
            self.end_one()
        while self.live:
            self.end_one()


def storm(transport: str, events: int, kills: int, seed: int) -> None:
    tx_layouts = [layout(), layout(page_tokens=6)]
    with sides(transport, tx_layouts, [layout(pages=64)]) as (tx, (rx,)):
        tx[1]._whole_tokens = 5
        run = Storm(tx, rx, seed)
        run.run(events, transport, kills)

        def quiet() -> bool:
            return rx.stats()["draining"] == 0

        until(quiet)
        stats = rx.stats()
        assert run.watch.faults == []
        assert stats["free"] + stats["stray"] == 64
        assert stats["requests"] == 0
        assert run.watch.freed == run.pages - stats["stray"]
        if transport == "shm":
            until(lambda: rx.stats()["free"] == 64)
        free = rx._pages.take(rx._pages.free)  # none was written since
        assert len(set(free)) == len(free)
        assert run.watch.faults == []
        assert len(rx._legs) == 0 or stats["stray"]
        assert rx._slots.free == 256 - len(rx._legs)
        for each in tx:
            assert each.stats()["bytes"] == each.stats()["requests"] == 0


def test_a_thousand_random_kills_and_cancels() -> None:
    storm("shm", 1000, 2, SEED)


@pytest.mark.parametrize("transport", ["ofi/tcp", "fake"])
def test_random_kills_and_cancels_over(transport: str) -> None:
    storm(transport, 200, transport == "ofi/tcp", SEED)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_random_kills_and_cancels(seed: int) -> None:
    storm("shm", 1000, 10, seed)
