"""Reading input files by slices: Parquet by row groups, JSONL by bytes, compressed JSONL forward.

A `Records` is what a slice reads to: one record or error a row, and the carried columns as an
Arrow table of the same length.
"""

import contextlib
import io
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from threading import Lock
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from phi4ray.batch.carried import carried_table, conform
from phi4ray.batch.plan import Input, Slice
from phi4ray.batch.rows import RESERVED, decode_line, request_members
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
            blocks = self._take(piece, lambda: _Cursor(_blocks(open_lines(item)), 0))
            lines = [line for block in blocks for line in block]
        rows = [decode_line(line) for line in lines]
        return Records(rows, carried_table(rows, self._carried))

    def _parquet(self, item: Input, piece: Slice) -> Records:
        table = pa.Table.from_batches(
            self._take(piece, lambda: _batches_from(item, piece.row_start, self._carried))
        )
        rows = records_of(table.select([n for n in table.column_names if n in RESERVED]))
        own = request_columns(table.column_names)
        carried, broken = conform(
            table.select([n for n in table.column_names if n not in own]), self._carried
        )
        for at, error in broken.items():
            rows[at] = error
        return Records(rows, carried)

    def _take(self, piece: Slice, restart: Callable[[], "_Cursor"]) -> list[Any]:
        """A slice's batches, from the file's open cursor if that is not past them."""
        cursor = self._open.pop(piece.file, None)
        if cursor is None or cursor.position > piece.row_start:
            cursor = restart()
        batches = cursor.take(piece.row_start, piece.rows)
        self._open[piece.file] = cursor  # not one that has failed: it would seem to be at its end
        while len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)
        return batches


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
    return _Cursor(read_batches(item, file, names, group), first)


def read_batches(
    item: Input, file: pq.ParquetFile, names: Sequence[str], first_group: int = 0
) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file from a row group on.

    Raises:
        InputError: a page is corrupt.
    """
    groups = list(range(first_group, file.metadata.num_row_groups))
    try:
        yield from file.iter_batches(BATCH_ROWS, row_groups=groups, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{item.uri} holds rows that cannot be read: {error}") from error


def request_columns(names: Sequence[str]) -> frozenset[str]:
    """The columns of a Parquet file that make its requests; see `rows.request_members`."""
    return request_members(dict.fromkeys(names, True))


def records_of(table: pa.Table) -> list[Json | RowError]:
    """Decode the rows of a Parquet table."""
    try:
        return [plain(row) for row in table.to_pylist(maps_as_pydicts="lossy")]
    except UnicodeDecodeError:  # Arrow does not check that Parquet strings are UTF-8
        return [_checked_record(table.slice(row, 1)) for row in range(table.num_rows)]


def _checked_record(row: pa.Table) -> Json | RowError:
    try:
        record: Json = plain(row.to_pylist(maps_as_pydicts="lossy")[0])
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"the row holds text that is not UTF-8: {error.reason}")
    return record


def _blocks(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    while block := list(itertools.islice(lines, BATCH_ROWS)):
        yield block


def wanted_columns(schema: pa.Schema, carried: pa.Schema) -> list[str]:
    """The columns of a Parquet file that a job reads: its request and what is carried."""
    return [name for name in schema.names if name in RESERVED or name in carried.names]


def plain(value: Any) -> Any:
    """A Parquet value as JSON has it.

    Members that are null are dropped at any depth: a Parquet struct states every member, JSON
    only its own. Binary data is text where it is UTF-8, for writers that do not mark their text.
    """
    match value:
        case None | str() | bool() | int() | float():
            return value
        case dict():
            return {key: plain(item) for key, item in value.items() if item is not None}
        case list():
            return [plain(item) for item in value]
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case bytes():
            with contextlib.suppress(UnicodeDecodeError):
                return value.decode()
            return value
        case _:
            return str(value)
