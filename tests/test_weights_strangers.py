"""What strangers send to a Sender or a Receiver harms nobody."""

from __future__ import annotations

import threading
import time

import pytest
from test_weights_transfer import SOURCE, TARGET, push_and_take
from transfer_cases import PATIENCE_S, engine, until
from weights_cases import TileSender, jobs

from jaxfabric.weights import _frames

GREETINGS = 50


def hello(version: int, nbytes: int) -> bytes:
    """A greeting, of a receiver that may speak another version."""
    return _frames.encode(
        "hello", version=version, rank=0, name="", connection=1, nbytes=nbytes
    )


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"{}",
        b'{"kind":"ready"}',
        b'{"kind":"hello"}',
        hello(_frames.VERSION + 1, 1),
        hello(_frames.VERSION, 999999999999),
        hello(_frames.VERSION, 3),
        b"\x00abc",
        b"\x01\x01",
        _frames.credit((1 << 32) - 1, whole=False),
        b'{"kind":"use","version":7,"number":1}',
        b'{"kind":"have","version":1,"verify_us":0,"unpack_us":0}',
    ],
)
def test_strangers_harm_nobody(message: bytes) -> None:
    with jobs("shm", SOURCE, TARGET) as both, engine("shm", name="stranger") as own:
        addresses = both.addresses() + [one.address() for one in both.receivers]
        for address in addresses:
            peer = own.connect(address).result()
            own.submit_send(peer, message).result()
            own.submit_send(peer, b"\x00" + message).result()
        push_and_take(both, 1)


def test_a_peer_is_watched_once_however_often_it_greets() -> None:
    """Each greeting is refused; it leaves nothing behind."""
    with (
        engine("shm") as own,
        TileSender(own, SOURCE) as sender,
        engine("shm", name="stranger") as stranger,
    ):
        peer = stranger.connect(sender.address()).result()
        for _ in range(GREETINGS):
            stranger.submit_send(peer, hello(_frames.VERSION + 1, 1)).result()
        until(lambda: own.stats()["messages_handled"] >= GREETINGS)
        all_done = threading.Event()
        sender._worker.post(all_done.set)
        assert all_done.wait(PATIENCE_S)
        # A refusal for each, and one watch.
        assert own.stats()["operations"] <= GREETINGS + 5


@pytest.mark.parametrize("whose", ["sender", "receiver"])
def test_who_is_not_understood_is_told_once(whose: str) -> None:
    """Another protocol may answer each refusal by one of its own, without an end."""
    told: list[bytes] = []

    with jobs("shm", SOURCE, TARGET) as both, engine("shm", name="stranger") as own:

        def answer(peer: int, data: bytes) -> None:
            told.append(data)
            own.submit_send(peer, b'{"kind":"refuse","code":7}')

        own.submit_recvs(answer)
        one = both.senders[0] if whose == "sender" else both.receivers[0]
        peer = own.connect(one.address()).result()
        own.submit_send(peer, b'{"kind":"hello","code":7}').result()
        until(lambda: bool(told))
        push_and_take(both, 1)
        time.sleep(0.2)
        (refusal,) = told
        kind, fields = _frames.decode(refusal)
        assert kind == "refuse"
        assert "malformed" in fields["why"]
        own.submit_recvs(None)
