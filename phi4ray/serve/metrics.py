"""Our own Prometheus metrics, in the registry that vLLM's are in: both are on `/metrics`."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from phi4ray.serve.admission import Admission
from phi4ray.serve.paths import GENERATING

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

PATHS: Final = GENERATING | {
    "/v1/batches",
    "/v1/embeddings",
    "/v1/files",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/health",
    "/ready",
    "/metrics",
}
"""Paths with a label of their own: a label for every path that a scanner tries has no bound."""

REQUESTS: Final = Counter(
    "phi4ray:requests", "Requests by path, HTTP status and tenant", ["path", "status", "tenant"]
)
REJECTED: Final = Counter(
    "phi4ray:rejected_requests", "Requests that were turned away, by error code", ["code"]
)
QUEUE_TIME: Final = Histogram(
    "phi4ray:queue_time_seconds", "Wait for room in the KV cache", buckets=_SECONDS
)
TTFT: Final = Histogram(
    "phi4ray:time_to_first_byte_seconds",
    "From a request's arrival to the first byte of its answer's body, waiting included",
    buckets=_SECONDS,
)
DURATION: Final = Histogram(
    "phi4ray:request_duration_seconds", "From a request's arrival to its end", buckets=_SECONDS
)
CAPACITY: Final = Gauge("phi4ray:kv_capacity_tokens", "Tokens that the KV cache holds")
ADMITTED: Final = Gauge("phi4ray:admitted_tokens", "Expected demand of the requests admitted")
RUNNING: Final = Gauge("phi4ray:admitted_requests", "Requests admitted and not yet answered")
QUEUED: Final = Gauge("phi4ray:queued_requests", "Requests that wait for room")
QUEUED_TOKENS: Final = Gauge("phi4ray:queued_tokens", "Expected demand of those that wait")


def watch(admission: Admission) -> None:
    """Let the gauges show the state of this process's admission whenever they are read."""
    CAPACITY.set_function(lambda: admission.capacity_tokens)
    ADMITTED.set_function(lambda: admission.used_tokens)
    RUNNING.set_function(lambda: admission.running)
    QUEUED.set_function(lambda: admission.queued)
    QUEUED_TOKENS.set_function(lambda: admission.queued_tokens)
