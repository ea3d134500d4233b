"""TransferEngine: writes and messages between jobs that were started apart."""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxfabric import _ffi
from jaxfabric._config import config
from jaxfabric._errors import FabricError, TransportUnavailableError
from jaxfabric._interfaces import (
    choose_interfaces,
    nearest_interfaces,
    network_host,
)
from jaxfabric._libfabric import libfabric_path
from jaxfabric._mesh import TRANSPORTS, transport_options
from jaxfabric._net_addr import NetAddr
from jaxfabric._time_limit import checked_limit
from jaxfabric._transfer_base import native_errors
from jaxfabric._transfer_future import TransferFuture
from jaxfabric._transfer_memory import Region, address_of, as_array
from jaxfabric._transfer_messages import Messages
from jaxfabric._transfer_writes import Writes

_NAME_BYTES_MAX = 128
_NICS_MAX = 8


class Watcher:
    """A word that code increments and the engine watches; from `TransferEngine`.

    Attributes:
      id: names it in this process, for programs; never used twice.
    """

    def __init__(self, native: Any, free: Callable[[Any], None]) -> None:
        self._native = native
        self._free = free
        self.id: int = native.id

    @property
    def value(self) -> int:
        """What the word is now."""
        return int(self._native.value)

    def bump(self, by: int = 1) -> None:
        """Adds to the word; the engine calls back soon. Any thread may do so."""
        self._native.bump(by)

    def close(self) -> None:
        """The engine stops watching; a call under way ends by itself."""
        self._free(self._native)


