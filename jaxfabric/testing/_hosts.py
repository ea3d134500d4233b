"""Several pytest processes, one per host, that run the same tests together.

Host 0 listens; the others connect and prove that they know the job's string. All that
they ever do is `gather`: each gives a value, each gets the values of all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import re
import secrets
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

# Hosts may be far apart in tests that each runs alone.
GATHER_TIMEOUT_S = 900.0
JOIN_TIMEOUT_S = 120.0
_HANDSHAKE_TIMEOUT_S = 5.0
_RETRY_S = 0.1
_MAX_MESSAGE_BYTES = 64 << 20
_SLURM_FIRST_PORT = 20000
_SLURM_PORTS = 10000


class HostsError(RuntimeError):
    """The hosts cannot go on together."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where the hosts meet.

    Attributes:
      host: name or address of host 0.
      port: its port.
      index: this host's number.
      count: how many hosts there are.
      job: a string that all hosts of the job know.
    """

    host: str
    port: int
    index: int
    count: int
    job: str = ""


def settings(
    coordinator: str | None,
    index: int | None,
    count: int | None,
    job: str | None,
    env: Mapping[str, str],
) -> Settings | None:
    """The settings of the command line, completed from Slurm's variables.

    Args:
      coordinator: HOST:PORT; "slurm": take all from Slurm; "auto": the same inside of
        a Slurm step and none outside; None: a single host.
      index: this host's number, or None for SLURM_PROCID.
      count: number of hosts, or None for SLURM_NTASKS.
      job: shared string, or None for JAXFABRIC_JOB, then SLURM_JOB_ID.
      env: the environment.

    Raises:
      HostsError: something is missing or cannot be read.
    """
    if coordinator is None or (coordinator == "auto" and "SLURM_PROCID" not in env):
        return None
    if coordinator in ("slurm", "auto"):
        nodes = _variable(env, "SLURM_STEP_NODELIST")
        job_id = int(_variable(env, "SLURM_JOB_ID"))
        host, port = first_host(nodes), _SLURM_FIRST_PORT + job_id % _SLURM_PORTS
    else:
        host, _, port_text = coordinator.rpartition(":")
        if not host or not port_text.isdecimal():
            raise HostsError(
                f"--jaxfabric-coordinator={coordinator}: it is HOST:PORT, slurm or auto"
            )
        host, port = host.strip("[]"), int(port_text)
    if index is None:
        index = int(_variable(env, "SLURM_PROCID", "--jaxfabric-process-id"))
    if count is None:
        count = int(_variable(env, "SLURM_NTASKS", "--jaxfabric-num-processes"))
    if not 0 <= index < count:
        raise HostsError(
            f"--jaxfabric-process-id={index} is not in 0..{count - 1} "
            f"(--jaxfabric-num-processes={count})"
        )
    if job is None:
        job = env.get("JAXFABRIC_JOB", env.get("SLURM_JOB_ID", ""))
    return Settings(host, port, index, count, job)


def _variable(env: Mapping[str, str], name: str, option: str = "") -> str:
    if name not in env:
        option = f" and {option} is not given" if option else ""
        raise HostsError(f"{name} is not set{option}")
    return env[name]


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[07-09,12],cpu1` gives `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]\-,]+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise HostsError(f"cannot read the Slurm node list {nodes!r}")
    return match[1] + (match[2] or "") + match[3]


class Hosts:
    """The connections between the hosts.

    Raises:
      HostsError: not all hosts came within `join_timeout_s`, or one knows another
        job string or another number of hosts.
    """

    def __init__(
        self, settings: Settings, *, join_timeout_s: float = JOIN_TIMEOUT_S
    ) -> None:
        self.settings = settings
        self._key = hashlib.sha256(settings.job.encode()).digest()
        self._peers: dict[int, socket.socket] = {}
        deadline = time.monotonic() + join_timeout_s
        try:
            if settings.index == 0:
                self._accept_all(deadline)
            else:
                self._peers[0] = self._connect(deadline)
        except BaseException:
            self.close()
            raise

    def gather(
        self, value: Any, *, timeout_s: float = GATHER_TIMEOUT_S
    ) -> Sequence[Any]:
        """Gives each host the values of all hosts, in host order.

        Raises:
          HostsError: a host has left, or was not here within timeout_s.
        """
        deadline = time.monotonic() + timeout_s
        if self.settings.index != 0:
            self._send(0, value)
            values: Sequence[Any] = self._receive(0, deadline)
            return values
        values = [value]
        values += [
            self._receive(peer, deadline) for peer in range(1, self.settings.count)
        ]
        for peer in self._peers:
            self._send(peer, values)
        return values

    def close(self) -> None:
        """Closes the connections; the other hosts see that this one has left."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def _send(self, peer: int, value: Any) -> None:
        try:
            _send(self._peers[peer], value)
        except OSError as error:
            raise self._left(peer) from error

    def _receive(self, peer: int, deadline: float) -> Any:
        try:
            return _receive(self._peers[peer], deadline)
        except TimeoutError as error:
            raise HostsError(
                f"host {self.settings.index} waited in vain for host {peer}; it is "
                "busy with something else, or hangs"
            ) from error
        except (OSError, ValueError) as error:
            raise self._left(peer) from error

    def _left(self, peer: int) -> HostsError:
        return HostsError(
            f"host {peer} has left the run (see its own output for the reason)"
        )

    def _mac(self, *parts: str) -> str:
        return hmac.new(self._key, "|".join(parts).encode(), "sha256").hexdigest()

    def _accept_all(self, deadline: float) -> None:
        wanted = set(range(1, self.settings.count))
        # A host's own name is often a loopback address, so all others need all.
        local = self.settings.host in ("localhost", "127.0.0.1")
        address = ("127.0.0.1" if local else "", self.settings.port)
        with socket.create_server(address) as server:
            while missing := wanted - set(self._peers):
                server.settimeout(max(0.0, deadline - time.monotonic()) or None)
                try:
                    if time.monotonic() >= deadline:
                        raise TimeoutError
                    connection, _ = server.accept()
                except TimeoutError as error:
                    raise HostsError(
                        f"host 0 waited at port {self.settings.port}; missing: host "
                        f"{', '.join(map(str, sorted(missing)))}"
                    ) from error
                self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        """Takes a connection in if it is a host of this job, else closes it."""
        nonce = secrets.token_hex(16)
        deadline = time.monotonic() + _HANDSHAKE_TIMEOUT_S
        try:
            _send(connection, {"nonce": nonce})
            hello = _receive(connection, deadline)
            index, count = int(hello["index"]), int(hello["count"])
            theirs = str(hello["nonce"])
            mac = self._mac("host", nonce, theirs, str(index), str(count))
            problem = ""
            if not hmac.compare_digest(mac, str(hello["mac"])):
                problem = "another job string (--jaxfabric-job, JAXFABRIC_JOB)"
                count = self.settings.count
            elif count != self.settings.count:
                problem = f"{self.settings.count} hosts at host 0, {count} here"
            elif index in self._peers or not 0 < index < count:
                problem = f"host {index} is there already"
            mac = self._mac("host 0", theirs, nonce)
            _send(connection, {"problem": problem, "mac": mac})
            if not problem:
                self._peers[index] = connection
                return
            if count != self.settings.count:  # one of ours, wrongly started
                raise HostsError(problem.replace("here", f"at host {index}"))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # a port scanner, or a host that died: not one of ours
        connection.close()

    def _connect(self, deadline: float) -> socket.socket:
        name = f"{self.settings.host}:{self.settings.port}"
        while True:
            connection = self._try_connect(deadline)
            if connection is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._introduce(connection)
                    return connection
                connection.close()
            if time.monotonic() >= deadline:
                raise HostsError(
                    f"host {self.settings.index} found no host 0 at {name}"
                )
            time.sleep(_RETRY_S)

    def _try_connect(self, deadline: float) -> socket.socket | None:
        timeout_s = max(_RETRY_S, deadline - time.monotonic())
        try:
            return socket.create_connection(
                (self.settings.host, self.settings.port), timeout=timeout_s
            )
        except OSError:
            return None

    def _introduce(self, connection: socket.socket) -> None:
        # Host 0 greets when it comes to us, which may take its other handshakes.
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        theirs = str(_receive(connection, deadline)["nonce"])
        nonce = secrets.token_hex(16)
        index, count = str(self.settings.index), str(self.settings.count)
        mac = self._mac("host", theirs, nonce, index, count)
        _send(connection, {"index": index, "count": count, "nonce": nonce, "mac": mac})
        answer = _receive(connection, deadline)
        if answer["problem"]:
            raise HostsError(f"host 0 refused host {index}: {answer['problem']}")
        if not hmac.compare_digest(
            self._mac("host 0", nonce, theirs), str(answer["mac"])
        ):
            raise HostsError("what listens at host 0's port does not know the job")


