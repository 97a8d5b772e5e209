"""The operator's own metrics, named and described in one place."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Every series that the operator exports, on a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "octavo_operator_reconciles_total",
            "Reconciles of LLMServices by their result.",
            ["result"],
            registry=self.registry,
        )
        self.reconcile_seconds = Histogram(
            "octavo_operator_reconcile_seconds",
            "Duration of a reconcile.",
            buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0),
            registry=self.registry,
        )
        self.api_writes = Counter(
            "octavo_operator_api_writes_total",
            "Writes to the API server.",
            ["kind", "verb"],
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "octavo_operator_queue_depth",
            "LLMServices that wait for a worker.",
            registry=self.registry,
        )
        self.scale_decisions = Counter(
            "octavo_operator_scale_decisions_total",
            "Changes of a replica count by the autoscaler.",
            ["direction"],
            registry=self.registry,
        )
        self.scrape_failures = Counter(
            "octavo_operator_scrape_failures_total",
            "Started replicas that did not answer with their load.",
            registry=self.registry,
        )
        for direction in ("up", "down"):
            self.scale_decisions.labels(direction)
        for result in ("unchanged", "changed", "failed"):
            self.reconciles.labels(result)
