"""What a run did, in figures: for programs, for the terminal and for the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from phi4ray.batch.manifest import count_errors
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import REPORT_NAME, Plan
from phi4ray.batch.progress import Sample
from phi4ray.batch.tally import Snapshot, Tally
from phi4ray.config import BatchConfig
from phi4ray.storage import join


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What this run did, apart from runs before it.

    `engine_s` is from a replica's taking the first shard to the last part's being durable, and
    `first_part_s` from the run's start to its first durable part; None where nothing had to run.
    `gpu_hours` are those of the replicas that there were from moment to moment, see
    `Tally.replica_s`.
    """

    started_at: float
    elapsed_s: float = 0.0
    engine_s: float | None = None
    first_part_s: float | None = None
    rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    gpu_hours: float = 0.0
    history: Sequence[Sample] = ()


def facts_of(
    config: BatchConfig,
    tally: Tally,
    snapshot: Snapshot,
    started_at: float,
    history: Sequence[Sample],
) -> RunFacts:
    """The facts of a run that has ended with this snapshot."""
    engine_s = None
    if tally.engine_began_s is not None and tally.last_part_s is not None:
        engine_s = tally.last_part_s - tally.engine_began_s
    return RunFacts(
        started_at=started_at,
        elapsed_s=snapshot.elapsed_s,
        engine_s=engine_s,
        first_part_s=tally.first_part_s,
        rows=snapshot.rows_done - snapshot.rows_resumed,
        prompt_tokens=snapshot.prompt_tokens,
        completion_tokens=snapshot.completion_tokens,
        gpu_hours=tally.replica_s * config.engine.gpus_per_replica / 3600,
        history=history,
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """A finished job. Rows, errors and tokens are of all its parts; the rates are of this run.

    `cost` and `cost_per_million_tokens` are of this run, in the unit of `gpu_hour_price`.
    """

    plan_id: str
    output: str
    report: str
    rows: int
    errors: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    run: RunFacts
    cost: float | None

    @property
    def error_rows(self) -> int:
        """Rows without an answer."""
        return sum(self.errors.values())

    @property
    def run_tokens(self) -> int:
        """Prompt and completion tokens of this run."""
        return self.run.prompt_tokens + self.run.completion_tokens

    @property
    def cost_per_million_tokens(self) -> float | None:
        """What a million tokens, prompt and completion, cost in this run."""
        if self.cost is None or not self.run_tokens:
            return None
        return self.cost / self.run_tokens * 1e6


def summarize(
    config: BatchConfig, plan: Plan, receipts: Sequence[Receipt], run: RunFacts
) -> Summary:
    """Add a finished job up."""
    price = config.gpu_hour_price
    return Summary(
        plan_id=plan.plan_id,
        output=config.output,
        report=join(config.output, REPORT_NAME),
        rows=plan.rows,
        errors=count_errors(receipts),
        prompt_tokens=sum(receipt.prompt_tokens for receipt in receipts),
        completion_tokens=sum(receipt.completion_tokens for receipt in receipts),
        run=run,
        cost=None if price is None else price * run.gpu_hours,
    )


def lines_of(summary: Summary) -> list[tuple[str, str]]:
    """Name and value of every figure, as people read it."""
    run = summary.run
    lines = [("rows", f"{summary.rows:,}"), ("error rows", f"{summary.error_rows:,}")]
    lines += [(f"  {code}", f"{rows:,}") for code, rows in sorted(summary.errors.items())]
    if run.rows:
        seconds = run.engine_s or run.elapsed_s
        lines += [
            ("batch size (rows of this run)", f"{run.rows:,}"),
            ("total seconds", f"{run.elapsed_s:,.1f}"),
            ("seconds with an engine", f"{seconds:,.1f}"),
            ("seconds to the first part", f"{run.first_part_s or 0:,.1f}"),
            ("requests/s", f"{run.rows / seconds:,.2f}"),
            ("total tokens", f"{summary.run_tokens:,}"),
            ("tokens/s", f"{summary.run_tokens / seconds:,.1f}"),
            ("prompt tokens/s", f"{run.prompt_tokens / seconds:,.1f}"),
            ("output tokens/s", f"{run.completion_tokens / seconds:,.1f}"),
        ]
    if summary.cost is not None:
        lines.append(("cost", f"{summary.cost:,.2f}"))
    if summary.cost_per_million_tokens is not None:
        lines.append(("cost per million tokens", f"{summary.cost_per_million_tokens:,.4f}"))
    return lines


def print_summary(console: Console, summary: Summary) -> None:
    """Show a finished job: the figures that single-GPU runs are published with."""
    table = Table("", "", title=f"plan {summary.plan_id}", show_header=False)
    table.columns[1].justify = "right"
    for name, value in lines_of(summary):
        table.add_row(name, value)
    console.print(table)
    console.print(f"answers: {summary.output}")
    console.print(f"report:  {summary.report}")
