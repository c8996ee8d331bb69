"""Our own Prometheus metrics, in the registry that vLLM's are in: both are on `/metrics`."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from phi4ray.serve.admission import Admission
from phi4ray.serve.harvest import Harvest
from phi4ray.serve.paths import GENERATING
from phi4ray.serve.sleep import Sleeper

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
TOKENS: Final = Counter(
    "phi4ray:tokens",
    "Tokens that requests used, answered or hung up, by `prompt` or `completion`, and by tenant",
    ["kind", "tenant"],
)
QUEUE_TIME: Final = Histogram(
    "phi4ray:queue_time_seconds", "Wait for room in the KV cache", buckets=_SECONDS
)
TTFT: Final = Histogram(
    "phi4ray:time_to_first_byte_seconds",
    "From the arrival of a request that streams to its answer's first byte, waiting included",
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

BATCH_ROWS: Final = Gauge("phi4ray:batch_rows", "Batch rows that the engine has")
BATCH_TOKENS: Final = Gauge("phi4ray:batch_tokens", "Expected demand of those batch rows")
BATCH_WAITING: Final = Gauge("phi4ray:batch_waiting_rows", "Batch rows that wait for slack")
BATCH_ABORTED: Final = Gauge(
    "phi4ray:batch_aborted_rows", "Batch rows that made way for online requests, since start"
)
ASLEEP: Final = Gauge("phi4ray:asleep", "1 while the engine sleeps, or falls asleep, or wakes")


def watch(admission: Admission, harvest: Harvest) -> None:
    """Let the gauges show the state of this process whenever they are read."""
    BATCH_ROWS.set_function(lambda: harvest.rows)
    BATCH_TOKENS.set_function(lambda: harvest.tokens)
    BATCH_WAITING.set_function(lambda: harvest.all_waiting)
    BATCH_ABORTED.set_function(lambda: harvest.aborted)
    CAPACITY.set_function(lambda: admission.capacity_tokens)
    ADMITTED.set_function(lambda: admission.used_tokens)
    RUNNING.set_function(lambda: admission.running)
    QUEUED.set_function(lambda: admission.queued)
    QUEUED_TOKENS.set_function(lambda: admission.queued_tokens)


def watch_sleep(sleeper: Sleeper) -> None:
    """Let the gauge show whether this process's engine sleeps."""
    ASLEEP.set_function(lambda: sleeper.asleep)
