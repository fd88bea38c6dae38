"""Counters of the server, in Prometheus' format."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tilelli_jax.generation.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class Metrics:
    """The counters of one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("tilelli_requests", "Finished requests.", ("endpoint", "status"),
                                registry=self._registry)
        self.tokens = Counter("tilelli_tokens", "Processed tokens.", ("kind",), registry=self._registry)
        self.finished = Counter("tilelli_choices", "Finished continuations.", ("reason",),
                                registry=self._registry)
        self.first_token = Histogram("tilelli_first_token_seconds", "From a request to its first token.",
                                     buckets=SECONDS, registry=self._registry)
        self.seconds = Histogram("tilelli_request_seconds", "From a request to its end.", ("endpoint",),
                                 buckets=SECONDS, registry=self._registry)
        self.knows = Histogram("tilelli_p_knows", "P(knows) of prompts.",
                               buckets=tuple(i / 10 for i in range(1, 11)), registry=self._registry)
        for name, text, value in (
                ("tilelli_slots", "Slots of the batch.", lambda: engine.load.slots),
                ("tilelli_slots_active", "Slots that are in use.", lambda: engine.load.active),
                ("tilelli_queue", "Requests that wait for a slot.", lambda: engine.load.waiting)):
            Gauge(name, text, registry=self._registry).set_function(value)
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)

    def text(self) -> bytes:
        """Returns all counters as Prometheus reads them."""
        return prometheus_client.generate_latest(self._registry)
