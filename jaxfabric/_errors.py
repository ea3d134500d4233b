"""The exceptions of jaxfabric.

Inside ``jit`` the same texts come through JAX's own exception
(``jax.errors.JaxRuntimeError``); ``Fabric.failure()`` then gives one of these.
"""

from __future__ import annotations

from collections.abc import Sequence


class FabricError(RuntimeError):
    """Something about a Fabric failed; the message says what, who and what to do."""


class PeerLostError(FabricError):
    """A rank died or closed its Fabric while others still needed it.

    Attributes:
      peers: the ranks that are lost.
    """

    def __init__(self, message: str, peers: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.peers = tuple(peers)


class DeadlineError(FabricError):
    """An operation did not end within its ``timeout_s``."""


class CapacityError(FabricError):
    """A bounded resource of the Fabric is too small; the message names the setting."""


class PlanMismatchError(FabricError):
    """Ranks do not run the same program, or do not agree on a setting."""


class TransportUnavailableError(FabricError):
    """The transport asked for cannot be used here; the message says why."""


class OutcomeUnknownError(FabricError):
    """It cannot be known whether an operation took effect; it may have."""


# Status codes of the native layers (absl's numbers) that have a kind of their own.
_KINDS: dict[int, type[FabricError]] = {
    2: OutcomeUnknownError,
    4: DeadlineError,
    8: CapacityError,
    9: FabricError,
    12: TransportUnavailableError,
    14: PeerLostError,
}


def from_status(code: int, message: str, peers: Sequence[int] = ()) -> FabricError:
    """The exception for a native status."""
    kind = _KINDS.get(code, FabricError)
    if kind is PeerLostError:
        return PeerLostError(message, peers)
    return kind(message)


def from_native(error: Exception) -> FabricError:
    """The exception for a ``_native.StatusError``, whose text is "CODE message"."""
    code, _, message = str(error).partition(" ")
    return from_status(int(code), message)
