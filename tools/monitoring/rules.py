"""Prometheus' recording and alerting rules.

Objectives are alerted on by burn rate, which is how many times faster than allowed the error budget
is spent: Google, The Site Reliability Workbook, chapter 5, "Multiwindow, Multi-Burn-Rate Alerts".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RUNBOOK = "docs/operations.md"


@dataclass(frozen=True, slots=True)
class Objective:
    """A share of good events over 30 days. `bad` and `all` are selectors of counters."""

    name: str
    alert: str
    target: float
    bad: str
    all: str
    what: str


OBJECTIVES = (
    # HAProxy counts what clients got: a request that a second replica answered after the first one
    # failed is a good one, and one that found no replica a bad one. Its frontend would count the
    # health checks too.
    Objective(
        "availability",
        "Phi4rayAvailabilityBurn",
        0.999,
        'haproxy_backend_http_responses_total{proxy=~"http-.+",code="5xx"}',
        'haproxy_backend_http_responses_total{proxy=~"http-.+"}',
        "answers with a 5xx status",
    ),
    Objective(
        "first_byte",
        "Phi4rayFirstByteBurn",
        0.99,
        "",
        "phi4ray:time_to_first_byte_seconds_count",
        "streams that begin later than 2.5 s after their request",
    ),
)


@dataclass(frozen=True, slots=True)
class Burn:
    """A row of the workbook's table 5-8: both windows must burn at the rate.

    14.4 over an hour spends 2% of 30 days' budget, 6 over six hours 5%, 1 over three days 10%. The
    short window, a twelfth of the long one, ends the alert soon after its cause.
    """

    long: str
    short: str
    rate: float
    severity: str


BURNS = (
    Burn("1h", "5m", 14.4, "critical"),
    Burn("6h", "30m", 6, "critical"),
    Burn("3d", "6h", 1, "warning"),
)
WINDOWS = ("5m", "30m", "1h", "6h", "3d")


def recorded(objective: Objective, window: str) -> str:
    """Name the share of bad events over a window, by `level:metric:operations`."""
    return f"namespace:phi4ray_{objective.name}_errors:ratio_rate{window}"


def share_of_bad(objective: Objective, window: str) -> str:
    """The share of bad events over a window."""

    def rate(selector: str) -> str:
        return f"sum by (namespace) (rate({selector}[{window}]))"

    if objective.bad:
        return f"{rate(objective.bad)} / {rate(objective.all)}"
    histogram = objective.all.removesuffix("_count")
    good = f'{histogram}_bucket{{le="2.5"}}'
    return f"1 - {rate(good)} / {rate(objective.all)}"


def alert(
    name: str, expr: str, wait: str, severity: str, summary: str, description: str
) -> dict[str, Any]:
    """One alerting rule; its runbook is the heading of its name."""
    return {
        "alert": name,
        "expr": expr,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {
            "summary": summary,
            "description": description,
            "runbook": f"{RUNBOOK}#{name.lower()}",
        },
    }


def burn_alert(objective: Objective, burn: Burn) -> dict[str, Any]:
    """The alert of one row of the table."""
    limit = f"({burn.rate:g} * {round(1 - objective.target, 6):g})"
    long, short = recorded(objective, burn.long), recorded(objective, burn.short)
    made = alert(
        objective.alert,
        f"{long} > {limit} and {short} > {limit}",
        "2m" if burn.severity == "critical" else "1h",
        burn.severity,
        f"{{{{ $labels.namespace }}}}: the error budget of {objective.name} burns "
        f"{burn.rate:g} times too fast",
        f"{{{{ $value | humanizePercentage }}}} in {burn.long}: {objective.what}. The objective "
        f"allows {1 - objective.target:.1%}.",
    )
    made["labels"]["window"] = burn.long
    return made


ASKED = 'path!~"/health|/ready|/metrics|other"'

SATURATION = (
    alert(
        "Phi4rayKVSaturated",
        "(sum by (namespace) (phi4ray:admitted_tokens) + sum by (namespace) "
        "(phi4ray:queued_tokens)) / sum by (namespace) (phi4ray:kv_capacity_tokens) > 0.95",
        "10m",
        "warning",
        "{{ $labels.namespace }}: the KV caches are full",
        "Requests need {{ $value | humanizePercentage }} of the KV caches of all replicas: more "
        "wait, and then are turned away.",
    ),
    alert(
        "Phi4rayTurnedAway",
        'sum by (namespace) (rate(phi4ray:rejected_requests_total{code="engine_overloaded"}[5m])) '
        f"/ sum by (namespace) (rate(phi4ray:requests_total{{{ASKED}}}[5m])) > 0.05",
        "5m",
        "critical",
        "{{ $labels.namespace }}: requests are turned away for want of room",
        "{{ $value | humanizePercentage }} of requests got 429 engine_overloaded.",
    ),
)


def of_jobs(metric: str, window: str = "", function: str = "") -> str:
    """A metric of each job. A driver that is gone shows for a while beside the next one's."""
    selected = f"ray_phi4ray_batch_{metric}{window}"
    return f"max by (namespace, output) ({f'{function}({selected})' if function else selected})"