def _send(connection: socket.socket, value: Any) -> None:
    data = json.dumps(value).encode()
    connection.sendall(struct.pack("!I", len(data)) + data)


def _receive(connection: socket.socket, deadline: float) -> Any:
    (length,) = struct.unpack("!I", _receive_exactly(connection, 4, deadline))
    if length > _MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_receive_exactly(connection, length, deadline))


def _receive_exactly(connection: socket.socket, length: int, deadline: float) -> bytes:
    data = b""
    while len(data) < length:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        connection.settimeout(left_s)
        piece = connection.recv(min(1 << 20, length - len(data)))
        if not piece:
            raise ConnectionResetError
        data += piece
    connection.settimeout(None)
    return data


def first_difference(lists: Sequence[Sequence[str]]) -> str | None:
    """Says where a list of tests first differs from host 0's; None if nowhere."""
    for host, tests in enumerate(lists):
        for position in range(max(len(tests), len(lists[0]))):
            ours = lists[0][position] if position < len(lists[0]) else "none"
            theirs = tests[position] if position < len(tests) else "none"
            if ours != theirs:
                return (
                    "the hosts run different tests; the first difference is at "
                    f"position {position}: host 0 has {ours}, host {host} has {theirs}"
                )
    return None


def digest(tests: Sequence[str]) -> str:
    """A short value that is equal for equal lists of tests."""
    return hashlib.sha256("\n".join(tests).encode()).hexdigest()
