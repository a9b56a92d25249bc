"""What `/metrics` shows. No prompt, and nothing else that a client writes, is ever a label."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
STAGES = ("queue", "text", "picture", "unet", "decode", "rest", "encode")


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"addbench_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"addbench_{name}", text, labels, registry=self.registry)

        def histogram(
            name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS
        ) -> Histogram:
            return Histogram(
                f"addbench_{name}", text, labels, registry=self.registry, buckets=buckets
            )

        self.requests = counter("requests_total", "answered requests", "endpoint", "code")
        self.seconds = histogram("request_seconds", "from request to answer", "endpoint")
        self.stages = histogram("stage_seconds", "of a picture, by stage", "stage")
        self.depth = gauge("queue_depth", "pictures that wait, of the API and live ones")
        self.in_work = gauge("in_work", "pictures that are being drawn")
        self.batch = histogram(
            "batch_size", "pictures drawn together", buckets=(1, 2, 4, 8, 16, 32)
        )
        self.images = counter("images_total", "pictures that were drawn")
        self.replaced = counter("frames_replaced_total", "live requests replaced by newer ones")
        self.cancelled = counter(
            "cancelled_total", "pictures that nobody waits for any more", "where"
        )
        self.restarts = counter("worker_restarts_total", "workers that died and were started anew")
        self.connections = gauge("live_connections", "open live connections")
        self.model = gauge("model_info", "what is served", "model", "backend", "size", "bundle")

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self.registry)
