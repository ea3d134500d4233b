"""jf.kv under random cancels, deadlines, closings and kills of processes.

No page leaks, none is written late, and what goes well is equal to what was sent.

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
    Poisoned,
    connected,
    content,
    fill,
    layout,
    sides,
    taken,
)
from transfer_cases import until

import jaxfabric as jf
from jaxfabric.kv import State
from jaxfabric.kv._pages import IDS_BEGIN, IdPairs

SEED = int(os.environ.get("JAXFABRIC_KV_SEED", "6"))
CHILD = Path(__file__).parent / "kv_child.py"
IN_FLIGHT = 12
KILLED = 3  # requests of a process that is killed
FATES = {
    "well": 4,
    "sender cancels": 5,
    "receiver cancels": 5,
    "both cancel": 2,
    "receiver's deadline": 2,
    "nobody sends": 1,
    "sender closes": 0.2,
}


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
        self.ended_badly = 0
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
            self.ended_badly += 1
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
        role = str(self.rng.choice(["sender", "second"]))
        child = subprocess.Popen(
            [
                *(sys.executable, "-P", str(CHILD), role, transport),
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
                self.ended_badly += 1
        finally:
            child.kill()
            child.communicate()

    def run(self, bad_ends: int, transport: str, kills: int) -> None:
        """Until so many requests have ended badly."""
        due = [bad_ends * kill // kills for kill in range(kills)]
        while self.ended_badly < bad_ends:
            if due and self.ended_badly >= due[0]:
                due.pop(0)
                self.kill(transport)
            while len(self.live) < IN_FLIGHT:
                self.begin()
            self.end_one()
        while self.live:
            self.end_one()


def storm(transport: str, bad_ends: int, kills: int, seed: int) -> None:
    tx_layouts = [layout(), layout(page_tokens=6)]
    with sides(transport, tx_layouts, [layout(pages=64)]) as (tx, (rx,)):
        tx[1]._whole_tokens = 5
        rx._ids = IdPairs(IDS_BEGIN, IDS_BEGIN + 2 * bad_ends)  # they come round
        run = Storm(tx, rx, seed)
        run.run(bad_ends, transport, kills)

        assert run.ended_badly >= bad_ends
        until(lambda: rx.stats()["free"] == 64)
        assert run.watch.faults == []
        stats = rx.stats()
        assert stats["draining"] == stats["stray"] == stats["requests"] == 0
        assert run.watch.freed == run.pages  # each of them once
        free = rx._pages.take(64)  # none was written since
        assert len(set(free)) == 64
        assert run.watch.faults == []
        assert len(rx._legs) == 0
        assert rx._slots.free == 256
        # Those that are given out again say nothing about what they were before.
        until(lambda: rx._ids.free >= bad_ends * 3 // 4)
        counts = [rx.engine.imm_count(IDS_BEGIN + i) for i in range(2 * bad_ends)]
        usable = [not used for used in rx._ids._unusable for _ in range(2)]
        assert not any(np.array(counts)[usable])
        for each in tx:
            assert each.stats()["bytes"] == each.stats()["requests"] == 0


def test_a_thousand_requests_that_end_badly() -> None:
    storm("shm", 1000, 4, SEED)


@pytest.mark.parametrize("transport", ["ofi/tcp", "fake"])
def test_requests_that_end_badly_over(transport: str) -> None:
    storm(transport, 150, transport == "ofi/tcp", SEED)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_requests_that_end_badly(seed: int) -> None:
    storm("shm", 1000, 10, seed)
