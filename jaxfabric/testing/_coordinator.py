"""JAX's coordination service in a process of its own.

JAX runs the service in rank 0 and aborts all ranks when it goes away. Tests in which
rank 0 dies need it elsewhere: here, while rank 0's own one listens to nobody. JAX has
no public call for that; this is the only place that uses the private one.
"""

from __future__ import annotations

import sys
import threading

from jaxfabric._cli import _processes


def main() -> None:
    """Serves argv[2] processes at address argv[1] until killed."""
    address, processes, parent_pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    heartbeat_s = int(sys.argv[4])
    _processes.die_with_parent(parent_pid)
    from jax._src.lib import _jax

    service = _jax.get_distributed_runtime_service(
        address,
        processes,
        heartbeat_timeout=heartbeat_s,
        shutdown_timeout=heartbeat_s,
        recoverable=False,
    )
    threading.Event().wait()
    del service  # it lives as long as the process


if __name__ == "__main__":
    main()
