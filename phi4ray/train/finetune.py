"""A fine-tune from chats to a checkpoint that vLLM serves, and again after any failure.

<output>/
    _finetune.json    what it is a fine-tune of: inputs, settings, and their digest
    _tokens.parquet   the chats as tokens, all but the answers masked
    _refused.jsonl    rows that are not learned from: file, row, field, reason
    _checkpoints/     the newest whole ones
    adapter/          the LoRA adapter
    model/            the checkpoint to serve, adapters merged
    _history.json     the loss curve
    _report.html
    _SUCCESS          all of the above is there
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from rich.console import Console

from phi4ray.batch.plan import Input
from phi4ray.engines import on_this_machine
from phi4ray.errors import InputError, ObjectNotFoundError, TooManyErrorsError
from phi4ray.storage import join, storage_for
from phi4ray.train.chats import Refused, read_chats
from phi4ray.train.config import FinetuneConfig
from phi4ray.train.curve import HISTORY_NAME, Point, decode_history
from phi4ray.train.host import Host
from phi4ray.train.plan import FinetunePlan, find_plan, keep_plan, list_chats
from phi4ray.train.progress import Progress
from phi4ray.train.report import REPORT_NAME, render_report
from phi4ray.train.tokenizer import load_tokenizer
from phi4ray.train.tokens import count_tokens, tokenize, write_tokens

SUCCESS_NAME = "_SUCCESS"
REFUSED_NAME = "_refused.jsonl"
MODEL = "model"
SHOWN = 10


@dataclass(frozen=True, slots=True)
class FinetuneSummary:
    """What a fine-tune came to. `model` is the URI of the checkpoint to serve."""

    model: str
    report: str
    plan: FinetunePlan
    points: Sequence[Point]


def finetune(config: FinetuneConfig, host: Host, console: Console) -> FinetuneSummary:
    """Train, or go on where a run before this one was interrupted.

    Raises:
        ConfigError: the model, its tokenizer or an argument does not fit.
        InputError: an input cannot be read, or nothing in it can be learned from.
        TooManyErrorsError: more rows are refused than `max_error_fraction` allows.
        PlanMismatchError: the output prefix belongs to another fine-tune.
        DivergedError: the loss or the weights are no numbers any more.
        StorageError: the store refused or failed.
        ClusterError: workers were lost more often than `max_failures`.
    """
    inputs = list_chats(config, console.print)
    plan = find_plan(config, inputs) or _prepare(config, inputs, console)
    console.print(
        f"{plan.chats:,} chats, {plan.tokens:,} tokens, {plan.answer_tokens:,} of them in answers"
    )
    if not _exists(join(config.output, SUCCESS_NAME)):
        with Progress(console) as progress:
            for point in host.train(config):
                if point is not None:
                    progress.update(point, time.monotonic())
    return _finish(config, plan)


def _prepare(config: FinetuneConfig, inputs: Sequence[Input], console: Console) -> FinetunePlan:
    """Tokenize the chats and keep them; the plan comes last, and says that all of it is there."""
    tokenizer = load_tokenizer(on_this_machine(config.model, weights=False), config.pad_token)
    console.print(f"padding with {tokenizer.pad_token}; answers end with {tokenizer.eos_token}")
    table, refused = tokenize(read_chats(inputs), tokenizer, config.max_length_tokens)
    _check(config, len(table), refused)
    for row in refused[:SHOWN]:
        console.print(f"refused: {row}", style="yellow")
    lines = "".join(f"{json.dumps(asdict(row), ensure_ascii=False)}\n" for row in refused)
    uri = join(config.output, REFUSED_NAME)
    storage_for(uri).write(uri, lines.encode())
    write_tokens(config.output, table)
    tokens, answer_tokens = count_tokens(table)
    return keep_plan(
        config,
        inputs,
        chats=len(table),
        refused=len(refused),
        tokens=tokens,
        answer_tokens=answer_tokens,
    )


def _check(config: FinetuneConfig, chats: int, refused: Sequence[Refused]) -> None:
    total = chats + len(refused)
    if len(refused) > config.max_error_fraction * total:
        listed = "\n".join(f"  {row}" for row in islice(refused, SHOWN))
        more = f"\n  and {len(refused) - SHOWN:,} more" if len(refused) > SHOWN else ""
        raise TooManyErrorsError(
            f"{len(refused):,} of {total:,} rows cannot be learned from:\n{listed}{more}\n"
            "Mend them, or let max_error_fraction allow that they are left out."
        )
    if not chats:
        raise InputError(f"there is no chat to learn from in {', '.join(config.input)}")


def _finish(config: FinetuneConfig, plan: FinetunePlan) -> FinetuneSummary:
    """Write the report, and then that everything is there."""
    uri = join(config.output, HISTORY_NAME)
    points = decode_history(storage_for(uri).read(uri))
    report = join(config.output, REPORT_NAME)
    storage_for(report).write(report, render_report(config, plan, points).encode())
    done = join(config.output, SUCCESS_NAME)
    storage_for(done).write(done, b"")
    return FinetuneSummary(join(config.output, MODEL), report, plan, points)


def _exists(uri: str) -> bool:
    try:
        storage_for(uri).head(uri)
    except ObjectNotFoundError:
        return False
    return True
