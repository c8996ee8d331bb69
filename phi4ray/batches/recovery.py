"""Answers of another version of phi4ray, whose plan or parts this one cannot read as its own.

The rows of a batch have the same numbers under every plan: a new plan's parts are made of them.
"""

import io
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from phi4ray.batch.executor import threaded
from phi4ray.batch.parts import (
    COLUMNS,
    Receipt,
    Result,
    make_receipt,
    part_table,
    read_receipt,
    write_part,
)
from phi4ray.batch.plan import Plan
from phi4ray.errors import IncompleteOutputError
from phi4ray.storage import join, storage_for

NEEDED = frozenset({"id", "source_file", "source_row", "response", "error_code", "error_message"})
"""Of a part's columns, what the lines of a batch's files are made of."""

_PART = re.compile(r"(_parts/)?part-\d{6,}-[0-9a-f]{12}\.parquet")

logger = logging.getLogger(__name__)


def recover(output: str, plan: Plan) -> dict[int, Receipt]:
    """The receipts of a plan's parts by shard, after all others were made into parts of it.

    What cannot be read at all is removed, and pending again. For plans of one input. Costs one
    footer a part, and where there are others, reading these twice.
    """
    storage, prefix = storage_for(output), join(output, "")
    names = [item.uri.removeprefix(prefix) for item in storage.list(output)]
    parts = {name: plan.shard_of(name) for name in names if _PART.fullmatch(name)}
    own = {name: shard for name, shard in parts.items() if shard is not None}
    read = threaded(lambda shard: _receipt(output, plan, shard), own.values())
    receipts = {receipt.shard: receipt for receipt in read if receipt is not None}
    others = [name for name, shard in parts.items() if shard not in receipts]
    if not others:
        return receipts
    holders = {row: name for name in others for row in _numbers(output, name)}
    for shard in plan.shards:
        rows = [
            number
            for piece in shard.slices
            for number in range(piece.row_start, piece.row_start + piece.rows)
        ]
        if shard.index in receipts or not holders.keys() >= set(rows):
            continue
        held = {
            result.source_row: result
            for name in dict.fromkeys(holders[row] for row in rows)
            for result in _results(output, name)
        }
        if held.keys() >= set(rows):
            results = [held[row] for row in rows]
            now_s = time.time()
            receipt = make_receipt(plan.plan_id, shard.index, results, now_s, now_s)
            table = part_table(results, pa.table({}), receipt)
            receipts[shard.index] = write_part(output, plan, table, replacing=True)
    logger.warning(
        "%s: of %d parts of another version, %d of this plan's %d parts were made or found",
        output, len(others), len(receipts), len(plan.shards),
    )  # fmt: skip
    # Under the plan's own names they would be taken for its parts.
    for name, index in own.items():
        if index not in receipts:
            storage.delete(join(output, name))
    return receipts


def _receipt(output: str, plan: Plan, shard: int) -> Receipt | None:
    try:
        receipt = read_receipt(output, plan, shard)
    except IncompleteOutputError:
        return None
    return receipt if receipt.rows == plan.shards[shard].rows else None


def _numbers(output: str, name: str) -> list[int]:
    return [row["source_row"] for row in _read(output, name, ["source_row"])]


def _results(output: str, name: str) -> Iterator[Result]:
    for row in _read(output, name, COLUMNS.names):
        yield Result(**row)


def _read(output: str, name: str, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of a part, of those columns that it has; none if it has no answers to read."""
    uri = join(output, name)
    data = storage_for(uri).read(uri)
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        if missing := NEEDED - set(file.schema_arrow.names):
            raise KeyError(*missing)
        fields = [COLUMNS.field(one) for one in columns if one in file.schema_arrow.names]
        table = file.read(columns=[field.name for field in fields])
        rows: list[dict[str, Any]] = table.cast(pa.schema(fields)).to_pylist()
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        logger.warning("%s has no answers that can be read: %s", uri, error)
        return []
    return rows
