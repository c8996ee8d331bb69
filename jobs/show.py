"""How jobs of a cluster and what they wrote are shown: to people and as JSON. Pure."""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.table import Table

from phi4ray.batch.progress_file import RunProgress
from phi4ray.batch.submission import Submission, arguments_of

TEXT_WIDTH = 100
SILENT_S = 30.0


def job_facts(
    job: Submission, found: RunProgress | None, log_line: str | None = None
) -> dict[str, Any]:
    """What is known of a job, for JSON.

    `progress` is None where it has told nothing in its output, and `progress_line` then is what its
    log told last, if that was looked at.
    """
    progress: dict[str, Any] | None = None
    if found is not None:
        last, eta = found.window.last, found.window.eta()
        prompt_rate, completion_rate, row_rate = found.window.rates()
        progress = {
            "updated_at": found.updated_at,
            "rows": last.rows_done,
            "rows_total": last.rows_total,
            "rows_per_s": row_rate,
            "prompt_tokens_per_s": prompt_rate,
            "completion_tokens_per_s": completion_rate,
            "eta_s": None if eta is None else eta.total_seconds(),
            "errors": dict(last.errors),
            "rows_in_flight": last.rows_in_flight,
            "kv_used_fraction": last.kv_used_fraction,
            "replicas": last.replicas,
        }
    return {
        "id": job.id,
        "status": job.status,
        "outcome": job.outcome,
        "exit_code": job.exit_code,
        "output": job.output,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "entrypoint": job.entrypoint,
        "progress": progress,
        "progress_line": log_line if found is None else found.window.line(),
    }


def job_lines(
    job: Submission, found: RunProgress | None, now: float, log_line: str | None = None
) -> list[tuple[str, str]]:
    """What is known of a job, as people read it; `log_line` is for where it told nothing else."""
    lines = [("job", job.id), ("status", status_words(job)), ("output", job.output or "?")]
    if job.started_at is not None:
        lines.append(("started", f"{clock(job.started_at)} UTC"))
        lines.append(("for", span((job.ended_at or now) - job.started_at)))
    if found is not None:
        last = found.window.last
        lines += [
            ("progress", found.window.line()),
            ("rows/s", f"{found.window.rates()[2]:,.1f}"),
            *((f"  {code}", f"{rows:,}") for code, rows in sorted(last.errors.items())),
        ]
        if not job.ended and now - found.updated_at > SILENT_S:
            lines.append(("told", f"{span(now - found.updated_at)} ago"))
    elif log_line is not None:
        lines.append(("progress", log_line))
    return [*lines, ("command", job.entrypoint)]


def job_list(found: Sequence[tuple[Submission, RunProgress | None]], now: float) -> list[str]:
    """Jobs with what they told last, a line each."""
    if not found:
        return ["no batch jobs: `phi4ray submit` starts one"]
    rows = [("ID", "STATUS", "STARTED (UTC)", "FOR", "PROGRESS", "OUTPUT")]
    for job, progress in found:
        began = job.started_at
        rows.append(
            (
                job.id,
                job.outcome,
                clock(began) if began is not None else "",
                span((job.ended_at or now) - began) if began is not None else "",
                progress.window.line().partition(" | ")[0] if progress is not None else "",
                job.output or "?",
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def status_words(job: Submission) -> str:
    """How a job stands, with its exit code."""
    return job.outcome if job.exit_code is None else f"{job.outcome}, exit code {job.exit_code}"


def result_lines(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of `Results.figures`, as people read them."""

    def of(name: str) -> str:
        whole = figures[name] == figures[f"{name}_total"]
        return f"{figures[name]:,}" + ("" if whole else f" of {figures[f'{name}_total']:,}")

    lines = [
        ("rows", of("rows")),
        ("parts", of("parts")),
        ("error rows", f"{figures['error_rows']:,}"),
    ]
    lines += [(f"  {code}", f"{rows:,}") for code, rows in figures["errors"].items()]
    lines += [
        (n.replace("_", " "), f"{figures[n]:,}") for n in ("prompt_tokens", "completion_tokens")
    ]
    if figures["duration_s"] is not None:
        lines.append(("first part's start to last one's end", span(figures["duration_s"])))
    return lines


def figures_table(plan_id: str, figures: dict[str, Any]) -> Table:
    """The table of a job's figures."""
    table = Table("", "", title=f"plan {plan_id}", show_header=False)
    table.columns[1].justify = "right"
    for name, value in result_lines(figures):
        table.add_row(name, value)
    return table


def row_line(row: dict[str, Any]) -> str:
    """A row of the output in one line: its id, and its answer or error, cut short."""
    if row["error_code"] is not None:
        text = f"[{row['error_code']}] {row['error_message']}"
    else:
        text = row["text"] if row["text"] is not None else row["response"]
    text = " ".join(str(text).split())
    return f"{row['id']}: {text if len(text) <= TEXT_WIDTH else text[: TEXT_WIDTH - 1] + '…'}"


def clock(unix_s: float) -> str:
    """A time in UTC."""
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S}"


def span(seconds: float) -> str:
    """A length of time, as 1:02:03."""
    return str(timedelta(seconds=round(max(0.0, seconds))))


def how_to_go_on(job: Submission) -> str:
    """The commands for a job that runs."""
    return (
        f"watch:  phi4ray status {job.id} --follow\n"
        f"log:    phi4ray logs {job.id}\n"
        f"stop:   phi4ray cancel {job.id}"
    )


def again(job: Submission) -> str:
    """The command that goes on from the parts of a job."""
    arguments = arguments_of(job.entrypoint)
    return job.entrypoint if arguments is None else shlex.join(["phi4ray", "submit", *arguments])
