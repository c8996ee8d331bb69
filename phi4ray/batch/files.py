"""Reading input files by slices: Parquet by row groups, JSONL by bytes, compressed JSONL forward.

A `Records` is what a slice reads to: one record or error a row, and the carried columns as an
Arrow table of the same length.
"""

import base64
import io
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import to_json

from phi4ray.batch.plan import Input, Slice
from phi4ray.batch.rows import RESERVED, decode_line
from phi4ray.errors import InputChangedError, InputError, PreconditionError
from phi4ray.protocol import Json, RowError
from phi4ray.storage import storage_for

BATCH_ROWS = 1024
MAX_OPEN_FILES = 8


@dataclass(frozen=True, slots=True)
class Records:
    """The rows of one slice, in order: `rows[i]` belongs to `carried[i]`."""

    rows: list[Json | RowError]
    carried: pa.Table


def encode_schema(schema: pa.Schema) -> str:
    """An Arrow schema as text, for the plan file."""
    return base64.b64encode(schema.remove_metadata().serialize()).decode()


def decode_schema(text: str) -> pa.Schema:
    """The schema that `encode_schema` wrote."""
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def is_parquet(uri: str) -> bool:
    """Whether a file is Parquet by its name; every other known ending is JSONL."""
    return uri.endswith(".parquet")


def compression(uri: str) -> str | None:
    """The compression that a JSONL file's name states, as pyarrow names it."""
    return "gzip" if uri.endswith(".gz") else "zstd" if uri.endswith(".zst") else None


def row_of(line: bytes) -> bytes | None:
    """A line without its end and without a byte order mark; None for a blank one, which is no row.

    Planning and reading both ask here, so that they count the same rows.
    """
    line = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    return None if not line or line.isspace() else line


def lines_of(stream: BinaryIO, uri: str) -> Iterator[bytes]:
    """The rows of a JSONL stream, undecoded.

    Raises:
        InputError: the compressed stream is truncated or corrupt.
    """
    try:
        for line in stream:
            if (row := row_of(line)) is not None:
                yield row
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{uri} cannot be read to its end: {error}") from error


def open_lines(item: Input) -> Iterator[bytes]:
    """Every row of a JSONL file from its start, decompressed."""
    stream: Any = storage_for(item.uri).open(item.uri, etag=item.etag)
    codec = compression(item.uri)
    if codec and item.size:
        stream = io.BufferedReader(
            pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec), 1 << 20
        )
    return lines_of(stream, item.uri)


def open_parquet(item: Input) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        InputError: it is not Parquet.
    """
    try:
        return pq.ParquetFile(storage_for(item.uri).open(item.uri, etag=item.etag))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{item.uri} is not a readable Parquet file: {error}") from error


class Reader:
    """Reads slices; keeps files open, because slices of one file mostly come in their order.

    Going on from where the last slice ended is what makes compressed files, and slices that cut
    a large row group, cost one pass and not one pass a slice. One thread reads at a time.
    """

    def __init__(self, inputs: Sequence[Input], carried: pa.Schema) -> None:
        self._inputs = inputs
        self._carried = carried
        self._open: OrderedDict[int, _Cursor] = OrderedDict()
        self._lock = Lock()

    def read(self, piece: Slice) -> Records:
        """Read one slice.

        Raises:
            InputChangedError: the object is not the one that was planned.
            InputError: the file is broken.
        """
        item = self._inputs[piece.file]
        with self._lock:
            try:
                if is_parquet(item.uri):
                    records = self._parquet(item, piece)
                else:
                    records = self._jsonl(item, piece)
            except PreconditionError as error:
                raise InputChangedError(
                    f"{item.uri} changed after it was planned: start a job with a new --output"
                ) from error
        if len(records.rows) != piece.rows:
            raise InputError(
                f"{item.uri} ends after row {piece.row_start + len(records.rows)}, "
                f"planned were {item.rows}: the file changed or is truncated"
            )
        return records

    def _jsonl(self, item: Input, piece: Slice) -> Records:
        if compression(item.uri) is None:
            data = storage_for(item.uri).read(item.uri, piece.start, piece.end, etag=item.etag)
            lines: list[bytes] = list(lines_of(io.BytesIO(data), item.uri))[: piece.rows]
        else:
            cursor = self._cursor(piece, lambda: _Cursor(_blocks(open_lines(item)), 0))
            lines = [line for block in cursor.take(piece.row_start, piece.rows) for line in block]
        rows = [decode_line(line) for line in lines]
        return Records(rows, carried_table(rows, self._carried))

    def _parquet(self, item: Input, piece: Slice) -> Records:
        cursor = self._cursor(piece, lambda: _batches_from(item, piece.row_start, self._carried))
        table = pa.Table.from_batches(cursor.take(piece.row_start, piece.rows))
        reserved = table.select([name for name in table.column_names if name in RESERVED])
        return Records(_records(reserved), conform(table, self._carried))

    def _cursor(self, piece: Slice, restart: Callable[[], "_Cursor"]) -> "_Cursor":
        """The file's open cursor if it is not past the slice, else a new one."""
        cursor = self._open.pop(piece.file, None)
        if cursor is None or cursor.position > piece.row_start:
            cursor = restart()
        self._open[piece.file] = cursor
        while len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)
        return cursor


