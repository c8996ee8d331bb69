"""JSONL, plain and compressed: the lines that are rows, none of them held if it is too long."""

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from phi4ray.batch.plan import Input
from phi4ray.batch.rows import ID_BYTES, BrokenRow
from phi4ray.errors import InputError
from phi4ray.protocol import RowError
from phi4ray.storage import storage_for

MAX_ROW_BYTES = 32 << 20
"""The longest line, where nobody says another length."""

SKIP_BYTES = 1 << 20
"""What is held at once of a line that is too long."""

BOM = b"\xef\xbb\xbf"

Line = bytes | RowError
"""A line's text, undecoded, or why it is not read."""


def compression(uri: str) -> str | None:
    """The compression that a JSONL file's name states, as pyarrow names it."""
    name = uri.lower()
    return "gzip" if name.endswith(".gz") else "zstd" if name.endswith(".zst") else None


def row_of(line: bytes) -> bytes | None:
    """A line without its end and without a byte order mark; None for a blank one, which is no row.

    Planning and reading both ask here, so that they count the same rows.
    """
    line = line.removeprefix(BOM).rstrip(b"\r\n")
    return None if not line or line.isspace() else line


def next_line(stream: BinaryIO, max_row_bytes: int) -> tuple[Line | None, int]:
    """The next line, and its size with its end: 0 at the stream's end. None: a blank one.

    One that is longer is read past in pieces: it is a row, which has an error, unless it is blank.
    """
    line = stream.readline(max_row_bytes + 2)  # a line may end in two characters
    if len(line) < max_row_bytes + 2 or line.endswith(b"\n"):
        row = row_of(line)
        if row is None or len(row) <= max_row_bytes:
            return row, len(line)
        return _too_long(row, len(row), max_row_bytes), len(line)
    size, blank, start = len(line), row_of(line) is None, line[:ID_BYTES].removeprefix(BOM)
    del line
    while piece := stream.readline(SKIP_BYTES):
        size, blank = size + len(piece), blank and piece.isspace()
        if piece.endswith(b"\n"):
            break
    return None if blank else _too_long(start, size, max_row_bytes), size


def _too_long(start: bytes, size: int, max_row_bytes: int) -> RowError:
    message = f"the line has {size:,} bytes, max_row_mib allows {max_row_bytes:,}"
    return BrokenRow.of_line(RowError("row_too_long", message), start)


def skip_line(stream: BinaryIO, at: int, end: int) -> int:
    """Read past what is left of a line; gives where the next one starts, or `end` if not before."""
    while at < end and (piece := stream.readline(SKIP_BYTES)):
        at += len(piece)
        if piece.endswith(b"\n"):
            break
    return at


def lines_of(stream: BinaryIO, uri: str, max_row_bytes: int) -> Iterator[Line]:
    """The rows of a JSONL stream, undecoded.

    Raises:
        InputError: the compressed stream is truncated or corrupt.
    """
    try:
        while True:
            line, size = next_line(stream, max_row_bytes)
            if not size:
                return
            if line is not None:
                yield line
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{uri} cannot be read to its end: {error}") from error


def open_lines(item: Input, max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Line]:
    """Every row of a JSONL file from its start, decompressed.

    Raises:
        InputError: the compressed stream is truncated or corrupt.
    """
    stream: Any = storage_for(item.uri).open(item.uri, etag=item.etag)
    codec = compression(item.uri)
    if codec and item.size:
        stream = io.BufferedReader(
            pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), codec), 1 << 20
        )
    return lines_of(stream, item.uri, max_row_bytes)
