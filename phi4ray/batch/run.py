"""The batch job, from inputs to `_SUCCESS`, readable from top to bottom.

    inputs → plan → pending shards → executor → parts → receipts added up → manifest → _SUCCESS

Nothing here knows Ray or vLLM. Every step may be cut off at any point and run again.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from pydantic_core import to_json
from rich.console import Console

from phi4ray.batch.executor import Executor, threaded
from phi4ray.batch.export import export_part
from phi4ray.batch.files import encode_schema
from phi4ray.batch.manifest import Manifest, PartEntry
from phi4ray.batch.parts import Receipt, read_receipt
from phi4ray.batch.plan import (
    MANIFEST_NAME,
    PLAN_NAME,
    REPORT_NAME,
    SUCCESS_NAME,
    Input,
    Plan,
    check_same_job,
    identity_of,
    make_plan,
    pack,
    read_plan,
    take,
)
from phi4ray.batch.progress import Progress, Snapshot
from phi4ray.batch.report import RunFacts, Summary, render_report, summarize
from phi4ray.batch.scan import (
    Cut,
    Scan,
    Unit,
    carried_schema,
    duplicates,
    number_rows,
    scan_unit,
    units_of,
)
from phi4ray.config import BatchConfig
from phi4ray.errors import (
    ConfigError,
    IncompleteOutputError,
    ObjectNotFoundError,
    PreconditionError,
    TooManyErrorsError,
)
from phi4ray.storage import ObjectInfo, expand, join, storage_for

MIN_ROWS_FOR_FRACTION = 100
"""`max_error_fraction` is judged from so many finished rows on, or at the end of the job."""


def run_batch(config: BatchConfig, executor: Executor, console: Console) -> Summary:
    """Run or resume a job; returns when `_SUCCESS` is written.

    Raises:
        ConfigError, InputError: nothing was started.
        PlanMismatchError: the output prefix holds another job's answers.
        TooManyErrorsError: stopped by `max_error_fraction`; finished parts stay.
        EngineError, StorageError, ClusterError: the same command goes on from the finished parts.
    """
    plan = obtain_plan(config, executor)
    if plan.duplicate_ids:
        console.print(
            f"[yellow]{plan.duplicate_ids:,} rows repeat an id ({plan.duplicate_example}); each "
            "is answered: tell them apart by source_file and source_row"
        )
    parts = list_parts(config.output, plan)
    finished = len(parts) == len(plan.shards)
    if config.retry_errors:
        if not finished:
            raise ConfigError("retry_errors needs a finished job: run it without, first")
        receipts = threaded(partial(read_receipt, config.output, plan), sorted(parts))
        pending = [receipt.shard for receipt in receipts if receipt.error_rows]
        storage_for(config.output).delete(join(config.output, SUCCESS_NAME))
    else:
        pending = [shard.index for shard in plan.shards if shard.index not in parts]
    console.print(
        f"plan {plan.plan_id}: {plan.rows:,} rows of {len(plan.inputs):,} files in "
        f"{len(plan.shards):,} parts, {len(plan.shards) - len(pending):,} of them done"
    )
    run = _answer(config, plan, pending, executor, console) if pending else RunFacts()
    return finalize(config, plan, executor, run)


def obtain_plan(config: BatchConfig, executor: Executor, *, dry_run: bool = False) -> Plan:
    """The plan under the output prefix if it is this job's, else a new one, written there.

    Raises:
        PlanMismatchError: the plan there is another job's.
    """
    inputs = list_inputs(config)
    identity = identity_of(config, chat_template_text(config))
    uri = join(config.output, PLAN_NAME)
    storage = storage_for(uri)
    try:
        plan = read_plan(storage.read(uri), uri)
    except ObjectNotFoundError:
        plan = scan_inputs(config, inputs, identity, executor)
        if dry_run:
            return plan
        try:
            storage.write_new(uri, plan.model_dump_json().encode())
        except PreconditionError:
            pass  # another driver was faster; below we see whether it has the same job
        plan = read_plan(storage.read(uri), uri)
    check_same_job(plan, identity, inputs)
    return plan


def list_inputs(config: BatchConfig) -> list[Input]:
    """The input objects, in order.

    Raises:
        ConfigError: answers would be written among the inputs.
        InputError: a pattern matches nothing.
    """
    output = join(config.output, "")
    inputs = [Input(uri=o.uri, size=o.size, etag=o.etag) for o in expand(config.input)]
    for item in inputs:
        if item.uri.startswith(output):
            raise ConfigError(f"input {item.uri} lies under the output prefix: use another --output")
    for pattern in config.input:
        if output.startswith(join(pattern, "")):
            raise ConfigError(
                f"the output prefix lies under the input {pattern}: the next run would take "
                "answers for prompts. Use another --output, or a glob such as */prompts/*.jsonl"
            )
    return inputs


def chat_template_text(config: BatchConfig) -> str | None:
    """The text of the job's chat template, read if the job names a file."""
    template = config.engine.chat_template
    if template is not None and "{" not in template:
        try:
            return Path(template).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"chat_template {template!r} cannot be read: {error}") from error
    return template


