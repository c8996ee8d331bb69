"""What `--dry-run` prints: the plan in figures, and whether the engine would fit."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from phi4ray import memory
from phi4ray.batch.plan import Plan
from phi4ray.config import BatchConfig
from phi4ray.errors import ConfigError
from phi4ray.gpus import GIB

CHARS_PER_TOKEN = 4
"""Of English text with a vocabulary of 100,000 tokens: a rule of thumb, and only that."""

SHOWN_FILES = 5


def describe_plan(config: BatchConfig, plan: Plan, console: Console, gpu: str | None) -> None:
    """Print files, rows, shards, estimated tokens, and the memory of one replica on a GPU.

    Where memory cannot be planned, that is said and no error.

    Raises:
        ConfigError: the engine certainly cannot fit; the message says what would.
    """
    console.print(_table(f"plan {plan.plan_id}", plan_lines(config, plan)))
    for item in plan.inputs[:SHOWN_FILES]:
        console.print(f"  {item.uri}: {item.rows:,} rows, {item.size:,} bytes")
    if len(plan.inputs) > SHOWN_FILES:
        console.print(f"  and {len(plan.inputs) - SHOWN_FILES:,} more files")
    reason = not_planned(config, gpu)
    if reason or gpu is None:
        console.print(f"memory not planned: {reason}")
    else:
        console.print(_table(f"memory of one GPU ({gpu})", memory_lines(config, gpu)))
    console.print("dry run: nothing was written")


def plan_lines(config: BatchConfig, plan: Plan) -> list[tuple[str, str]]:
    """Name and value of the plan's figures."""
    duplicates = f"{plan.duplicate_ids:,}"
    if plan.duplicate_example:
        duplicates += f" (first: {plan.duplicate_example})"
    limit = config.sampling.get("max_completion_tokens") or config.sampling.get("max_tokens")
    answers = "as long as the model makes them: set max_tokens to bound them"
    if isinstance(limit, int):
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


def memory_lines(config: BatchConfig, gpu: str) -> list[tuple[str, str]]:
    """Where the memory of one GPU goes.

    Raises:
        ConfigError: it cannot be planned (see `not_planned`), or weights and KV cache alone are
            too large. A lack that rests on estimates is told in a line.
    """
    placement = memory.place_engine(config.engine, gpu)
    certain = memory.cannot_fit(placement)
    plan = memory.plan_memory(placement) if certain else memory.budget(placement)
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


def not_planned(config: BatchConfig, gpu: str | None) -> str | None:
    """Why the memory of this job's engine cannot be planned; None if it can."""
    if config.engine.kind == "fake":
        return "the fake engine needs none"
    if gpu is None:
        return "the recipe names no GPU"
    try:
        memory.place_engine(config.engine, gpu)
    except ConfigError as error:
        return str(error)
    return None


def _table(title: str, lines: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in lines:
        table.add_row(name, value)
    return table