RUN_ROWS = f"{of_jobs('rows_done')} - {of_jobs('rows_resumed')}"

BATCH = (
    alert(
        "Phi4rayBatchNoProgress",
        f"{of_jobs('rows_done')} < {of_jobs('rows_planned')} and "
        f"{of_jobs('rows_done', '[15m]', 'changes')} == 0 and "
        f"{of_jobs('elapsed_seconds')} > 900",
        "5m",
        "critical",
        "{{ $labels.output }}: no row was answered for 15 minutes",
        "The job has {{ $value }} rows done, and runs.",
    ),
    alert(
        "Phi4rayBatchErrorFraction",
        "(sum by (namespace, output) (ray_phi4ray_batch_error_rows) / "
        f"({RUN_ROWS}) > 0.05 or "
        "sum by (namespace, output) (delta(ray_phi4ray_batch_error_rows[15m])) / "
        "sum by (namespace, output) (increase(ray_phi4ray_batch_rows_total[15m])) > 0.05) and "
        # As max_error_fraction does: of a few rows a share says nothing.
        f"{RUN_ROWS} >= 100",
        "2m",
        "warning",
        "{{ $labels.output }}: many rows get no answer",
        "{{ $value | humanizePercentage }} of rows are error rows, in this run or in the last 15 "
        "minutes.",
    ),
)

REPLICAS = (
    alert(
        "Phi4rayReplicaRestarts",
        # Of services alone: the workers of one batch job follow those of another on the same port.
        'changes((process_start_time_seconds{job="phi4ray-replica"} and on (namespace, instance) '
        "phi4ray:kv_capacity_tokens)[1h:1m]) >= 3",
        "0m",
        "critical",
        "{{ $labels.instance }}: its engine starts again and again",
        "Started {{ $value }} times in an hour on the same pod.",
    ),
    alert(
        "Phi4rayReplicaFlapping",
        # Going up step by step, and down again later, passes the mean twice.
        "changes((ray_phi4ray_desired_replicas > bool avg_over_time("
        "ray_phi4ray_desired_replicas[1h]))[1h:1m]) >= 6",
        "0m",
        "warning",
        "{{ $labels.application }}: autoscaling goes up and down",
        "The number of replicas wanted passed its mean {{ $value }} times in an hour.",
    ),
)


def groups() -> Sequence[dict[str, Any]]:
    """All rules, as `groups` of a rule file."""
    recordings = [
        {"record": recorded(objective, window), "expr": share_of_bad(objective, window)}
        for objective in OBJECTIVES
        for window in WINDOWS
    ]
    burns = [burn_alert(objective, burn) for objective in OBJECTIVES for burn in BURNS]
    return (
        {"name": "phi4ray-objectives", "rules": [*recordings, *burns]},
        {"name": "phi4ray-saturation", "rules": list(SATURATION)},
        {"name": "phi4ray-batch", "rules": list(BATCH)},
        {"name": "phi4ray-replicas", "rules": list(REPLICAS)},
    )
