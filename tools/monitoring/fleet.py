"""The dashboard of a service and its replicas."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.monitoring.panels import HERE, Panel, Query, new_dashboard, quantiles, variable

ANSWERS = "haproxy_backend_http_responses_total"
APPLICATIONS = f'{HERE},proxy=~"http-.+"'
FAILED = f'{APPLICATIONS},code="5xx"'
ASKED = f'{HERE},path!~"/health|/ready|/metrics|other"'


def total(metric: str) -> str:
    """The sum of a gauge over the replicas."""
    return f"sum({metric}{{{HERE}}})"


def rate(metric: str, *by: str, matchers: str = HERE) -> str:
    """The growth of a counter in a second, over the replicas."""
    grouped = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouped} (rate({metric}{{{matchers}}}[$__rate_interval]))"


REPLICAS = (
    Panel(
        "Replicas", "Replicas whose engine answers.", "short",
        (Query(f"count(vllm:num_requests_running{{{HERE}}})", "running"),), 4, latest=True,
    ),
    Panel(
        "KV capacity", "Tokens that all KV caches hold.", "short",
        (Query(total("phi4ray:kv_capacity_tokens"), "tokens"),), 5, latest=True,
    ),
    Panel(
        "KV demand", "Expected tokens of admitted and of waiting requests, of the capacity. "
        "Autoscaling keeps it at target_occupancy.", "percentunit",
        (
            Query(
                f"({total('phi4ray:admitted_tokens')} + {total('phi4ray:queued_tokens')}) / "
                f"{total('phi4ray:kv_capacity_tokens')}", "of capacity",
            ),
        ), 5, latest=True,
    ),
    Panel(
        "Output", "Tokens generated in a second.", "short",
        (Query(rate("vllm:generation_tokens_total"), "tokens/s"),), 5, latest=True,
    ),
    Panel(
        "Errors", "Answers with a 5xx status as clients got them, of all.", "percentunit",
        (
            Query(
                f"{rate(ANSWERS, matchers=FAILED)} / {rate(ANSWERS, matchers=APPLICATIONS)}",
                "of answers",
            ),
        ), 5, latest=True,
    ),
)  # fmt: skip

LATENCY = (
    Panel(
        "First byte of a stream", "From a request's arrival, waiting included.", "s",
        quantiles("phi4ray:time_to_first_byte_seconds"),
    ),
    Panel(
        "Wait for room (queue time)", "Until the KV cache has room for a request.", "s",
        quantiles("phi4ray:queue_time_seconds"),
    ),
    Panel(
        "TTFT of the engine", "From the engine's receipt of a request to its first token.", "s",
        quantiles("vllm:time_to_first_token_seconds"),
    ),
    Panel(
        "TPOT", "Mean time of an output token, by request.", "s",
        quantiles("vllm:request_time_per_output_token_seconds"),
    ),
    Panel(
        "E2E", "From the engine's receipt of a request to its last token.", "s",
        quantiles("vllm:e2e_request_latency_seconds"),
    ),
    Panel(
        "Request duration", "From a request's arrival to the end of its answer.", "s",
        quantiles("phi4ray:request_duration_seconds"),
    ),
)  # fmt: skip

TRAFFIC = (
    Panel(
        "Requests", "By status, at the replicas; 499: the client hung up.", "reqps",
        (Query(rate("phi4ray:requests_total", "status", matchers=ASKED), "{{status}}"),),
    ),
    Panel(
        "Turned away", "By error code: keys, limits, sizes, and engine_overloaded.", "reqps",
        (Query(rate("phi4ray:rejected_requests_total", "code"), "{{code}}"),),
    ),
    Panel(
        "Tokens", "Prompt tokens read and output tokens generated in a second.", "short",
        (
            Query(rate("vllm:prompt_tokens_total"), "prompt"),
            Query(rate("vllm:generation_tokens_total"), "output"),
        ),
    ),
)  # fmt: skip

ENGINES = (
    Panel(
        "Running and waiting", "In the engines, and before them for want of room.", "short",
        (
            Query(total("vllm:num_requests_running"), "running"),
            Query(total("vllm:num_requests_waiting"), "waiting in the engine"),
            Query(total("phi4ray:queued_requests"), "waiting for room"),
        ),
    ),
    Panel(
        "KV cache", "What the caches hold, what admitted requests are expected to need, and what "
        "waits, in tokens.", "short",
        (
            Query(total("phi4ray:kv_capacity_tokens"), "capacity"),
            Query(total("phi4ray:admitted_tokens"), "admitted"),
            Query(total("phi4ray:queued_tokens"), "waiting"),
        ),
    ),
    Panel(
        "KV cache in use", "Share of blocks, by replica.", "percentunit",
        (Query(f"max by (instance) (vllm:kv_cache_usage_perc{{{HERE}}})", "{{instance}}"),),
    ),
    Panel(
        "Preemptions", "Requests that an engine put back for want of blocks.", "reqps",
        (Query(rate("vllm:num_preemptions_total", "instance"), "{{instance}}"),),
    ),
    Panel(
        "Prefix cache", "Share of prompt tokens found in it.", "percentunit",
        (
            Query(
                f"{rate('vllm:prefix_cache_hits_total')} / "
                f"{rate('vllm:prefix_cache_queries_total')}",
                "hits",
            ),
        ),
    ),
    Panel(
        "Replicas, wanted and there", "What autoscaling wants and between which bounds, what Serve "
        "holds healthy, and engines that answer.", "short",
        (
            Query(
                f"sum by (application, bound) (ray_phi4ray_replicas_bound{{{HERE}}})", "{{bound}}"
            ),
            Query(f"sum by (application) (ray_phi4ray_desired_replicas{{{HERE}}})", "wanted"),
            Query(
                f'sum(ray_serve_deployment_replica_healthy{{{HERE},deployment="replica"}})',
                "healthy",
            ),
            Query(f"count(vllm:num_requests_running{{{HERE}}})", "answering"),
        ),
    ),
    Panel(
        "Why so many replicas", "Demand of a replica's capacity, admitted and waiting: above "
        "target_occupancy (0.7) autoscaling adds, below it takes away.", "percentunit",
        (
            Query(
                f"({total('phi4ray:admitted_tokens')} + {total('phi4ray:queued_tokens')}) / "
                f"{total('phi4ray:kv_capacity_tokens')}", "demand",
            ),
            Query(
                f"{total('phi4ray:queued_tokens')} / {total('phi4ray:kv_capacity_tokens')}",
                "of it waiting",
            ),
        ),
    ),
)  # fmt: skip


def build() -> Dashboard:
    """Build it."""
    return new_dashboard(
        "fleet",
        "phi4ray: fleet",
        "A service and its replicas.",
        [variable("namespace", "phi4ray:kv_capacity_tokens")],
        [("Now", REPLICAS), ("Latency", LATENCY), ("Traffic", TRAFFIC), ("Engines", ENGINES)],
    )
