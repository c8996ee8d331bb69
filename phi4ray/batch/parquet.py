"""Parquet, read in batches whose memory is bounded, whatever the file's encodings unpack to.

A few bytes of Parquet can stand for any number of large values: a dictionary holds a value once
for all rows, a page of equal bytes compresses to nothing, and a footer may claim what is not there.
Files that were made to hold prompts are far below every limit here.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from phi4ray.batch.carried import UNREADABLE
from phi4ray.batch.plan import Input
from phi4ray.batch.rows import MAX_NAME_CHARS
from phi4ray.errors import InputError
from phi4ray.protocol import Json, RowError
from phi4ray.storage import storage_for

BATCH_ROWS = 1024
STEP_ROWS = 16
"""Rows that Arrow decodes at once: each may be as large as the column's dictionary."""

STEP_BYTES = 16 << 20
"""A batch is given out early once it takes so much."""

BUFFER_BYTES = 8 << 20
"""Of each column so much is read at once, which may be a request to the store."""

MAX_DICTIONARY_BYTES = 32 << 20
"""Of a column's values in one row group; writers stop at 1 MiB, and write the rest as they are."""

MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO = 512 << 20, 500
"""What unpacks to more bytes, and to more times its size, is refused: a column's pages in a row
group, and the ids of a file."""

MAX_ROWS_A_BYTE = 1000
"""A footer that claims more rows for each byte of its file is not believed."""


def open_parquet(item: Input) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        InputError: it is not Parquet, or claims what it cannot hold.
    """
    try:
        stream = storage_for(item.uri).open(item.uri, etag=item.etag)
        # Both, or the columns of a whole row group are read in one piece, and held while it lasts.
        file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES)
        counts = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
        names = file.schema_arrow.names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{item.uri} is not a readable Parquet file: {error}") from error
    rows = file.metadata.num_rows
    if min(counts, default=0) < 0 or sum(counts) != rows or rows > MAX_ROWS_A_BYTE * item.size:
        raise InputError(
            f"{item.uri} is not a readable Parquet file: it claims {rows:,} rows in "
            f"{item.size:,} bytes, {sum(counts):,} of them in its row groups"
        )
    for name in names:
        check_name(item.uri, name)
    return file


def check_name(uri: str, name: str) -> None:
    """Refuse a column that no answer file could carry.

    Raises:
        InputError: its name is too long.
    """
    if len(name) > MAX_NAME_CHARS:
        raise InputError(
            f"{uri} has a column {name[:20]!r}… whose name has {len(name):,} characters; "
            f"{MAX_NAME_CHARS:,} may be: rename it"
        )


def read_batches(
    item: Input, file: pq.ParquetFile, names: Sequence[str], first_group: int = 0
) -> Iterator[pa.Table]:
    """The rows of a Parquet file from a row group on, some at a time.

    Raises:
        InputError: a page is corrupt, or unpacks to more than anybody would write.
    """
    for group in range(first_group, file.metadata.num_row_groups):
        held: list[pa.RecordBatch] = []
        size = 0
        try:
            _check_chunks(item, file, names, group)
            # For steps this small Arrow's threads cost more than they gain.
            for step in file.iter_batches(
                STEP_ROWS, row_groups=[group], columns=names, use_threads=False
            ):
                held.append(step)
                size += unpacked_bytes(step)
                if len(held) * STEP_ROWS >= BATCH_ROWS or size >= STEP_BYTES:
                    yield pa.Table.from_batches(held)
                    held, size = [], 0
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{item.uri} holds rows that cannot be read: {error}") from error
        if held:
            yield pa.Table.from_batches(held)


def _check_chunks(item: Input, file: pq.ParquetFile, names: Sequence[str], group: int) -> None:
    """Refuse a row group whose columns cannot be unpacked in any sane amount of memory."""
    found = file.metadata.row_group(group)
    # Arrow ends the process over a footer that lacks what is asked below: ask only where it counts.
    if found.total_byte_size <= MAX_DICTIONARY_BYTES:
        return
    for index in range(found.num_columns):
        chunk = found.column(index)
        name, unpacked = chunk.path_in_schema.partition(".")[0], chunk.total_uncompressed_size
        if name not in names or unpacked <= MAX_DICTIONARY_BYTES:
            continue
        if unpacked > max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * chunk.total_compressed_size):
            raise InputError(
                f"{item.uri} unpacks column {name!r} of row group {group} to "
                f"{unpacked:,} bytes, from {chunk.total_compressed_size:,}: write it anew with "
                "smaller row groups"
            )
        size = _dictionary_bytes(item, chunk.dictionary_page_offset or 0)
        if size > MAX_DICTIONARY_BYTES:
            raise InputError(
                f"{item.uri} has a dictionary of {size:,} bytes for column {name!r} in row group "
                f"{group}, at most {MAX_DICTIONARY_BYTES:,} are read: write it anew without one"
            )


def unpacked_bytes(table: pa.Table | pa.RecordBatch) -> int:
    """What rows take once they are Python's: values of a dictionary count at each of them."""
    return sum(
        _unpacked(chunk)
        for column in table.columns
        for chunk in (column.chunks if isinstance(column, pa.ChunkedArray) else (column,))
    )


def _unpacked(array: Any) -> int:
    kind, types = array.type, pa.types
    if "dictionary<" not in str(kind):
        return int(array.nbytes)
    if types.is_dictionary(kind):
        times = Counter(array.indices.drop_null().to_pylist())
        return sum(_unpacked(array.dictionary.slice(at, 1)) * n for at, n in times.items())
    if types.is_struct(kind):
        return sum(map(_unpacked, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _unpacked(array.flatten())
    return int(array.nbytes)


def _dictionary_bytes(item: Input, offset: int) -> int:
    """The size of a dictionary once it is unpacked, of which the footer says nothing.

    The page's header begins with its kind and that size (parquet.thrift, `PageHeader`), which
    Thrift's compact protocol writes as 0x15 and a zigzag varint each.
    """
    if not offset:
        return 0
    data = storage_for(item.uri).read(item.uri, offset, offset + 16, etag=item.etag)
    numbers, at = [], 0
    for _ in range(2):
        at += 1  # 0x15
        number = shift = 0
        while at < len(data):
            number |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                break
        numbers.append(number >> 1)
    return numbers[1]


def records_of(table: pa.Table) -> list[Json | RowError]:
    """Decode the rows of a Parquet table."""
    try:
        return [plain(row) for row in table.to_pylist(maps_as_pydicts="lossy")]
    except UNREADABLE:
        return [_checked_record(table.slice(row, 1)) for row in range(table.num_rows)]


def _checked_record(row: pa.Table) -> Json | RowError:
    try:
        record: Json = plain(row.to_pylist(maps_as_pydicts="lossy")[0])
    except UnicodeDecodeError as error:  # Arrow does not check that Parquet strings are UTF-8
        return RowError("invalid_utf8", f"the row holds text that is not UTF-8: {error.reason}")
    except UNREADABLE as error:
        return RowError("invalid_value", f"the row holds a value that cannot be read: {error}")
    return record


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
