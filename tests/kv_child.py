"""A process that begins to send requests, or expects one, until it is killed.

python kv_child.py sender|receiver TRANSPORT LAYOUT ADDRESS REQUEST...
"""

from __future__ import annotations

import json
import sys

import jaxfabric as jf


def main(
    role: str, transport: str, layout: str, address: str = "", *requests: str
) -> None:
    of = jf.kv.PageLayout.from_json(json.loads(layout))
    with jf.TransferEngine(
        transport, job="test", token="secret", name="child"
    ) as engine:
        if role == "receiver":
            receiver = jf.kv.PageReceiver(engine, of)
            receiver.expect(1, 10)
            print(engine.address().to_bytes().hex(), flush=True)
        else:
            sender = jf.kv.PageSender(engine, of)
            peer = sender.connect(bytes.fromhex(address)).result()
            pages = range(of.pages_for(10))
            for request in requests:
                sender.begin(int(request), peer, pages=pages, num_tokens=10).send(0)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
