"""What a server counts, for Prometheus. Each server has a registry of its own."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class RequestMetrics:
    """What every server counts: requests, tokens, latencies."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("ptune_requests", "Requests answered.", ("endpoint", "status"), registry=registry)
        self.seconds = Histogram(
            "ptune_request_seconds",
            "From request to end of answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens = Counter("ptune_tokens", "Tokens read and written.", ("kind",), registry=registry)

    def text(self) -> bytes:
        """Return all of it in Prometheus' own format."""
        return generate_latest(self._registry)


class Metrics(RequestMetrics):
    """What a server over an engine counts: batches and the soft prompts in memory as well."""

    def __init__(self) -> None:
        super().__init__()
        registry = self._registry
        self.batch_rows = Histogram(
            "ptune_batch_rows", "Texts answered together.", ("kind",), buckets=_ROWS, registry=registry
        )
        self.waiting = Gauge("ptune_waiting_texts", "Texts in the queue.", registry=registry)
        self.prompts = Gauge("ptune_prompts_in_memory", "Soft prompts in the engine's table.", registry=registry)
        self.prompt_bytes = Gauge("ptune_prompt_bytes_in_memory", "Bytes that they take.", registry=registry)
        self.key_bytes = Gauge("ptune_key_bytes_in_memory", "Bytes of kept keys and values.", registry=registry)
        self.loads = Counter("ptune_prompt_loads", "Soft prompts read from disk.", registry=registry)


class GatewayMetrics(RequestMetrics):
    """What a gateway counts: the servers behind it as well."""

    def __init__(self) -> None:
        super().__init__()
        registry = self._registry
        self.alive = Gauge("ptune_upstreams_alive", "Servers behind this one that answer.", registry=registry)
        self.in_flight = Gauge("ptune_upstream_requests", "Requests that they work on.", registry=registry)
        self.retries = Counter("ptune_retries", "Requests sent again, to another server.", registry=registry)
        self.broken = Counter("ptune_broken_streams", "Streams that ended in an error event.", registry=registry)
