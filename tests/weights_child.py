"""A process of a trainer or of a sampler, until it is killed.

python weights_child.py trainer TRANSPORT ELEMENTS
python weights_child.py sampler TRANSPORT ELEMENTS ADDRESS...

Every element of a version is its number. A trainer reads version numbers in lines,
pushes each, and says how that ended. A sampler takes each version as it comes, and
says which one it has, or that it is mixed.
"""

from __future__ import annotations

import sys

import numpy as np

import jaxfabric as jf


def tree(elements: str, value: float) -> dict[str, np.ndarray]:
    return {"w": np.full((int(elements) // 64, 64), value, np.float32)}


def train(engine: jf.TransferEngine, elements: str) -> None:
    layout = jf.weights.TreeLayout.of(tree(elements, 0))
    sender = jf.weights.Sender(engine, layout, bucket_bytes=1 << 18)
    print(sender.address().hex(), flush=True)
    for line in sys.stdin:
        try:
            push = sender.push(tree(elements, int(line)), int(line))
            print("pushing", flush=True)
            push.wait()
            print("ok", flush=True)
        except jf.FabricError as error:
            print(type(error).__name__, error, flush=True)


def sample(engine: jf.TransferEngine, elements: str, addresses: list[str]) -> None:
    receiver = jf.weights.Receiver(engine, tree(elements, 0))
    receiver.connect([bytes.fromhex(address) for address in addresses])
    print("connected", flush=True)
    version = 0
    while True:
        version, params = receiver.take(version + 1)
        whole = (params["w"] == version).all()
        print(version if whole else f"version {version} is mixed", flush=True)


def main(role: str, transport: str, elements: str, *addresses: str) -> None:
    with jf.TransferEngine(
        transport,
        job="test",
        token="secret",
        name=role,
        timeout_s=60.0,
    ) as engine:
        if role == "trainer":
            train(engine, elements)
        else:
            sample(engine, elements, list(addresses))


if __name__ == "__main__":
    main(*sys.argv[1:])
