"""Runs programs on the other guest, as ssh would: no keys, since nobody else is there.

    python tests/rxe/remote.py serve                     # the other guest does this
    python tests/rxe/remote.py run ibv_devinfo -d rxe0   # on the first one

stdin, stdout, stderr and the exit status are the program's. It sees this process's
environment and folder, and is killed, with what it has started, when this process
ends.

Each side sends JSON objects in lines. The first one says what to run; then come
{"input": text}, empty at its end, in one direction, and in the other {"stdout": text},
{"stderr": text} and at last {"status": number}.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

ADDRESS = ("10.78.0.2", 7078)
# The other guest boots at the same time, on a machine with other work.
CONNECT_TIMEOUT_S = 60.0
CHUNK_BYTES = 1 << 16
NOT_FOUND = 127  # exit status, as in a shell

SCRIPT = os.path.abspath(__file__)
# Without site-packages, whose reading takes seconds in a guest.
PYTHON = [sys.executable, "-I", "-S", SCRIPT]
SERVE = [*PYTHON, "serve"]


def command(arguments: Sequence[str]) -> list[str]:
    """The command line that runs a program on the other guest."""
    return [*PYTHON, "run", *arguments]


def run(arguments: Sequence[str]) -> int:
    """Runs a program there; returns its exit status.

    Raises:
      ConnectionError: the other guest does not answer, or went away.
    """
    with _connect() as connection, connection.makefile("rb") as answers:
        _send(connection, run=arguments, cwd=os.getcwd(), environment=dict(os.environ))
        threading.Thread(target=_send_input, args=(connection,), daemon=True).start()
        for line in answers:
            for kind, value in json.loads(line).items():
                if kind == "status":
                    return int(value)
                stream = sys.stderr if kind == "stderr" else sys.stdout
                stream.write(value)
                stream.flush()
    raise ConnectionError("the other guest went away")


def _connect() -> socket.socket:
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            connection = socket.create_connection(ADDRESS, timeout=5)
            connection.settimeout(None)  # a program may be silent for long
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                waited = f"in {CONNECT_TIMEOUT_S:g} s"
                raise ConnectionError(f"no other guest {waited}: {error}") from None
            time.sleep(0.1)


def _send(connection: socket.socket, **message: Any) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _send_input(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the program has ended
        while data := os.read(0, CHUNK_BYTES):
            _send(connection, input=data.decode())
        _send(connection, input="")


def serve() -> None:
    """Runs what the other guest asks for, until this guest is ended."""
    with socket.create_server(ADDRESS) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve_one, args=(connection,)).start()


def _serve_one(connection: socket.socket) -> None:
    with connection, connection.makefile("rb") as requests:
        line = requests.readline()
        if not line:
            return  # who asked gave up at once
        order = json.loads(line)
        program = shutil.which(order["run"][0], path=order["environment"].get("PATH"))
        if program is None:
            _send(connection, stderr=f"no `{order['run'][0]}` on the other guest\n")
            _send(connection, status=NOT_FOUND)
            return
        process = subprocess.Popen(
            [program, *order["run"][1:]],
            cwd=order["cwd"],
            env=order["environment"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that all of it can be ended
        )
        turn = threading.Lock()
        relays = [
            threading.Thread(target=_relay, args=(connection, turn, name, stream))
            for name, stream in (("stdout", process.stdout), ("stderr", process.stderr))
        ]
        feeder = threading.Thread(target=_feed, args=(requests, process))
        for thread in (*relays, feeder):
            thread.start()
        for thread in relays:
            thread.join()
        code = process.wait()
        with contextlib.suppress(OSError):
            _send(connection, status=code if code >= 0 else 128 - code)  # as a shell
            connection.shutdown(socket.SHUT_RDWR)
        feeder.join()


def _relay(
    connection: socket.socket, turn: threading.Lock, name: str, stream: IO[bytes]
) -> None:
    with stream:
        while data := os.read(stream.fileno(), CHUNK_BYTES):
            with contextlib.suppress(OSError), turn:  # who asked may have gone
                _send(connection, **{name: data.decode(errors="replace")})


def _feed(requests: IO[bytes], process: subprocess.Popen[bytes]) -> None:
    """Gives the program its input, and kills it when the connection ends."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        for line in requests:
            data = json.loads(line)["input"].encode()
            with contextlib.suppress(OSError):  # it reads no more
                process.stdin.write(data)
                process.stdin.flush()
                if not data:
                    process.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(OSError):
        process.stdin.close()


def main() -> int:
    """Returns the exit status."""
    if sys.argv[1:2] == ["run"] and len(sys.argv) > 2:
        return run(sys.argv[2:])
    if sys.argv[1:] == ["serve"]:
        serve()
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
