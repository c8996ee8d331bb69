"""Reading input files by slices: Parquet by row groups, JSONL by bytes, compressed JSONL forward.

A `Records` is what a slice reads to: one record or error a row, and the carried columns as an
Arrow table of the same length.
"""

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from phi4ray.batch.carried import carried_table, conform
from phi4ray.batch.lines import MAX_ROW_BYTES, Line, compression, lines_of, open_lines
from phi4ray.batch.parquet import open_parquet, read_batches, records_of, unpacked_bytes
from phi4ray.batch.plan import Input, Slice
from phi4ray.batch.rows import (
    ID_COLUMNS,
    RESERVED,
    BrokenRow,
    decode_line,
    record_id,
    request_members,
)
from phi4ray.errors import (
    InputChangedError,
    InputError,
    ObjectNotFoundError,
    PreconditionError,
)
from phi4ray.protocol import Json, RowError
from phi4ray.storage import storage_for

BLOCK_ROWS, BLOCK_BYTES = 1024, 16 << 20
"""A compressed file is read so far ahead, and by no more than one row further."""

WHOLE_BYTES = 256 << 20
"""A slice of plain JSONL that has more, because a row is too long, is read piece by piece."""

MAX_SLICE_BYTES = 1 << 30
"""What the rows of a slice of Parquet may take once they are decoded."""

MAX_OPEN_FILES = 8


@dataclass(frozen=True, slots=True)
class Records:
    """The rows of one slice, in order: `rows[i]` belongs to `carried[i]`."""

    rows: list[Json | RowError]
    carried: pa.Table


def is_parquet(uri: str) -> bool:
    """Whether a file is Parquet by its name; every other known ending is JSONL."""
    return uri.lower().endswith(".parquet")


