"""Scanning inputs: how many rows there are, where to cut them, and what columns are carried.

Work is cut into units (a file, or 64 MiB of a plain JSONL file) that can be scanned anywhere and
in any order. A line belongs to the unit in which it starts.
"""

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from phi4ray.batch.carried import json_kind
from phi4ray.batch.files import is_parquet, request_columns
from phi4ray.batch.lines import (
    MAX_ROW_BYTES,
    Line,
    compression,
    next_line,
    open_lines,
    skip_line,
)
from phi4ray.batch.parquet import (
    MAX_UNPACKED_BYTES,
    MAX_UNPACKED_RATIO,
    open_parquet,
    read_batches,
    records_of,
    unpacked_bytes,
)
from phi4ray.batch.plan import Input, Slice
from phi4ray.batch.rows import ID_COLUMNS, decode_line, own_limit, record_id, request_members
from phi4ray.errors import InputError
from phi4ray.protocol import Json, RowError
from phi4ray.storage import storage_for

UNIT_BYTES = 64 << 20

MAX_COLUMNS = 1000
"""Carried columns, where nobody says another number."""

Ids = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Unit:
    """One piece of scanning: bytes `[start, end)` of input `file`; all of it if not plain JSONL."""

    file: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Where slices are cut: at most so many rows, and so many bytes unless one row has more.

    Longer rows than `max_row_bytes` are not looked at, and files with more carried columns than
    `max_columns` are refused.
    """

    rows: int
    bytes: int
    max_row_bytes: int = MAX_ROW_BYTES
    max_columns: int = MAX_COLUMNS


@dataclass(slots=True)
class Scan:
    """What one unit holds. Slices have no `row_start` yet: units do not know their neighbours.

    `ids` has one digest a row, 0 for rows without an id; it is empty if no row has one. `kinds` are
    the JSON types seen of each carried member; `schema` the carried columns of a Parquet file.
    """

    slices: list[Slice] = field(default_factory=list)
    ids: Ids = field(default_factory=lambda: np.zeros(0, np.uint64))
    kinds: dict[str, set[str]] = field(default_factory=dict)
    schema: pa.Schema | None = None

    @property
    def rows(self) -> int:
        """How many rows the unit holds."""
        return sum(piece.rows for piece in self.slices)


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
        lines = open_lines(item, cut.max_row_bytes)
        rows: Iterator[Row] = (
            (line, 0, 0, len(line) + 1 if isinstance(line, bytes) else 0) for line in lines
        )
    else:
        rows = _plain_rows(item, unit, cut.max_row_bytes)
    return _scan_lines(item, rows, unit, cut, limit)


Row = tuple[Line, int, int, int]
"""A line, its first byte, the byte after it, and its size."""


def _plain_rows(item: Input, unit: Unit, max_row_bytes: int) -> Iterator[Row]:
    with storage_for(item.uri).open(item.uri, etag=item.etag) as stream:
        at = unit.start
        if at:  # a line that starts before the unit belongs to the unit before
            stream.seek(at - 1)
            at = skip_line(stream, at - 1, unit.end)
        while at < unit.end:
            line, size = next_line(stream, max_row_bytes)
            if not size:
                return
            start, at = at, at + size
            if line is not None:
                yield line, start, at, size


def _scan_lines(item: Input, rows: Iterable[Row], unit: Unit, cut: Cut, limit: int | None) -> Scan:
    scan = Scan()
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    ids = array("Q")  # of a whole file, if it is compressed
    count = first = last = size = longest = 0
    for line, start, end, length in rows:
        if count and (count == cut.rows or size + length > cut.bytes):
            scan.slices.append(_slice(unit, count, first, last, size, longest))
            count = size = longest = 0
        if not count:
            first = start
        count, last, size = count + 1, end, size + length
        record = decode_line(line)
        ids.append(_digest(record))
        if not isinstance(record, RowError):
            members = request_members(record)
            names = record.keys() - members
            check_columns(item.uri, len(names), cut.max_columns)
            longest = max(longest, own_limit(record, members))
            for name in names:
                kinds[name].add(json_kind(record[name]))
            check_columns(item.uri, len(kinds), cut.max_columns)
        if len(ids) == limit:
            break
    if count:
        scan.slices.append(_slice(unit, count, first, last, size, longest))
    if any(ids):
        scan.ids = np.array(ids, np.uint64)
    scan.kinds = dict(kinds)
    return scan


def check_columns(uri: str, columns: int, max_columns: int) -> None:
    """Refuse rows that would make a table too wide for any reader.

    Raises:
        InputError: they carry more different members than `max_columns`.
    """
    if columns > max_columns:
        raise InputError(
            f"{uri}: its rows have more than max_columns={max_columns:,} different members beside "
            "their requests, each of which would be a column of the output: put those whose names "
            "vary into one object, or allow more"
        )


def _slice(unit: Unit, rows: int, start: int, end: int, size: int, longest: int = 0) -> Slice:
    return Slice(
        file=unit.file, row_start=0, rows=rows, start=start, end=end, size=size, longest=longest
    )


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
    check_columns(item.uri, len(set(schema.names) - own), cut.max_columns)
    total, groups = file.metadata.num_rows, file.metadata.num_row_groups
    size = sum(file.metadata.row_group(group).total_byte_size for group in range(groups))
    a_row = max(1, size // max(1, total))
    step = max(1, min(cut.rows, cut.bytes // a_row))
    digests = array("Q")
    left = max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * item.size)
    if names := [name for name in ID_COLUMNS if name in schema.names]:
        for table in read_batches(item, file, names):
            left -= unpacked_bytes(table)
            if left < 0:
                raise InputError(
                    f"{item.uri} has ids that take more than {MAX_UNPACKED_RATIO} times its size: "
                    "give it shorter ones"
                )
            digests.extend(map(_digest, records_of(table.select(names))))
    return Scan(
        slices=[
            _slice(unit, min(step, total - row), 0, 0, a_row * min(step, total - row))
            for row in range(0, total, step)
        ],
        ids=np.array(digests if any(digests) else (), np.uint64),
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
    ranked = np.sort(ids)
    repeats = np.flatnonzero((ranked[1:] == ranked[:-1]) & (ranked[1:] != 0))
    if not len(repeats):  # which takes half the memory and time of finding their places
        return 0, None
    at, order = int(repeats[0]), np.argsort(ids, kind="stable")
    return len(repeats), (int(order[at]), int(order[at + 1]))
