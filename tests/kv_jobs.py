"""Two jobs that move KV caches, and a third one that is killed, in processes.

    python tests/kv_jobs.py ofi/tcp 2-1 1-2 2-2     # all of them here
    python tests/kv_jobs.py ofi/tcp 2-1 decode      # one of them, over stdin and stdout

Of a number of requests at once, half arrive, and must equal what was sent; the others
are cancelled, by either side. Freed pages are filled with poison, which must stay.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
from kv_cases import Poisoned, content, fill, is_poison, layout, taken
from transfer_cases import until

import jaxfabric as jf
from jaxfabric.kv import State

# Loaded before the jobs are forked, so that they need not.
ENGINE = jf.TransferEngine
REQUESTS = 64
TOKENS = 40
DOOMED = 1 << 40  # the id of the request of the job that is killed
DOOMED_TOKENS = 1000
LIMIT_S = 60.0
SETTLE_S = 0.2  # what a write that comes late may take


class Channel:
    """Lines of JSON, each way."""

    def __init__(self, reads: IO[str], writes: IO[str]) -> None:
        self._reads, self._writes = reads, writes

    def put(self, value: Any) -> None:
        print(json.dumps(value), file=self._writes, flush=True)

    def close(self) -> None:
        for end in (self._reads, self._writes):
            with contextlib.suppress(OSError):  # nobody reads what is left
                end.close()

    def get(self) -> Any:
        line = self._reads.readline()
        if not line:
            raise ConnectionError("the other process has ended")
        return json.loads(line)


def layouts(tp_size: int, pages: int, page_tokens: int) -> list[jf.kv.PageLayout]:
    sizes = {"pages": pages, "page_tokens": page_tokens, "head_size": 16}
    return [layout(tp_size=tp_size, tp_rank=rank, **sizes) for rank in range(tp_size)]


def _is_granted(request: jf.kv.Receiving) -> bool:
    return request.state is not State.WAITING


def _all_free(rx: jf.kv.PageReceiver) -> bool:
    return rx.stats()["free"] == rx.layout.pages


def _has_pages(sending: jf.kv.Sending) -> bool:
    return all(leg.pages for leg in sending._legs)


def fate(number: int) -> str:
    return ("well", "sender cancels", "well", "receiver cancels")[number % 4]


@contextlib.contextmanager
def engines(transport: str, name: str, count: int) -> Iterator[list[Any]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                ENGINE(
                    *(transport,),
                    job="test",
                    token="secret",
                    name=f"{name}{i}",
                    timeout_s=LIMIT_S,
                )
            )
            for i in range(count)
        ]


def decode(transport: str, tp: tuple[int, int], requests: int, link: Channel) -> None:
    """Expects all of them, and reports how they ended."""
    equal = cancelled = 0
    faults: list[str] = []
    with engines(transport, "decode", tp[1]) as opened:
        pages = 3 * requests + 64
        receivers = [
            jf.kv.PageReceiver(engine, each)
            for engine, each in zip(opened, layouts(tp[1], pages, 16), strict=True)
        ]
        watches = [Poisoned(rx) for rx in receivers]
        expected = [[rx.expect(i, TOKENS) for i in range(requests)] for rx in receivers]
        doomed = [rx.expect(DOOMED, DOOMED_TOKENS) for rx in receivers]
        link.put([engine.address().to_bytes().hex() for engine in opened])
        for rx, received, lost in zip(receivers, expected, doomed, strict=True):
            for i, request in enumerate(received):
                if fate(i) == "receiver cancels":
                    until(functools.partial(_is_granted, request))
                    request.cancel()
            heads = rx.layout.local_heads
            for i, request in enumerate(received):
                error = request.exception()
                if error is None:
                    cache = content(rx.layout, TOKENS, i)[..., heads, :]
                    got = taken(rx.pool, rx.layout, request.pages, TOKENS)
                    assert np.array_equal(got, cache), f"request {i} differs"
                    assert request.tail == b"tail of %d" % i
                    equal += 1
                else:
                    assert fate(i) != "well", error
                    assert "cancelled" in str(error), error
                    cancelled += 1
                request.release()
            assert isinstance(lost.exception(), jf.PeerLostError), lost.exception()
            lost.release()
        gone = time.monotonic()
        for rx in receivers:
            until(functools.partial(_all_free, rx))
        freed_s = time.monotonic() - gone
        time.sleep(SETTLE_S)
        for rx, watch in zip(receivers, watches, strict=True):
            if not is_poison(rx.pool, rx.layout, range(rx.layout.pages)):
                watch.faults.append("pages were written after they were freed")
            faults += watch.faults
        link.put(
            {
                "equal": equal,
                "cancelled": cancelled,
                "faults": faults,
                "freed_s": freed_s,
            }
        )
        link.get()  # senders take leave first
        for rx in receivers:
            rx.close()


@contextlib.contextmanager
def senders(
    transport: str, name: str, tp: tuple[int, int], pages: int, link: Channel
) -> Iterator[list[tuple[jf.kv.PageSender, list[int]]]]:
    """Each with the receivers that share its heads, as it calls them."""
    addresses = link.get()
    theirs = layouts(tp[1], 1, 16)
    with engines(transport, name, tp[0]) as opened, contextlib.ExitStack() as stack:
        made = []
        for engine, each in zip(opened, layouts(tp[0], pages, 8), strict=True):
            tx = stack.enter_context(jf.kv.PageSender(engine, each))
            peers = [
                tx.connect(bytes.fromhex(address)).result()
                for address, other in zip(addresses, theirs, strict=True)
                if each.tp_rank in jf.kv.source_ranks(tp[0], other)
            ]
            made.append((tx, peers))
        link.put("connected")  # before the receivers may have to renew their address
        yield made


def prefill(transport: str, tp: tuple[int, int], requests: int, link: Channel) -> None:
    """Sends all of them at once, a layer of each in turn."""
    each = -(-TOKENS // 8)
    with senders(transport, "prefill", tp, each * requests, link) as made:
        sendings = []
        for i in range(requests):
            pages = range(each * i, each * (i + 1))
            for tx, peers in made:
                fill(tx.pool, tx.layout, pages, content(tx.layout, TOKENS, i))
                sendings.append((i, tx.begin(i, peers, pages=pages, num_tokens=TOKENS)))
        for layer in range(made[0][0].layout.layers):
            for i, sending in sendings:
                with contextlib.suppress(jf.FabricError):  # cancelled meanwhile
                    sending.send(layer)
                if layer == i % 3 and fate(i) == "sender cancels":
                    sending.cancel()
        for i, sending in sendings:
            with contextlib.suppress(jf.FabricError):
                sending.send_tail(b"tail of %d" % i)
        for i, sending in sendings:
            error = sending.exception()
            assert error is None or fate(i) != "well", error
    link.put("sent")


def doomed(transport: str, tp: tuple[int, int], requests: int, link: Channel) -> None:
    """Begins a large request, and is killed while its writes are under way."""
    pages = range(-(-DOOMED_TOKENS // 8))
    with senders(transport, "doomed", tp, len(pages), link) as made:
        sendings = [
            tx.begin(DOOMED, peers, pages=pages, num_tokens=DOOMED_TOKENS)
            for tx, peers in made
        ]
        for sending in sendings:
            until(functools.partial(_has_pages, sending))
        for layer in range(made[0][0].layout.layers):
            for sending in sendings:
                sending.send(layer)
        link.put("in mid-stream")
        time.sleep(LIMIT_S)


JOBS: dict[str, Callable[[str, tuple[int, int], int, Channel], None]] = {
    "decode": decode,
    "prefill": prefill,
    "doomed": doomed,
}


def fork(job: str, *arguments: Any) -> tuple[int, Channel]:
    """A process of its own, and the way to talk with it."""
    down, up = os.pipe(), os.pipe()
    pid = os.fork()
    ends = (down[0], up[1]) if pid == 0 else (up[0], down[1])
    for fd in {*down, *up} - {*ends}:
        os.close(fd)
    link = Channel(os.fdopen(ends[0]), os.fdopen(ends[1], "w"))
    if pid != 0:
        return pid, link
    code = 1
    try:
        run: Callable[..., object] = JOBS[job]
        run(*arguments, link)
        code = 0
    except BaseException as error:
        print(f"{job}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(code)


def meet(links: dict[str, Channel], kill: Callable[[], Any]) -> dict[str, Any]:
    """Introduces the jobs to each other; returns the report of the decode job."""
    addresses = links["decode"].get()
    for job in ("prefill", "doomed"):
        links[job].put(addresses)
    for job in ("prefill", "doomed"):
        assert links[job].get() == "connected"
    assert links["doomed"].get() == "in mid-stream"
    kill()
    assert links["prefill"].get() == "sent"
    report = links["decode"].get()
    links["decode"].put("over")
    return dict(report)


def run(
    transport: str, tp: tuple[int, int], requests: int = REQUESTS
) -> dict[str, Any]:
    """All three jobs, in processes forked from this one."""
    processes = {job: fork(job, transport, tp, requests) for job in JOBS}
    links = {job: link for job, (_, link) in processes.items()}
    try:
        return meet(links, lambda: os.kill(processes["doomed"][0], signal.SIGKILL))
    finally:
        for pid, link in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            link.close()


def check(
    report: dict[str, Any], tp: tuple[int, int], requests: int = REQUESTS
) -> None:
    """What a report must say."""
    assert report["faults"] == [], report
    assert report["equal"] + report["cancelled"] == requests * tp[1], report
    assert report["equal"] >= requests * tp[1] / 2, report
    assert report["cancelled"] >= requests * tp[1] / 8, report


def main(transport: str, *rest: str) -> None:
    cases = [(int(each[0]), int(each[2])) for each in rest if each[1] == "-"]
    if rest[-1] in JOBS:
        JOBS[rest[-1]](transport, cases[0], REQUESTS, Channel(sys.stdin, sys.stdout))
        return
    for tp in cases:
        begin = time.monotonic()
        report = run(transport, tp)
        check(report, tp)
        print(f"{tp[0]}-{tp[1]}", report, f"{time.monotonic() - begin:.1f} s")
    print(f"{len(cases)} passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