class Reader:
    """Reads slices; keeps files open, because slices of one file mostly come in their order.

    Going on from where the last slice ended is what makes compressed files, and slices that cut
    a large row group, cost one pass and not one pass a slice. Only one thread at a time may read a
    file, see `phi4ray.batch.reads`.
    """

    def __init__(
        self, inputs: Sequence[Input], carried: pa.Schema, max_row_bytes: int = MAX_ROW_BYTES
    ) -> None:
        self._inputs = inputs
        self._max_row_bytes = max_row_bytes
        self._carried = carried
        self._open: OrderedDict[int, _Cursor] = OrderedDict()

    def read(self, piece: Slice) -> Records:
        """Read one slice.

        Raises:
            InputChangedError: the object is not the one that was planned.
            InputError: the file is broken.
        """
        item = self._inputs[piece.file]
        try:
            if is_parquet(item.uri):
                records = self._parquet(item, piece)
            else:
                records = self._jsonl(item, piece)
        except PreconditionError as error:
            raise InputChangedError(
                f"{item.uri} changed after it was planned: start a job with a new --output"
            ) from error
        except ObjectNotFoundError as error:
            raise InputChangedError(
                f"{item.uri} was removed after it was planned: restore it, or start a job "
                "with a new --output"
            ) from error
        if len(records.rows) != piece.rows:
            raise InputError(
                f"{item.uri} ends after row {piece.row_start + len(records.rows)}, "
                f"planned were {item.rows}: the file changed or is truncated"
            )
        return records

    def _jsonl(self, item: Input, piece: Slice) -> Records:
        if compression(item.uri) is None:
            lines = self._plain_lines(item, piece)
        else:
            cursor = self._cursor(piece, lambda: _Cursor(self._blocks(item), 0))
            lines = [line for block in cursor.take(piece) for line in block]
            self._keep(piece, cursor)
        rows = [decode_line(line) for line in lines]
        return Records(rows, carried_table(rows, self._carried))

    def _plain_lines(self, item: Input, piece: Slice) -> list[Line]:
        storage = storage_for(item.uri)
        if piece.end - piece.start <= WHOLE_BYTES:
            data = storage.read(item.uri, piece.start, piece.end, etag=item.etag)
            lines = lines_of(io.BytesIO(data), item.uri, self._max_row_bytes)
            return list(islice(lines, piece.rows))
        with storage.open(item.uri, etag=item.etag) as stream:
            stream.seek(piece.start)
            return list(islice(lines_of(stream, item.uri, self._max_row_bytes), piece.rows))

    def _blocks(self, item: Input) -> Iterator[list[Line]]:
        block: list[Line] = []
        size = 0
        for line in open_lines(item, self._max_row_bytes):
            block.append(line)
            size += len(line) if isinstance(line, bytes) else 0
            if len(block) == BLOCK_ROWS or size >= BLOCK_BYTES:
                yield block
                block, size = [], 0
        if block:
            yield block

    def _parquet(self, item: Input, piece: Slice) -> Records:
        cursor = self._cursor(piece, lambda: _tables_from(item, piece.row_start, self._carried))
        tables, size = [], 0
        for table in cursor.take(piece):
            tables.append(table)
            size += unpacked_bytes(table)
            if size > MAX_SLICE_BYTES:
                raise InputError(
                    f"{item.uri}: rows {piece.row_start} to {piece.row_start + piece.rows - 1} "
                    f"take more than {MAX_SLICE_BYTES:,} bytes once they are decoded: use a new "
                    "--output and fewer --shard-rows"
                )
        self._keep(piece, cursor)
        if not tables:
            return Records([], self._carried.empty_table())
        table = pa.concat_tables(tables)
        rows = records_of(table.select([n for n in table.column_names if n in RESERVED]))
        own = request_columns(table.column_names)
        carried, broken = conform(
            table.select([n for n in table.column_names if n not in own]), self._carried
        )
        if size > self._max_row_bytes:
            broken |= self._too_long(table)
        broken |= {at: row for at, row in enumerate(rows) if isinstance(row, RowError)}
        for at, error in broken.items():
            rows[at] = BrokenRow(error.code, error.message, _id_of(table.slice(at, 1)))
        return Records(rows, carried)

    def _too_long(self, table: pa.Table) -> dict[int, RowError]:
        sizes = (unpacked_bytes(table.slice(at, 1)) for at in range(table.num_rows))
        return {
            at: RowError(
                "row_too_long",
                f"the row has {size:,} bytes, max_row_mib allows {self._max_row_bytes:,}",
            )
            for at, size in enumerate(sizes)
            if size > self._max_row_bytes
        }

    def _cursor(self, piece: Slice, restart: Callable[[], "_Cursor"]) -> "_Cursor":
        """The file's open cursor if it is not past the slice."""
        cursor = self._open.pop(piece.file, None)
        return restart() if cursor is None or cursor.position > piece.row_start else cursor

    def _keep(self, piece: Slice, cursor: "_Cursor") -> None:
        # Not one that has failed: it would seem to be at its end.
        self._open[piece.file] = cursor
        while len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)


class _Cursor:
    """A forward-only position in a file, over batches of rows that can be cut anywhere."""

    def __init__(self, batches: Iterator[Any], position: int) -> None:
        self._batches = batches
        self._held: Any = None
        self.position = position

    def take(self, piece: Slice) -> Iterator[Any]:
        """The batches that hold a slice's rows, fewer at the file's end."""
        skip, count = piece.row_start - self.position, piece.rows
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
                yield batch[:step]


def _tables_from(item: Input, row_start: int, carried: pa.Schema) -> _Cursor:
    """A cursor at the start of the row group that holds `row_start`."""
    file = open_parquet(item)
    group, first = 0, 0
    while first + (count := file.metadata.row_group(group).num_rows) <= row_start:
        group, first = group + 1, first + count
    names = wanted_columns(file.schema_arrow, carried)
    return _Cursor(read_batches(item, file, names, group), first)


def _id_of(row: pa.Table) -> str | None:
    """The id of a Parquet row that is an error for its other columns."""
    names = [name for name in ID_COLUMNS if name in row.column_names]
    (record,) = records_of(row.select(names)) if names else ({},)
    return None if isinstance(record, RowError) else record_id(record)


def request_columns(names: Sequence[str]) -> frozenset[str]:
    """The columns of a Parquet file that make its requests; see `rows.request_members`."""
    return request_members(dict.fromkeys(names, True))


def wanted_columns(schema: pa.Schema, carried: pa.Schema) -> list[str]:
    """The columns of a Parquet file that a job reads: its request and what is carried."""
    return [name for name in schema.names if name in RESERVED or name in carried.names]
