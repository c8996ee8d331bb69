"""Scanning inputs: how many rows there are, where to cut them, and what columns are carried.

Work is cut into units (a file, or 64 MiB of a plain JSONL file) that can be scanned anywhere and
in any order. A line belongs to the unit in which it starts.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from phi4ray.batch.carried import json_kind
from phi4ray.batch.files import (
    compression,
    is_parquet,
    open_lines,
    open_parquet,
    read_batches,
    records_of,
    request_columns,
    row_of,
)
from phi4ray.batch.plan import Input, Slice
from phi4ray.batch.rows import decode_line, record_id, request_members
from phi4ray.errors import InputError
from phi4ray.protocol import Json, RowError
from phi4ray.storage import storage_for

UNIT_BYTES = 64 << 20

Ids = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of scanning: bytes `[start, end)` of input `file`; all of it if not plain JSONL."""

    file: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Where slices are cut: at most so many rows, and so many bytes unless one row has more."""

    rows: int
    bytes: int


@dataclass(slots=True)
class Scan:
    """What one unit holds. Slices have no `row_start` yet: units do not know their neighbours.

    `ids` has one digest a row, 0 for rows without an id. `kinds` are the JSON types seen of each
    carried member; `schema` the carried columns of a Parquet file.
    """

    slices: list[Slice] = field(default_factory=list)
    ids: Ids = field(default_factory=lambda: np.zeros(0, np.uint64))
    kinds: dict[str, set[str]] = field(default_factory=dict)
    schema: pa.Schema | None = None


def units_of(inputs: Sequence[Input], unit_bytes: int = UNIT_BYTES) -> Iterator[Unit]:
    """Cut the inputs into units, in order."""
    for index, item in enumerate(inputs):
        if is_parquet(item.uri) or compression(item.uri):
            yield Unit(index, 0, item.size)
        else:
            for start in range(0, item.size, unit_bytes):
                yield Unit(index, start, min(start + unit_bytes, item.size))


def scan_unit(item: Input, unit: Unit, cut: Cut, limit: int | None = None) -> Scan:
    """Scan one unit, or its first `limit` rows.

    Raises:
        InputError: the file is not what its name claims.
    """
    if is_parquet(item.uri):
        return _scan_parquet(item, unit, cut)
    if compression(item.uri):
        rows: Iterator[Row] = ((line, 0, 0, len(line) + 1) for line in open_lines(item))
    else:
        rows = _plain_rows(item, unit)
    return _scan_lines(rows, unit, cut, limit)


Row = tuple[bytes, int, int, int]
"""A line, its first byte, the byte after it, and its size."""


def _plain_rows(item: Input, unit: Unit) -> Iterator[Row]:
    with storage_for(item.uri).open(item.uri, etag=item.etag) as stream:
        at = unit.start
        if at:  # a line that starts before the unit belongs to the unit before
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
        while at < unit.end and (line := stream.readline()):
            start, at = at, at + len(line)
            if (row := row_of(line)) is not None:
                yield row, start, at, at - start


def _scan_lines(rows: Iterable[Row], unit: Unit, cut: Cut, limit: int | None) -> Scan:
    scan = Scan()
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    ids: list[int] = []
    count = first = last = size = 0
    for line, start, end, length in rows:
        if count and (count == cut.rows or size + length > cut.bytes):
            scan.slices.append(_slice(unit, count, first, last, size))
            count = size = 0
        if not count:
            first = start
        count, last, size = count + 1, end, size + length
        record = decode_line(line)
        ids.append(_digest(record))
        if not isinstance(record, RowError):
            for name in record.keys() - request_members(record):
                kinds[name].add(json_kind(record[name]))
        if len(ids) == limit:
            break
    if count:
        scan.slices.append(_slice(unit, count, first, last, size))
    scan.ids = np.array(ids, np.uint64)
    scan.kinds = dict(kinds)
    return scan


def _slice(unit: Unit, rows: int, start: int, end: int, size: int) -> Slice:
    return Slice(file=unit.file, row_start=0, rows=rows, start=start, end=end, size=size)


def _scan_parquet(item: Input, unit: Unit, cut: Cut) -> Scan:
    file = open_parquet(item)
    schema = file.schema_arrow
    if not {"prompt", "messages", "body"} & set(schema.names):
        raise InputError(
            f"{item.uri} has no column 'prompt', 'messages' or 'body'; "
            f"it has {', '.join(schema.names) or 'none'}"
        )
    if repeated := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise InputError(f"{item.uri} has more than one column {repeated[0]!r}: rename them")
    own = request_columns(schema.names)
    total, groups = file.metadata.num_rows, file.metadata.num_row_groups
    size = sum(file.metadata.row_group(group).total_byte_size for group in range(groups))
    a_row = max(1, size // max(1, total))
    step = max(1, min(cut.rows, cut.bytes // a_row))
    digests: list[int] = []
    if names := [name for name in ("custom_id", "id") if name in schema.names]:
        for batch in read_batches(item, file, names):
            digests += map(_digest, records_of(pa.Table.from_batches([batch]).select(names)))
    return Scan(
        slices=[
            _slice(unit, min(step, total - row), 0, 0, a_row * min(step, total - row))
            for row in range(0, total, step)
        ],
        ids=np.array(digests, np.uint64) if digests else np.zeros(total, np.uint64),
        schema=pa.schema([column for column in schema if column.name not in own]),
    )


def _digest(record: Json | RowError) -> int:
    identifier = None if isinstance(record, RowError) else record_id(record)
    if identifier is None:
        return 0
    digest = hashlib.blake2b(identifier.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def number_rows(scans: Iterable[Scan]) -> Iterator[Slice]:
    """Give every slice its place in its file; scans come in the order of their units."""
    next_row: defaultdict[int, int] = defaultdict(int)
    for scan in scans:
        for piece in scan.slices:
            yield piece.model_copy(update={"row_start": next_row[piece.file]})
            next_row[piece.file] += piece.rows


def duplicates(ids: Ids) -> tuple[int, tuple[int, int] | None]:
    """How many rows repeat an earlier row's id, and the places of the first such pair."""
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    repeats = np.flatnonzero((ranked[1:] == ranked[:-1]) & (ranked[1:] != 0))
    if not len(repeats):
        return 0, None
    at = int(repeats[0])
    return len(repeats), (int(order[at]), int(order[at + 1]))
