"""Making a job's plan, or finding it: lists and scans the inputs, writes `_plan.json` once."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from phi4ray.batch.carried import carried_schema, encode_schema
from phi4ray.batch.executor import Executor
from phi4ray.batch.identity import check_same_job, identity_of
from phi4ray.batch.plan import (
    PLAN_NAME,
    Input,
    Plan,
    Slice,
    is_answer,
    make_plan,
    pack,
    read_plan,
    take,
)
from phi4ray.batch.scan import (
    Cut,
    Ids,
    Scan,
    Unit,
    check_columns,
    duplicates,
    number_rows,
    scan_unit,
    units_of,
)
from phi4ray.config import BatchConfig
from phi4ray.errors import ConfigError, InputError, ObjectNotFoundError, PreconditionError
from phi4ray.fingerprint import fingerprint
from phi4ray.storage import TEMPORARY, expand, join, storage_for


def obtain_plan(
    config: BatchConfig,
    executor: Executor,
    *,
    dry_run: bool = False,
    tell: Callable[[str], object] = lambda line: None,
) -> Plan:
    """The plan under the output prefix if it is this job's, else a new one, written there.

    `tell` is told of files among the inputs that are none.

    Raises:
        PlanMismatchError: the plan there is another job's.
        StorageError: the output cannot be written; told before the inputs are scanned.
    """
    inputs = list_inputs(config, tell)
    identity = identity_of(config, chat_template_text(config), fingerprint(config.engine))
    uri = join(config.output, PLAN_NAME)
    try:
        plan = stored_plan(config.output)
    except ObjectNotFoundError:
        if not dry_run:
            check_writable(config.output)
        plan = scan_inputs(config, inputs, identity, executor)
        if dry_run:
            return plan
        # Another driver may be faster; what is read back tells whether it has the same job.
        with contextlib.suppress(PreconditionError):
            storage_for(uri).write_new(uri, plan.model_dump_json().encode())
        plan = stored_plan(config.output)
    check_same_job(plan, identity, inputs)
    return plan


def stored_plan(output: str) -> Plan:
    """The plan that lies below an output prefix.

    Raises:
        ObjectNotFoundError: there is none.
        ConfigError: it cannot be used; see `read_plan`.
    """
    uri = join(output, PLAN_NAME)
    return read_plan(storage_for(uri).read(uri), uri)


def check_writable(output: str) -> None:
    """Write an object below an output prefix and remove it again: a scan may take hours.

    Raises:
        StorageError: it cannot be written.
    """
    uri = join(output, f"{TEMPORARY}check")
    storage = storage_for(uri)
    storage.write(uri, b"")
    storage.delete(uri)


def check_shared(config: BatchConfig, plan: Plan, node: str) -> None:
    """Refuse an output folder that is another one on this node than where the plan was written.

    Its parts would be found by nobody. An object store is one for all nodes.

    Raises:
        ConfigError: says what to do.
    """
    uri = join(config.output, PLAN_NAME)
    if uri.startswith("s3://"):
        return
    try:
        found = stored_plan(config.output).plan_id
    except ObjectNotFoundError:
        found = None
    if found != plan.plan_id:
        raise ConfigError(
            f"on node {node} {uri} is not this job's: its output is a folder that this node does "
            "not share with the machine that started the job. Use an --output on s3://, or on a "
            "file system that all nodes mount at one path"
        )


def list_inputs(
    config: BatchConfig, tell: Callable[[str], object] = lambda line: None
) -> list[Input]:
    """The input objects, in order. What an earlier run of the job wrote is none of them.

    Raises:
        ConfigError: answers would be written among the inputs.
        InputError: a pattern matches nothing, or a name cannot be written down.
    """
    output = join(config.output, "")
    inputs = [
        Input(uri=item.uri, size=item.size, etag=item.etag)
        for item in expand(config.input, tell=tell)
        if not (item.uri.startswith(output) and is_answer(item.uri.removeprefix(output)))
    ]
    for item in inputs:
        try:
            item.uri.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"input {item.uri!a}: its name is not UTF-8: rename it") from error
        if item.uri.startswith(output):
            raise ConfigError(
                f"input {item.uri} lies under the output prefix: use another --output"
            )
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
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template {template!r} cannot be read: {error}") from error
    return template


def scan_inputs(
    config: BatchConfig, inputs: Sequence[Input], identity: Mapping[str, Any], executor: Executor
) -> Plan:
    """Scan all inputs and cut them into shards."""
    cut = Cut(
        config.shard_rows,
        int(config.shard_mib * (1 << 20)),
        int(config.max_row_mib * (1 << 20)),
        config.max_columns,
    )
    units = list(units_of(inputs))
    scans = list(_scans(config, inputs, units, cut, executor))
    slices = list(take(number_rows(scans), config.limit))
    repeated, pair = duplicates(_ids(scans)[: sum(piece.rows for piece in slices)])
    carried = carried_schema(
        [scan.kinds for scan in scans],
        [scan.schema for scan in scans if scan.schema is not None],
    )
    check_columns("the inputs together", len(carried), cut.max_columns)
    return make_plan(
        identity,
        inputs,
        list(pack(slices, cut.rows, cut.bytes)),
        carried=encode_schema(carried),
        folder="" if config.output_format == "parquet" else "_parts/",
        duplicate_ids=repeated,
        duplicate_example=" and ".join(_place(inputs, slices, row) for row in pair or ()) or None,
        prompt_bytes=sum(piece.size for piece in slices),
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
    scan_one = partial(_scan_one, cut, config.limit)
    for scan in executor.map(scan_one, ((inputs[unit.file], unit) for unit in units)):
        yield scan
        rows += scan.rows
        if config.limit is not None and rows >= config.limit:
            return


def _ids(scans: Sequence[Scan]) -> Ids:
    """The digests of all rows; none at all, and no memory for them, if no row has an id."""
    if not any(len(scan.ids) for scan in scans):
        return np.zeros(0, np.uint64)
    return np.concatenate(
        [scan.ids if len(scan.ids) else np.zeros(scan.rows, np.uint64) for scan in scans]
    )


def _scan_one(cut: Cut, limit: int | None, piece: tuple[Input, Unit]) -> Scan:
    return scan_unit(*piece, cut, limit)


def _place(inputs: Sequence[Input], slices: Sequence[Slice], row: int) -> str:
    for piece in slices:
        if row < piece.rows:
            return f"{inputs[piece.file].uri}#{piece.row_start + row}"
        row -= piece.rows
    raise AssertionError("ids are counted by slices")
