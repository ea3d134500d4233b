"""Runs a router: ``python -m jaxfabric.kv.serve --port 8000 --token-file FILE``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from aiohttp import web

from jaxfabric.kv.serve import Router, create_app


def main() -> None:
    """Runs it until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxfabric.kv.serve",
        description="Routes prompts to prefill and decode jobs; a token is a byte.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="where to listen")
    add("--port", type=int, default=8000)
    add("--token-file", type=Path, required=True, help="holds what jobs must show")
    add("--waiting", type=int, default=256, help="requests that may wait for a place")
    add("--timeout-s", type=float, default=60.0, help="of requests that do not say")
    add("--attempts", type=int, default=4, help="how often a request is tried")
    add("--heartbeat-s", type=float, default=5.0, help="between questions to jobs")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    router = Router(
        waiting=options.waiting,
        timeout_s=options.timeout_s,
        attempts=options.attempts,
    )
    token = options.token_file.read_text().strip()
    app = create_app(router, token=token, heartbeat_s=options.heartbeat_s)
    web.run_app(
        app,
        host=options.host,
        port=options.port,
        handler_cancellation=True,
        shutdown_timeout=2.0,
        print=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
