"""jf.weights between processes that are killed at any point of a push."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transfer_cases import engine, skip_unless_usable
from weights_child import tree

import jaxfabric as jf

CHILD = Path(__file__).parent / "weights_child.py"
ELEMENTS = 8 << 20  # 32 MiB: a push takes a while
LAST = 7  # version of a test that pushes as fast as can be
PATIENCE_S = 30.0
TRANSPORTS = ("shm", "ofi/tcp")
# A killed process is noticed by its end. Silence alone says little on a busy machine:
# no peer is lost for that within these tests.
DEATHS = {"heartbeat_s": 0.2, "peer_timeout_s": PATIENCE_S}


class Child:
    """A process of weights_child.py."""

    def __init__(self, *args: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def hears(self, line: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def child(*args: object) -> Iterator[Child]:
    started = Child(*args)
    try:
        yield started
    finally:
        started.kill()
        for pipe in (started.process.stdin, started.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


def assert_whole(taken: jf.weights.Taken) -> None:
    assert (taken.params["w"] == taken.version).all()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_trainer_leaves_a_whole_version(transport: str) -> None:
    skip_unless_usable(transport)
    with (
        engine(transport, **DEATHS) as own,
        jf.weights.Receiver(own, tree(str(ELEMENTS), 0)) as receiver,
    ):
        with child("trainer", transport, ELEMENTS) as trainer:
            receiver.connect([bytes.fromhex(trainer.says())])
            trainer.hears(1)
            assert trainer.says() == "pushing"
            assert trainer.says() == "ok"
            assert_whole(receiver.take(1))
            trainer.hears(2)
            assert trainer.says() == "pushing"
            time.sleep(0.01)
            trainer.kill()
        begin = time.monotonic()
        came = False
        with contextlib.suppress(jf.PeerLostError):  # it may have come
            receiver.take(2, timeout_s=PATIENCE_S)
            came = True
        assert time.monotonic() - begin < 10
        taken = receiver.take()
        assert taken.version == 1 + came
        assert_whole(taken)
        with pytest.raises(jf.PeerLostError, match="the sender, rank 0, is lost"):
            receiver.take(taken.version + 1, timeout_s=PATIENCE_S)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_sampler_does_not_stop_the_others(transport: str) -> None:
    skip_unless_usable(transport)
    params = {version: tree(str(ELEMENTS), version) for version in (1, 2, 3)}
    layout = jf.weights.TreeLayout.of(params[1])
    with (
        engine(transport, **DEATHS) as own,
        engine(transport, **DEATHS) as of_other,
        jf.weights.Sender(own, layout, bucket_bytes=1 << 18) as sender,
        jf.weights.Receiver(of_other, params[1]) as other,
        child("sampler", transport, ELEMENTS, sender.address().hex()) as sampler,
    ):
        assert sampler.says() == "connected"
        other.connect([sender.address()])
        sender.push(params[1], 1).wait(PATIENCE_S)
        assert sampler.says() == "1"
        push = sender.push(params[2], 2)
        time.sleep(0.01)
        sampler.kill()
        with contextlib.suppress(jf.PeerLostError, jf.OutcomeUnknownError):
            push.wait(PATIENCE_S)
        outcome = push.outcomes()["sampler/0"]
        assert outcome is not None  # a receipt, if it died later
        assert_whole(other.take(2))
        receipts = sender.push(params[3], 3).wait(PATIENCE_S)
        assert len(receipts) == 1
        assert_whole(other.take(3))


def test_a_sampler_job_never_sees_a_mixed_version() -> None:
    """Pushed as fast as can be; the sampler looks at every element."""
    layout = jf.weights.TreeLayout.of(tree(str(ELEMENTS), 0))
    with (
        engine("shm") as own,
        jf.weights.Sender(own, layout, bucket_bytes=1 << 18) as sender,
        child("sampler", "shm", ELEMENTS, sender.address().hex()) as sampler,
    ):
        assert sampler.says() == "connected"
        for version in range(1, LAST + 1):
            sender.push(tree(str(ELEMENTS), version), version).wait(PATIENCE_S)
        seen = [0]
        while seen[-1] < LAST:
            seen.append(int(sampler.says()))
        assert seen == sorted(set(seen))


def test_memory_stays_within_the_bound() -> None:
    """The receiver's own memory: two sets of tiles and its rings."""
    nbytes = ELEMENTS * 4
    with (
        engine("shm") as own,
        engine("shm") as theirs,
        jf.weights.Receiver(theirs, tree(str(ELEMENTS), 0), slots=2) as receiver,
        jf.weights.Sender(
            own,
            jf.weights.TreeLayout.of(tree(str(ELEMENTS), 0)),
            bucket_bytes=1 << 20,
            staging=2,
        ) as sender,
    ):
        receiver.connect([sender.address()])
        for version in (1, 2):
            sender.push(tree(str(ELEMENTS), version), version).wait(PATIENCE_S)
        assert receiver.stats()["bytes"] == 2 * nbytes + 2 * ((1 << 20) + 64)
        assert np.asarray(receiver.take(2).params["w"]).nbytes == nbytes
