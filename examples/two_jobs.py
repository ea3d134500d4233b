"""Two jobs that were started apart: one writes pages into the other's memory.

The receiver publishes its address in a file (any other way would do), and the sender
connects to it. They share no mesh and no launcher, only the job's token::

  python examples/two_jobs.py serve --address-file /tmp/address     # one terminal
  python examples/two_jobs.py send --address-file /tmp/address      # another one
  python examples/two_jobs.py                                       # or both at once
  python examples/two_jobs.py --transport ofi/tcp                   # over a network
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import jaxfabric as jf

# The receiver gives out the ids under which it counts, one for each question.
PAGES_WRITTEN = 1


def content(pages: int, page_bytes: int) -> np.ndarray:
    """What the sender has, and the receiver knows to expect: u8[pages, page_bytes]."""
    return np.random.default_rng(7).integers(0, 256, (pages, page_bytes), np.uint8)


def open_engine(arguments: argparse.Namespace) -> jf.TransferEngine:
    """Both sides show that they know the token; neither ever sends it."""
    file = arguments.token_file
    token = b"known to nobody else" if file is None else file.read_bytes()
    engine = jf.TransferEngine(
        arguments.transport, job="two_jobs", token=token, name=arguments.role
    )
    if arguments.trace is not None:
        engine.trace(arguments.trace.with_suffix(f".{arguments.role}.json"))
    return engine


def serve(arguments: argparse.Namespace) -> None:
    """Publishes an address, takes pages in reversed order, and checks them."""
    pages, page_bytes = arguments.pages, arguments.page_bytes
    with open_engine(arguments) as engine:
        region = engine.alloc((pages, page_bytes))
        publish(arguments.address_file, engine.address().to_bytes())
        print(f"receiver: waiting at {engine.address()}", flush=True)

        # The first message says who is there; the answer says where to write what.
        peer, _ = engine.receive(arguments.timeout_s)
        offer = {
            "desc": region.desc.to_bytes().hex(),
            "pages": list(reversed(range(pages))),
            "page_bytes": page_bytes,
            "rounds": arguments.rounds,
            "id": PAGES_WRITTEN,
        }
        engine.submit_send(peer, json.dumps(offer).encode()).result()

        for _ in range(arguments.rounds):
            # All bytes of a write are here once it is counted, in whatever order.
            engine.imm_counter(PAGES_WRITTEN).wait(1, arguments.timeout_s, peers=[peer])
            np.testing.assert_array_equal(
                region.array[::-1], content(pages, page_bytes)
            )
            region.array[:] = 0
            engine.submit_send(peer, b"next").result()
        print(f"receiver: {pages} pages of {page_bytes} bytes are right", flush=True)


def send(arguments: argparse.Namespace) -> None:
    """Connects, asks where to write, and writes."""
    address = wait_for(arguments.address_file, arguments.timeout_s)
    with open_engine(arguments) as engine:
        peer = engine.connect(address).result()
        engine.submit_send(peer, b"what do you want, and where?").result()
        offer = json.loads(engine.receive(arguments.timeout_s).data)
        desc = jf.MrDesc.from_bytes(bytes.fromhex(offer["desc"]))

        pages, page_bytes = len(offer["pages"]), offer["page_bytes"]
        source = engine.register_memory(content(pages, page_bytes))
        seconds = []
        for _ in range(offer["rounds"]):
            begin = time.perf_counter()
            engine.submit_paged_writes(
                source, range(pages), desc, offer["pages"], page_bytes, offer["id"]
            ).result()
            seconds.append(time.perf_counter() - begin)
            engine.receive(arguments.timeout_s)
        rate = source.nbytes / min(seconds) / 1e6
        print(f"sender: {source.nbytes} bytes at {rate:.0f} MB/s", flush=True)


def publish(path: Path, address: bytes) -> None:
    """Writes a file at once, so that nobody reads half of it."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(address)
    partial.rename(path)


def wait_for(path: Path, timeout_s: float) -> bytes:
    """Reads a file that comes within ``timeout_s``."""
    until = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > until:
            raise SystemExit(f"no receiver wrote {path} within {timeout_s} s")
        time.sleep(0.02)
    return path.read_bytes()


def both() -> None:
    """Runs this script twice, as two users in two terminals would."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__]
        rest = [*sys.argv[1:], "--address-file", str(Path(folder) / "address")]
        receiver = subprocess.Popen([*command, "serve", *rest])
        try:
            sender = subprocess.run([*command, "send", *rest], check=False)
            code = sender.returncode or receiver.wait(60)
        finally:
            receiver.kill()
            receiver.wait()
    raise SystemExit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("role", nargs="?", choices=["serve", "send"])
    parser.add_argument("--address-file", type=Path)
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--pages", type=int, default=1024)
    parser.add_argument("--page-bytes", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trace", type=Path, help="record each side: FILE.send.json")
    parser.add_argument("--timeout-s", type=float, default=60.0)
    arguments = parser.parse_args()
    if arguments.role is None:
        both()
    elif arguments.address_file is None:
        parser.error(f"{arguments.role} needs --address-file")
    elif arguments.role == "serve":
        serve(arguments)
    else:
        send(arguments)


if __name__ == "__main__":
    main()