def scan_inputs(
    config: BatchConfig, inputs: Sequence[Input], identity: dict[str, object], executor: Executor
) -> Plan:
    """Scan all inputs and cut them into shards."""
    cut = Cut(config.shard_rows, int(config.shard_mib * (1 << 20)))
    units = list(units_of(inputs))
    scans = list(_scans(config, inputs, units, cut, executor))
    slices = list(take(number_rows(scans), config.limit))
    repeated, pair = duplicates(
        np.concatenate([scan.ids for scan in scans])[: sum(piece.rows for piece in slices)]
        if scans
        else np.zeros(0, np.uint64)
    )
    folder = "" if config.output_format == "parquet" else "_parts/"
    return make_plan(
        identity,
        inputs,
        list(pack(slices, cut.rows, cut.bytes)),
        carried=encode_schema(carried_schema(scans)),
        folder=folder,
        duplicate_ids=repeated,
        duplicate_example=" and ".join(_place(inputs, slices, row) for row in pair or ()) or None,
        prompt_bytes=sum(scan.prompt_bytes for scan in scans),
    )


def _scans(
    config: BatchConfig,
    inputs: Sequence[Input],
    units: Sequence[Unit],
    cut: Cut,
    executor: Executor,
) -> Iterator[Scan]:
    """Scan units in order, and none after the job's limit."""
    rows = 0
    scan_one = partial(_scan_one, tuple(inputs), cut, config.limit)
    for scan in executor.map(scan_one, units):
        yield scan
        rows += len(scan.ids)
        if config.limit is not None and rows >= config.limit:
            return


def _scan_one(inputs: tuple[Input, ...], cut: Cut, limit: int | None, unit: Unit) -> Scan:
    return scan_unit(inputs[unit.file], unit, cut, limit)


def _place(inputs: Sequence[Input], slices: Sequence[object], row: int) -> str:
    for piece in slices:
        if row < piece.rows:  # type: ignore[attr-defined]
            return f"{inputs[piece.file].uri}#{piece.row_start + row}"  # type: ignore[attr-defined]
        row -= piece.rows  # type: ignore[attr-defined]
    return f"row {row}"


def list_parts(output: str, plan: Plan) -> dict[int, ObjectInfo]:
    """The parts of a plan that exist, by shard: one LIST."""
    prefix = join(output, "")
    found = {}
    for item in storage_for(output).list(output):
        shard = plan.shard_of(item.uri.removeprefix(prefix))
        if shard is not None:
            found[shard] = item
    return found


def _answer(
    config: BatchConfig,
    plan: Plan,
    pending: Sequence[int],
    executor: Executor,
    console: Console,
) -> RunFacts:
    """Have the pending shards answered, showing progress; returns what this run did."""
    started = time.monotonic()
    pending_rows = sum(plan.shards[index].rows for index in pending)
    resumed = plan.rows - pending_rows
    written = Tally(config, resumed)
    with Progress(console, config.progress_interval_s, label=plan.plan_id) as progress:
        for receipt in executor.run_shards(config, plan, pending):
            if receipt is not None:
                written.add(receipt)
            snapshot = written.snapshot(plan, len(pending), executor, time.monotonic() - started)
            progress.update(snapshot)
            written.check_errors(snapshot)
        return written.facts(time.monotonic() - started, progress.history)