class TransferEngine(Messages, Writes):
    """Writes into other processes' memory, and sends them messages, by address.

    For jobs that were started apart: no mesh, no common world. One side connects to
    the other's `NetAddr`; after that both may write and send. A write of any size, or
    of any number of pages, over any number of NICs, is one count at its receiver,
    under the id that the sender gave it.

    Order: messages of one peer come in order. Writes have none, but for this: once
    the count of a write is there, all of its bytes are.

    Ids are integers below 2**27, and the receiver's to give out: an id is one
    question. Only as many transfers as one ``wait`` waits for may be under way under
    it.

    Args:
      transport: ``"shm"`` (processes of one host), ``"ofi/tcp"`` and so on, as
        ``jaxfabric doctor`` lists them; ``"fake"`` (one process, seeded chaos, for
        tests). ``None``: what `jf.config` says, else ``"shm"``.
      job: engines of one job talk to each other.
      token: shared secret of the job. Without one, whoever has an address may
        connect.
      name: of this engine, for messages; by default host and process.
      timeout_s: time limit of each operation, in seconds, unless it has its own.
      nics: how many NICs to use, 1 to 8, or their names or IP addresses; the other
        side may use another number. ``None``: what `jf.config` says, else those
        closest to the GPUs that JAX has opened here, else those on the NUMA node of
        the cores that this process may run on (all, if those are of several nodes);
        for ``"ofi/tcp"``, the interface of the default route. The engine's thread
        stays on the NUMA nodes of its NICs.
      heartbeat_s: a peer that says nothing is asked so often whether it is there.
      peer_timeout_s: a peer that has not answered for so long is lost.
      chaos: options of the fake transport, as for `jf.Fabric`.

    Attributes:
      nics: names of the interfaces that it uses; none for transports without.

    Raises:
      TransportUnavailableError: the transport cannot work here, with the reason.

    Example::

      # receiver                                  # sender
      with jf.TransferEngine(token=t) as engine:  with jf.TransferEngine(token=t) as e:
          pages = engine.alloc(1 << 20)               peer = e.connect(address).result()
          publish(engine.address(), pages.desc)       mine = e.register_memory(kv)
          engine.imm_counter(7).wait(1)               e.submit_single_write(
          use(pages.array)                                mine, desc, id=7).result()
    """

    def __init__(
        self,
        transport: str | None = None,
        *,
        job: str = "default",
        token: bytes | str = b"",
        name: str | None = None,
        timeout_s: float | None = None,
        nics: int | Sequence[str] | None = None,
        heartbeat_s: float = 1.0,
        peer_timeout_s: float = 15.0,
        chaos: Mapping[str, float] | None = None,
    ) -> None:
        settings = config.settings
        self.timeout_s = checked_limit(
            "jf.TransferEngine", settings.timeout_s if timeout_s is None else timeout_s
        )
        for what, seconds, above in (
            ("heartbeat_s", heartbeat_s, 0.0),
            ("peer_timeout_s", peer_timeout_s, heartbeat_s),
        ):
            if not above < seconds < float("inf"):
                raise ValueError(
                    f"jf.TransferEngine: {what}={seconds} must be finite and above "
                    + ("heartbeat_s" if above else "0 seconds")
                )
        self.transport = _choose_transport(transport or settings.transport)
        count, interfaces = _choose_nics(nics, self.transport)
        key = token.encode() if isinstance(token, str) else bytes(token)
        if name is None:
            name = f"{socket.gethostname()}:{os.getpid()}"
        self.name = name
        self.nics = interfaces
        # The transport's own check must not give the token away.
        secret = hmac.new(key, b"jaxfabric transport " + job.encode(), hashlib.sha256)
        with native_errors():
            self._native = _ffi.native().NativeTransferEngine(
                transport=self.transport,
                secret=secret.hexdigest().encode(),
                chaos=transport_options(self.transport, chaos),
                job=job,
                token=key,
                name=name.encode()[:_NAME_BYTES_MAX].decode(errors="ignore"),
                nics=count,
                timeout_s=self.timeout_s,
                spin_s=settings.spin_s,
                heartbeat_s=heartbeat_s,
                peer_timeout_s=peer_timeout_s,
                libfabric=libfabric_path(),
                interfaces=interfaces,
            )
        self._regions: dict[int, Region] = {}
        # At exit it must end while Python can still run its callbacks.
        self._close = weakref.finalize(self, self._native.close)

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None and not self.closed:
                self.drain()
        finally:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.transport
        return f"TransferEngine({state})"

    # --- Peers ---

    def address(self) -> NetAddr:
        """What `connect` takes elsewhere."""
        with native_errors():
            return NetAddr(self._native.address())

    def connect(
        self, address: NetAddr | bytes, timeout_s: float | None = None
    ) -> TransferFuture:
        """Connects to an engine; the future's result is its number here, an ``int``.

        Either side may connect, or both. The other side learns the number of this
        one with its first message.

        Raises:
          FabricError: the address is malformed, stale, of another version, of another
            job or made with another token.
        """
        data = address.to_bytes() if isinstance(address, NetAddr) else bytes(address)
        with native_errors():
            native = self._native.connect(data, timeout_s)
        return self._future(native, lambda done: int(done.peer))

    def disconnect(self, peer: int) -> None:
        """Takes leave of a peer; what is under way to it fails."""
        with native_errors():
            self._native.disconnect(peer)

    def submit_fence(self, timeout_s: float | None = None) -> TransferFuture:
        """Cuts off what peers that were lost so far may still have under way.

        Once the future is done, nothing that they had posted lands here any more:
        memory that they knew of may be used for something else. Others pause for some
        milliseconds, unless nobody was lost since the last fence.

        Raises:
          FabricError: this transport cannot do it: ``"shm"``, where one waits until
            the peer's process has ended, and ``"ofi/tcp"`` with libfabric 1.

        Example::

          engine.submit_fence().result()
          pool.give(pages_of_the_lost_peer)
        """
        with native_errors():
            native = self._native.submit_fence(timeout_s)
        return self._future(native)

    def peers(self) -> dict[int, dict[str, Any]]:
        """The peers there are, with their names and counters."""
        return self.stats()["peers"]

    def add_peer_group(self, peers: Sequence[int]) -> int:
        """Names several peers at once, for `submit_barrier`; all are connected."""
        with native_errors():
            return int(self._native.add_peer_group(list(peers)))

    def remove_peer_group(self, group: int) -> None:
        """Forgets a group; its peers stay."""
        with native_errors():
            self._native.remove_peer_group(group)

    # --- Memory ---

    def alloc(self, shape: int | Sequence[int], dtype: Any = np.uint8) -> Region:
        """Makes registered memory of the engine's own, zero-filled.

        Over ``"shm"`` only such memory can be written into by peers.

        Example::

          region = engine.alloc((64, 4096))    # 64 pages; region.array is u8[64, 4096]
        """
        kind = np.dtype(dtype)
        sizes = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        nbytes = int(np.prod(sizes, dtype=np.int64)) * kind.itemsize
        with native_errors():
            key, memory = self._native.allocate_memory(nbytes)
        return self._add_region(key, memory.view(kind).reshape(sizes))

    def register_memory(self, buffer: Any) -> Region:
        """Registers memory that stays where it is; the region keeps it alive.

        Args:
          buffer: a NumPy array, or what has DLPack or the buffer protocol, in host
            memory, contiguous. One that is read-only (a jax.Array) can be a source,
            and is not to be written into by peers.

        Raises:
          ValueError: it is not contiguous, or not in host memory.
        """
        array = as_array(buffer, "register_memory")
        with native_errors():
            key = self._native.register_memory(address_of(array), array.nbytes, array)
        return self._add_region(key, array)

    def _add_region(self, key: int, array: npt.NDArray[Any]) -> Region:
        region = Region(key, array, self._describe)
        self._regions[key] = region
        return region

    def _describe(self, key: int) -> Any:
        region = self._regions.get(key)
        if region is not None and not region.array.flags.writeable:
            raise FabricError(
                "region.desc: the memory is read-only here, so no peer may write into "
                "it; register a writable array, or take alloc()"
            )
        with native_errors():
            return self._native.describe(key)

    def unregister_memory(self, region: Region, timeout_s: float | None = None) -> None:
        """Waits until nobody uses a region, and forgets it. The array stays valid.

        Peers are told; their further writes into it are refused where they are
        submitted, and those that are under way are waited for.

        Raises:
          DeadlineError: operations of this engine still use it, or a peer has not
            said in time that its writes into it have ended; it names them. The region
            stays registered, but peers that have heard write no more into it: call
            again, or `disconnect` the peer.
          FabricError: it is not registered here. Or, over ``ofi/tcp`` with libfabric 1,
            a peer was lost that may still have writes into it under way: the region
            stays registered until `close`. That of libfabric 2 cuts the peer off.
        """
        if self._regions.get(region.key) is not region:
            raise FabricError(
                f"unregister_memory: {region!r} is not registered with this engine, or "
                "no longer"
            )
        with native_errors():
            native = self._native.unregister_memory(region.key, timeout_s)
        self._future(native).result()
        self._regions.pop(region.key, None)

    # --- Everything else ---

    def alloc_watcher(self, callback: Callable[[int, int], object]) -> Watcher:
        """Makes a word; ``callback(before, after)`` runs soon after it has grown.

        One call at a time, on a thread for callbacks; values that come during a call
        are skipped.

        Example::

          done = engine.alloc_watcher(lambda before, after: send_layers(before, after))
          done.bump()
        """
        with native_errors():
            native = self._native.alloc_watcher(callback)
        return Watcher(native, self._free_watcher)

    def _free_watcher(self, native: Any) -> None:
        if not self.closed:
            with native_errors():
                self._native.free_watcher(native)

    def drain(self, timeout_s: float | None = None) -> None:
        """Waits until the writes and sends submitted so far have ended.

        Raises:
          DeadlineError: says which has not.
        """
        limit = self.timeout_s if timeout_s is None else timeout_s
        with native_errors():
            self._native.drain(limit)

    def stats(self) -> dict[str, Any]:
        """Counters since the start.

        ``operations``, ``operations_failed``, ``handshakes``; handshakes and messages
        that were refused, by reason (``refused_seal``, ``refused_version``,
        ``refused_replay``, ``refused_other``, ``last_refusal``); what was dropped;
        ``messages_arrived``, and those that were ``messages_handled``;
        ``nics``, a list, whose ``refused_frames`` came with another version or
        secret; ``peers``, by peer.
        """
        with native_errors():
            return dict(self._native.stats())


def _choose_transport(asked: str | None) -> str:
    if asked is None:
        return "shm"
    if asked not in TRANSPORTS:
        raise TransportUnavailableError(
            f"jf.TransferEngine: there is no transport={asked!r}; there are "
            f"{', '.join(TRANSPORTS)}"
        )
    for name, state, reason, fix in _ffi.transport_states():
        if name == asked and state != "usable":
            raise TransportUnavailableError(
                f"jf.TransferEngine: transport={asked!r} ({state}): {reason}; {fix}"
            )
    return asked


def _choose_nics(
    asked: int | Sequence[str] | None, transport: str
) -> tuple[int, list[str]]:
    """How many, 0 for one on each interface, and the names of the interfaces."""
    if asked is not None and not isinstance(asked, int):
        return 0, list(asked)
    if asked is not None and not 1 <= asked <= _NICS_MAX:
        raise ValueError(f"jf.TransferEngine: nics={asked}; there may be 1 to 8")
    try:
        # Peers may be anywhere, so as if they were on another host.
        names = choose_interfaces(transport, [network_host(), "elsewhere"])
        names = names or nearest_interfaces(transport)
    except OSError:  # this host has no way to others
        names = ["lo"]
    return asked or 0, names
