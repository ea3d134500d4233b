"""A process that sends requests, or expects one, until it is killed.

python kv_child.py receiver TRANSPORT LAYOUT [TOKENS]
python kv_child.py sender TRANSPORT LAYOUT ADDRESS ID...
python kv_child.py second TRANSPORT LAYOUT ADDRESS ID...
python kv_child.py again TRANSPORT LAYOUT

A sender begins its requests and sends a layer of each; a `second` one takes the place
of another on the same engine. One that sends `again` reads ADDRESS ID TOKENS in lines,
sends all of that request, and says how it ended.
"""

from __future__ import annotations

import json
import sys

import jaxfabric as jf


def send_all(
    sender: jf.kv.PageSender, address: str, request: str, tokens: str
) -> jf.kv.Sending:
    of = sender.layout
    peer = sender.connect(bytes.fromhex(address)).result()
    sending = sender.begin(
        *(int(request), peer),
        pages=range(of.pages_for(int(tokens))),
        num_tokens=int(tokens),
    )
    for layer in range(of.layers):
        sending.send(layer)
    sending.send_tail(b"again")
    return sending


def main(
    role: str, transport: str, layout: str, address: str = "10", *requests: str
) -> None:
    of = jf.kv.PageLayout.from_json(json.loads(layout))
    with jf.TransferEngine(
        transport,
        job="test",
        token="secret",
        name="child",
        heartbeat_s=0.1,
        peer_timeout_s=2.0,
    ) as engine:
        if role == "receiver":
            receiver = jf.kv.PageReceiver(engine, of)
            receiver.expect(1, int(address))
            print(engine.address().to_bytes().hex(), flush=True)
        elif role in ("sender", "second"):
            sender = jf.kv.PageSender(engine, of)
            if role == "second":
                sender.connect(bytes.fromhex(address)).result()
                sender.close()
                sender = jf.kv.PageSender(engine, of)
            peer = sender.connect(bytes.fromhex(address)).result()
            pages = range(of.pages_for(10))
            for request in requests:
                sender.begin(int(request), peer, pages=pages, num_tokens=10).send(0)
        else:
            sender = jf.kv.PageSender(engine, of)
            for line in sys.stdin:
                try:
                    send_all(sender, *line.split()).result()
                    print("ok", flush=True)
                except jf.FabricError as error:
                    print(type(error).__name__, error, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
