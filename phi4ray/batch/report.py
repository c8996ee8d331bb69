"""The report of a finished job: one HTML file that needs no network and no script."""

import time
from collections.abc import Sequence

import numpy as np

from phi4ray.batch.charts import histogram_chart, line_chart, quantile, short
from phi4ray.batch.page import page, shown, table, tiles, versions
from phi4ray.batch.parts import LATENCY_EDGES_S, TOKEN_EDGES, Receipt
from phi4ray.batch.plan import Plan
from phi4ray.batch.summary import RunFacts, lines_of, summarize
from phi4ray.config import BatchConfig

QUANTILES = {"P50": 0.5, "P95": 0.95, "P99": 0.99}


def render_report(
    config: BatchConfig, plan: Plan, receipts: Sequence[Receipt], run: RunFacts
) -> str:
    """Render the report. Distributions are over all parts; what goes by time, over this run."""
    summary = summarize(config, plan, receipts, run)
    # Codes, which are indented among the figures, have a table of their own.
    figures = tiles([line for line in lines_of(summary) if not line[0].startswith(" ")])
    if config.gpu_hour_price is None:
        figures += "<p>Cost: not given; it takes the price of a GPU hour, gpu_hour_price.</p>"
    if run.rows < plan.rows:
        figures += (
            f"<p>The last run wrote the answers of {run.rows:,} of {plan.rows:,} rows, runs before "
            "it the others: speeds, costs and what goes by time are of the last run, all else is "
            "of the whole job.</p>"
        )
    over_time = _over_time(run) if run.history else "<p>This run found every part done.</p>"
    errors = (
        table(
            [(code, f"{rows:,}") for code, rows in sorted(summary.errors.items())],
            head=("code", "rows"),
        )
        if summary.errors
        else "<p>Every row was answered.</p>"
    )
    ended = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.started_at + run.elapsed_s))
    body = f"""{figures}
<h2>Over the time of the last run</h2>{over_time}
<h2>All answered rows</h2>{_distributions(receipts)}
<h2>Errors by code</h2>{errors}
<h2>Configuration</h2>{table(_settings(config, plan))}"""
    return page(
        title=f"phi4ray {plan.plan_id}",
        heading=f"{config.engine.model_name}: {plan.rows:,} rows",
        line=f"{config.output}, finished {ended}",
        body=body,
    )


def _over_time(run: RunFacts) -> str:
    seconds = [sample.elapsed_s for sample in run.history]
    charts = [
        line_chart(
            "Throughput",
            "tok/s",
            seconds,
            {
                "prompt": [sample.prompt_rate for sample in run.history],
                "output": [sample.completion_rate for sample in run.history],
            },
        ),
        line_chart(
            "KV cache in use, mean of the replicas",
            "%",
            seconds,
            {"KV cache": [100 * sample.kv_used_fraction for sample in run.history]},
            top=100,
        ),
        line_chart(
            "Requests in the engines",
            "requests",
            seconds,
            {
                "running": [sample.running for sample in run.history],
                "waiting": [sample.waiting for sample in run.history],
            },
        ),
        line_chart(
            "Replicas",
            "ready",
            seconds,
            {"replicas": [sample.replicas for sample in run.history]},
        ),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _distributions(receipts: Sequence[Receipt]) -> str:
    kinds = (
        ("Latency of a request", "seconds", "latency_s", LATENCY_EDGES_S),
        ("Prompt length", "tokens", "prompt_lengths", TOKEN_EDGES),
        ("Answer length", "tokens", "completion_lengths", TOKEN_EDGES),
    )
    charts, lines = [], []
    for title, unit, name, edges in kinds:
        rows = [getattr(receipt, name) for receipt in receipts]
        counts = [int(n) for n in np.sum(rows, axis=0)] if rows else []
        marks = {label: quantile(counts, edges, share) for label, share in QUANTILES.items()}
        charts.append(histogram_chart(title, unit, counts, edges, marks))
        values = ("–" if value is None else short(value) for value in marks.values())
        lines.append((f"{title}, {unit}", *values))
    quantiles = table(lines, head=("", *QUANTILES))
    return (
        f'<div class="charts">{"".join(charts)}<div>{quantiles}'
        "<p>Quantiles are estimates, interpolated within the bars. Latency is that of "
        "the last attempt, from handing a row to the engine: it includes the wait in the engine's "
        "queue.</p></div></div>"
    )


def _settings(config: BatchConfig, plan: Plan) -> list[tuple[str, str]]:
    settings = config.model_dump(exclude={"engine", "input"}, exclude_none=True)
    engine = config.engine.model_dump(exclude={"env"}, exclude_none=True)
    return [
        ("plan", plan.plan_id),
        ("input", f"{len(plan.inputs):,} files of {', '.join(config.input)}"),
        ("parts", f"{len(plan.shards):,}"),
        ("duplicate ids", f"{plan.duplicate_ids:,}"),
        *((name, shown(name, value)) for name, value in settings.items()),
        *((f"engine.{name}", shown(name, value)) for name, value in engine.items()),
        *(
            (f"engine.env.{name}", "set")  # values may be secrets
            for name in config.engine.env
        ),
        ("versions", ", ".join(versions())),
    ]
