"""Runs the joint tests as two hosts would, on one machine.

    python -P tests/hosts/run_two_hosts.py [pytest arguments]

Each host is a pytest process of its own. Exit code 0 when both passed.
"""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys
import time

HOSTS = 2
TIMEOUT_S = 180.0


def main() -> int:
    """Starts the hosts and returns the first exit code that is not 0."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    test = pathlib.Path(__file__).with_name("test_joint.py")
    command = [
        *(sys.executable, "-P", "-m", "pytest", str(test)),
        f"--jaxfabric-coordinator=127.0.0.1:{port}",
        f"--jaxfabric-num-processes={HOSTS}",
        *sys.argv[1:],
    ]
    deadline = time.monotonic() + TIMEOUT_S
    hosts = [
        subprocess.Popen(
            [*command, f"--jaxfabric-process-id={index}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(HOSTS)
    ]
    codes = []
    for index, host in enumerate(hosts):
        try:
            output, _ = host.communicate(timeout=max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            # The ranks die with their pytest process.
            host.kill()
            output = host.communicate()[0] + f"\nended after {TIMEOUT_S:g} s"
        print(f"==== host {index}: exit code {host.returncode} ====\n{output}")
        codes.append(host.returncode)
    return next((code for code in codes if code != 0), 0)


if __name__ == "__main__":
    sys.exit(main())