class _Cursor:
    """A forward-only position in a file, over batches of rows that can be cut anywhere."""

    def __init__(self, batches: Iterator[Any], position: int) -> None:
        self._batches = batches
        self._held: Any = None
        self.position = position

    def take(self, row_start: int, count: int) -> list[Any]:
        """The batches that hold the `count` rows from `row_start`, fewer at the file's end."""
        skip, taken = row_start - self.position, []
        while skip + count:
            if self._held is None or not len(self._held):
                self._held = next(self._batches, None)
                if self._held is None:
                    break
            batch = self._held
            step = min(len(batch), skip or count)
            self._held = batch[step:]
            self.position += step
            if skip:
                skip -= step
            else:
                count -= step
                taken.append(batch[:step])
        return taken


def _batches_from(item: Input, row_start: int, carried: pa.Schema) -> _Cursor:
    """A cursor at the start of the row group that holds `row_start`."""
    file = open_parquet(item)
    group, first = 0, 0
    while first + (count := file.metadata.row_group(group).num_rows) <= row_start:
        group, first = group + 1, first + count
    names = wanted_columns(file.schema_arrow, carried)
    groups = list(range(group, file.metadata.num_row_groups))

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            yield from file.iter_batches(BATCH_ROWS, row_groups=groups, columns=names)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{item.uri} holds rows that cannot be read: {error}") from error

    return _Cursor(batches(), first)


def _records(table: pa.Table) -> list[Json | RowError]:
    try:
        return [without_nulls(row) for row in table.to_pylist()]
    except UnicodeDecodeError:  # Arrow does not check that Parquet strings are UTF-8
        return [_checked_record(table.slice(row, 1)) for row in range(table.num_rows)]


def _checked_record(row: pa.Table) -> Json | RowError:
    try:
        record: Json = without_nulls(row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"the row holds text that is not UTF-8: {error.reason}")
    return record


def _blocks(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    while block := list(itertools.islice(lines, BATCH_ROWS)):
        yield block


def wanted_columns(schema: pa.Schema, carried: pa.Schema) -> list[str]:
    """The columns of a Parquet file that a job reads: its request and what is carried."""
    return [name for name in schema.names if name in RESERVED or name in carried.names]


def without_nulls(value: Any) -> Any:
    """Drop null members at any depth: a Parquet struct states every member, JSON only its own."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def carried_table(rows: Sequence[Json | RowError], schema: pa.Schema) -> pa.Table:
    """The carried members of decoded lines, typed as the plan found them over all inputs."""
    arrays = []
    for column in schema:
        values = [None if isinstance(row, RowError) else row.get(column.name) for row in rows]
        if pa.types.is_string(column.type):
            values = [as_text(value) for value in values]
        elif pa.types.is_floating(column.type):
            values = [None if value is None else float(value) for value in values]
        arrays.append(pa.array(values, column.type))
    return pa.table(arrays, schema=schema)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Bring a Parquet table's carried columns to the job's types; absent ones become null."""
    arrays: list[Any] = []
    for column in schema:
        if column.name not in table.column_names:
            arrays.append(pa.nulls(table.num_rows, column.type))
        elif (found := table[column.name]).type == column.type:
            arrays.append(found)
        elif pa.types.is_string(column.type):
            arrays.append(pa.array([as_text(v) for v in found.to_pylist()], pa.string()))
        else:
            arrays.append(found.cast(column.type))
    return pa.table(arrays, schema=schema)


def as_text(value: Any) -> str | None:
    """Text as it is, anything else as JSON: for columns whose rows have no common type."""
    if value is None or isinstance(value, str):
        return value
    return to_json(value, fallback=str, inf_nan_mode="null").decode()
