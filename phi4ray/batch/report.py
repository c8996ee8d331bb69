"""The report of a finished job: one HTML file that needs no network and no script."""

import time
from collections.abc import Sequence
from html import escape

import numpy as np

import phi4ray
from phi4ray.batch.charts import histogram_chart, line_chart, quantile, short
from phi4ray.batch.parts import LATENCY_EDGES_S, TOKEN_EDGES, Receipt
from phi4ray.batch.plan import Plan
from phi4ray.batch.summary import RunFacts, lines_of, summarize
from phi4ray.config import BatchConfig

STYLE = """
:root { color-scheme: light dark; --text: #1c1f24; --back: #fff; --grid: #e3e6ea; --soft: #626b76;
  --first: #2563eb; --second: #d97706; --third: #059669; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --back: #16181c; --grid: #2d3239;
  --soft: #9aa3ae; --first: #60a5fa; --second: #fbbf24; --third: #34d399; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 1360px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p, figcaption { color: var(--soft); }
table { border-collapse: collapse; } td, th { padding: .2rem 1.2rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--grid); vertical-align: top; overflow-wrap: anywhere; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem; }
figure { margin: 0; } svg { width: 100%; font-size: 11px; } svg text { fill: var(--soft); }
"""


def render_report(
    config: BatchConfig, plan: Plan, receipts: Sequence[Receipt], run: RunFacts
) -> str:
    """Render the report. Distributions are over all parts; what goes by time, over this run."""
    summary = summarize(config, plan, receipts, run)
    figures = _table(lines_of(summary))
    if config.gpu_hour_price is None:
        figures += "<p>Cost: not known without --gpu-hour-price.</p>"
    over_time = _over_time(run) if run.history else "<p>This run found every part done.</p>"
    errors = (
        _table([(code, f"{rows:,}") for code, rows in sorted(summary.errors.items())])
        if summary.errors
        else "<p>Every row was answered.</p>"
    )
    ended = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.started_at + run.elapsed_s))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>phi4ray {plan.plan_id}</title><style>{STYLE}</style></head><body>
<h1>{escape(config.engine.model_name)}: {plan.rows:,} rows</h1>
<p>{escape(config.output)}, finished {ended}</p>
{figures}
<h2>Over the time of the last run</h2>{over_time}
<h2>All answered rows</h2>{_distributions(receipts)}
<h2>Errors by code</h2>{errors}
<h2>Configuration</h2>{_table(_settings(config, plan), numbers=False)}
</body></html>
"""


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
    charts, quantiles = [], []
    for title, unit, name, edges in kinds:
        rows = [getattr(receipt, name) for receipt in receipts]
        counts = [int(n) for n in np.sum(rows, axis=0)] if rows else []
        charts.append(histogram_chart(title, unit, counts, edges))
        found = [quantile(counts, edges, share) for share in (0.5, 0.95, 0.99)]
        values = ", ".join("–" if value is None else short(value) for value in found)
        quantiles.append((f"{title}, {unit}: P50, P95, P99", values))
    return (
        f'<div class="charts">{"".join(charts)}</div>{_table(quantiles)}'
        "<p>Quantiles are interpolated within the bars. Latency is of the last attempt, from "
        "handing a row to the engine, so it includes waiting in the engine's queue.</p>"
    )


def _settings(config: BatchConfig, plan: Plan) -> list[tuple[str, str]]:
    settings = config.model_dump(exclude={"engine", "input"}, exclude_none=True)
    engine = config.engine.model_dump(exclude={"env"}, exclude_none=True)
    return [
        ("phi4ray", phi4ray.__version__),
        ("plan", plan.plan_id),
        ("input", f"{len(plan.inputs):,} files of {', '.join(config.input)}"),
        ("parts", f"{len(plan.shards):,}"),
        ("duplicate ids", f"{plan.duplicate_ids:,}"),
        *((name, str(value)) for name, value in settings.items()),
        *((f"engine.{name}", str(value)) for name, value in engine.items()),
    ]


def _table(lines: Sequence[tuple[str, str]], *, numbers: bool = True) -> str:
    kind = ' class="n"' if numbers else ""
    rows = (
        f"<tr><td>{escape(name)}</td><td{kind}>{escape(value)}</td></tr>" for name, value in lines
    )
    return f"<table>{''.join(rows)}</table>"
