"""Prometheus metrics in a separate registry, with a bounded number of series."""

from __future__ import annotations

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128)

_UNMATCHED = "unmatched"
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


class Metrics:
    """Counts requests, stages, batches and adapts. Thread-safe.

    `registry`: also of the metrics that are read at each scrape, see service/monitoring/gauges.py.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "topwork_requests",
            "Requests by route template and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "topwork_request_seconds",
            "Seconds from the first byte of a request to the last of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stages = Histogram(
            "topwork_stage_seconds",
            "Seconds by stage: decode, tokenize, queue, embed, head, fit, publish.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batches = Histogram(
            "topwork_batch_items",
            "Inputs in one backbone run.",
            ["backbone"],
            buckets=_ITEMS,
            registry=self.registry,
        )
        self._adapts = Counter("topwork_adapts", "Adapts by outcome.", ["outcome"], registry=self.registry)
        # Looking up a series takes as long as counting, and there are few label sets.
        self._request = cache(self._requests.labels)
        self._request_time = cache(self._request_seconds.labels)
        self._stage = cache(self._stages.labels)
        self._batch = cache(self._batches.labels)

    def request(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count one answered request. `route`: the template that matched, or None."""
        known = method if route and method in _METHODS else "other"
        self._request(known, route or _UNMATCHED, str(status)).inc()
        self._request_time(route or _UNMATCHED).observe(seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """Observe the seconds that one request spent in a stage."""
        self._stage(stage).observe(seconds)

    def batch(self, backbone: str, items: int) -> None:
        """Observe the size of one backbone run."""
        self._batch(backbone).observe(items)

    def adapt(self, outcome: str) -> None:
        """Count one adapt by its outcome: promoted, withheld, stored, or the code of the error."""
        self._adapts.labels(outcome).inc()

    def render(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry)
