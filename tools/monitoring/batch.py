"""The dashboard of batch jobs."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from tools.monitoring.panels import HERE, Panel, Query, new_dashboard, variable

STATS = "Of jobs with `engine.disable_log_stats: false`."
JOB = f'{HERE},output=~"$output"'


def each(metric: str, by: str = "output") -> str:
    """A gauge of each job. A driver that is gone shows for a while beside the next one's."""
    return f"max by ({by}) (ray_phi4ray_batch_{metric}{{{JOB}}})"


def rate(metric: str, by: str = "output", window: str = "$__rate_interval") -> str:
    """The growth in a second of a counter of each job."""
    return f"sum by ({by}) (rate(ray_phi4ray_batch_{metric}_total{{{JOB}}}[{window}]))"


JOBS = (
    Panel(
        "Progress", "Rows answered, earlier runs included, of the job's.", "percentunit",
        (Query(f"{each('rows_done')} / {each('rows_planned')}", "{{output}}"),), 8, latest=True,
    ),
    Panel(
        "Time left", "At the speed of the last five minutes.", "s",
        (
            Query(
                f"({each('rows_planned')} - {each('rows_done')}) / {rate('rows', window='5m')}",
                "{{output}}",
            ),
        ), 8, latest=True,
    ),
    Panel(
        "Rows left", "Rows without an answer yet.", "short",
        (Query(f"{each('rows_planned')} - {each('rows_done')}", "{{output}}"),), 8, latest=True,
    ),
)  # fmt: skip

SPEED = (
    Panel("Rows", "Answered in a second.", "short", (Query(rate("rows"), "{{output}}"),)),
    Panel(
        "Tokens", "In a second, of rows that are answered.", "short",
        (Query(rate("tokens", "output, kind"), "{{kind}} {{output}}"),),
    ),
    Panel(
        "Progress", "Rows answered of the job's.", "percentunit",
        (Query(f"{each('rows_done')} / {each('rows_planned')}", "{{output}}"),),
    ),
)  # fmt: skip

HEALTH = (
    Panel(
        "Error rows", "By error code, of this run's rows.", "percentunit",
        (
            Query(
                f"{each('error_rows', 'output, code')} / on (output) group_left () "
                f"({each('rows_done')} - {each('rows_resumed')})", "{{code}} {{output}}",
            ),
        ),
    ),
    Panel("Replicas", "Those that report.", "short", (Query(each("replicas"), "{{output}}"),)),
    Panel(
        "Rows in flight", "Rows that the engines have.", "short",
        (Query(each("rows_in_flight"), "{{output}}"),),
    ),
    Panel(
        "KV caches in use", "The replicas' mean.", "percentunit",
        (Query(each("kv_used_fraction"), "{{output}}"),),
    ),
    Panel(
        "Engines: running requests", f"By replica. {STATS}", "short",
        (Query(f"sum by (instance) (vllm:num_requests_running{{{HERE}}})", "{{instance}}"),),
    ),
    Panel(
        "Engines: output", f"Tokens in a second by replica. {STATS}", "short",
        (
            Query(
                "sum by (instance) "
                f"(rate(vllm:generation_tokens_total{{{HERE}}}[$__rate_interval]))",
                "{{instance}}",
            ),
        ),
    ),
)  # fmt: skip


def build() -> Dashboard:
    """Build it."""
    jobs = "ray_phi4ray_batch_rows_planned"
    return new_dashboard(
        "batch",
        "phi4ray: batch jobs",
        "Jobs over many rows; each is named by its output prefix.",
        [variable("namespace", jobs), variable("output", jobs)],
        [("Jobs", JOBS), ("Speed", SPEED), ("Health", HEALTH)],
    )
