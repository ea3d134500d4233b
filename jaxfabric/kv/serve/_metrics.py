"""Metrics: the router's numbers, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from jaxfabric.kv.serve._jobs import Jobs
from jaxfabric.kv.serve._messages import ROLES

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PREFIX = "jaxfabric_serve"


class Metrics:
    """Of one router; each has a registry of its own.

    Attributes:
      requests: ended, by outcome.
      tokens: made.
      attempts_failed: tries that failed, by role and kind.
      jobs_gone: connections of jobs that ended, by role.
      in_flight: requests that are neither refused nor ended.
      ttft: seconds from a prompt's arrival to its first token.
      duration: seconds from a prompt's arrival to its end.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._registry = registry = CollectorRegistry()

        def name(what: str) -> str:
            return f"{_PREFIX}_{what}"

        self.requests = Counter(
            name("requests"),
            "Requests, by how they ended",
            ["outcome"],
            registry=registry,
        )
        self.tokens = Counter(name("tokens"), "Tokens made", registry=registry)
        self.attempts_failed = Counter(
            name("attempts_failed"),
            "Tries of requests that failed",
            ["role", "kind"],
            registry=registry,
        )
        self.jobs_gone = Counter(
            name("jobs_gone"),
            "Connections of jobs that ended",
            ["role"],
            registry=registry,
        )
        self.in_flight = Gauge(
            name("requests_in_flight"), "Requests under way", registry=registry
        )
        self.ttft = Histogram(
            name("ttft_seconds"),
            "From a prompt's arrival to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            name("request_seconds"),
            "From a prompt's arrival to its end",
            buckets=_SECONDS,
            registry=registry,
        )
        waiting = Gauge(
            name("requests_waiting"), "Requests without a place", registry=registry
        )
        waiting.set_function(lambda: jobs.waiting)
        here = Gauge(name("jobs"), "Jobs that are here", ["role"], registry=registry)
        busy = Gauge(
            name("places_taken"), "Requests at jobs", ["role"], registry=registry
        )

        def jobs_here(role: str) -> Callable[[], float]:
            return lambda: len(jobs.of(role))

        def places_taken(role: str) -> Callable[[], float]:
            return lambda: sum(len(job.attempts) for job in jobs.of(role))

        for role in ROLES:
            here.labels(role).set_function(jobs_here(role))
            busy.labels(role).set_function(places_taken(role))

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return bytes(generate_latest(self._registry))
