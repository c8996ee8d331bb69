"""What `--dry-run` prints: the plan in figures, how the engine fits, and what the job may cost."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from phi4ray import memory
from phi4ray.batch.plan import Plan
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.errors import ConfigError
from phi4ray.fit import needs_no_plan
from phi4ray.gpus import GIB
from phi4ray.roofline import Workload
from phi4ray.sizing import JobEstimate, estimate_job, roofline_of

CHARS_PER_TOKEN = 4
"""Of English text with a vocabulary of 100,000 tokens: a rule of thumb, and only that."""

SHOWN_FILES = 5


def describe_plan(config: BatchConfig, plan: Plan, console: Console, cards: Sequence[str]) -> None:
    """Print files, rows, shards, estimated tokens, and for each card memory, hours and cost.

    Where memory cannot be planned, that is said and no error; `phi4ray.fit.refuse_misfit` is what
    refuses an engine.
    """
    console.print(_table(f"plan {plan.plan_id}", plan_lines(config, plan)))
    for item in plan.inputs[:SHOWN_FILES]:
        console.print(f"  {item.uri}: {item.rows:,} rows, {item.size:,} bytes")
    if len(plan.inputs) > SHOWN_FILES:
        console.print(f"  and {len(plan.inputs) - SHOWN_FILES:,} more files")
    for card in cards or (None,):
        try:
            fit = fit_on(config.engine, card)
        except ConfigError as error:
            console.print(f"memory not planned: {error}")
            continue
        console.print(_table(f"memory of one GPU ({card})", memory_lines(fit)))
        console.print(_table(f"the job ({card}), by estimate", job_lines(config, plan, fit)))
    console.print("dry run: nothing was written")


class Fit(NamedTuple):
    """An engine on a card, and where the memory of that card goes."""

    card: str
    placement: memory.Placement
    budget: memory.MemoryPlan


def fit_on(engine: EngineConfig, card: str | None) -> Fit:
    """Plan the memory of an engine on a card.

    Raises:
        ConfigError: why it cannot be planned.
    """
    if reason := needs_no_plan(engine):
        raise ConfigError(reason)
    if card is None:
        raise ConfigError("no GPU is known: name one with --gpu, as h200")
    placement = memory.place_engine(engine, card)
    return Fit(card, placement, memory.budget(placement))


def plan_lines(config: BatchConfig, plan: Plan) -> list[tuple[str, str]]:
    """Name and value of the plan's figures."""
    duplicates = f"{plan.duplicate_ids:,}"
    if plan.duplicate_example:
        duplicates += f" (first: {plan.duplicate_example})"
    limit = _answer_limit(config)
    answers = "as long as the model makes them: set max_tokens to bound them"
    if limit is not None:
        answers = f"at most {plan.rows * limit:,}, where rows set no limit themselves"
    return [
        ("files", f"{len(plan.inputs):,}"),
        ("rows", f"{plan.rows:,}"),
        ("rows that repeat an id", duplicates),
        ("parts", f"{len(plan.shards):,}"),
        ("rows of the largest part", f"{max((s.rows for s in plan.shards), default=0):,}"),
        ("estimated prompt tokens", f"{plan.prompt_bytes // CHARS_PER_TOKEN:,}"),
        ("answer tokens", answers),
        ("output", config.output),
    ]


def memory_lines(fit: Fit) -> list[tuple[str, str]]:
    """Where the memory of one GPU goes; where that is not enough, why not."""
    placement, plan = fit.placement, fit.budget
    gib = {
        "total": plan.total_bytes,
        "usable": plan.usable_bytes,
        f"weights ({placement.weights})": plan.weight_bytes,
        "activations": plan.activation_bytes,
        "runtime and CUDA graphs": plan.non_torch_bytes + plan.cuda_graph_bytes,
        "KV cache": plan.kv_cache_bytes,
    }
    lines = [
        *((name, f"{size / GIB:.2f} GiB") for name, size in gib.items()),
        ("KV cache, tokens", f"{plan.kv_cache_size_tokens:,}"),
        (f"requests of {plan.max_model_len:,} tokens at once", f"{plan.max_concurrency:.2f}"),
    ]
    if not plan.fits:
        lines.append(("by estimate", memory.why_not(placement)))
    return lines


def job_lines(config: BatchConfig, plan: Plan, fit: Fit) -> list[tuple[str, str]]:
    """Hours, GPU hours and cost of the rows by the replica's roofline, engines' start included.

    From answers of one token each to answers as long as `max_tokens` lets them be; where nothing
    limits them, the latter is not known.
    """
    placement, budget = fit.placement, fit.budget
    if not plan.rows or not budget.fits:
        return [("not estimated", "there are no rows" if budget.fits else "it does not fit")]
    prompt = plan.prompt_bytes // CHARS_PER_TOKEN // plan.rows
    prompt = min(max(1, prompt), budget.max_model_len - 1)
    limit = _answer_limit(config)
    longest = None if limit is None else max(1, min(limit, budget.max_model_len - prompt))
    replicas = config.max_replicas or config.min_replicas
    roofline = roofline_of(placement, fit.card)

    def job(answer: int) -> JobEstimate:
        work = Workload(prompt_tokens=prompt, completion_tokens=answer)
        return estimate_job(
            roofline, work, placement.max_num_seqs, budget.kv_cache_size_tokens,
            rows=plan.rows, replicas=replicas, gpu_hour_price=config.gpu_hour_price,
        )  # fmt: skip

    jobs = [job(answer) for answer in sorted({1, longest or 1})]
    more = " and more" if longest is None else ""

    def span(figures: Sequence[float]) -> str:
        return " to ".join(f"{figure:,.2f}" for figure in figures) + more

    answers = f"1 to {longest:,}" if longest else "1 and more: set max_tokens to bound them"
    lines = [
        ("tokens of a prompt, on average", f"{prompt:,}"),
        ("tokens of an answer", answers),
        ("replicas", f"{replicas:,}"),
        ("hours", span([one.hours for one in jobs])),
        ("GPU hours", span([one.gpu_hours for one in jobs])),
    ]
    if costs := [one.cost for one in jobs if one.cost is not None]:
        lines.append(("cost", span(costs)))
    return lines


def _answer_limit(config: BatchConfig) -> int | None:
    """The most tokens of an answer, as far as the job and not the row says so."""
    if config.endpoint == "/v1/embeddings":
        return 1
    sampling = config.sampling
    limit = sampling.get("max_completion_tokens") or sampling.get("max_tokens")
    return limit if isinstance(limit, int) else None


def _table(title: str, lines: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in lines:
        table.add_row(name, value)
    return table
