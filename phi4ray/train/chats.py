"""Chats to learn from, row by row, out of CSV, JSONL and Parquet files.

A row has one of two forms; other columns are not looked at:

    messages             a list of {"role", "content"}, or that list as JSON text; an answer with
                         "weight": 0 is not learned
    prompt, completion   one question and its answer; optionally system

A row that cannot be learned from is no exception: it is a `Refused` that names its place.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from phi4ray.batch.files import is_parquet
from phi4ray.batch.lines import MAX_ROW_BYTES, SKIP_BYTES, open_lines
from phi4ray.batch.parquet import open_parquet, read_batches, records_of
from phi4ray.batch.plan import Input
from phi4ray.batch.rows import decode_line
from phi4ray.errors import InputError
from phi4ray.protocol import Json, RowError
from phi4ray.storage import storage_for
from phi4ray.storage.uris import ENDINGS

CHAT_ENDINGS = (*ENDINGS, ".csv")
"""What files of chats are called."""

COLUMNS = ("messages", "prompt", "completion", "system")
ROLES = ("system", "user", "assistant")

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is: its file, and its number there, from 0, the head of a CSV not counted."""

    file: str
    row: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that is not learned from. `field` is the column, or what of it, that is wrong."""

    place: Place
    field: str
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.place.file} row {self.place.row}, {self.field}: {self.message}"


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation with at least one answer to learn, none of them empty.

    `unlearned` are the messages of the assistant that are only there for those that follow.
    """

    place: Place
    messages: Messages
    unlearned: frozenset[int] = frozenset()


def read_chats(inputs: Sequence[Input]) -> Iterator[Chat | Refused]:
    """Every row of the files, in order.

    Raises:
        InputError: a file is not what its name claims, or has none of the columns.
    """
    for item in inputs:
        for row, record in enumerate(_records(item)):
            place = Place(item.uri, row)
            if isinstance(record, RowError):
                yield Refused(place, "row", record.code, record.message)
            else:
                yield to_chat(place, record)


def to_chat(place: Place, record: Json) -> Chat | Refused:
    """Turn a record into a chat, or say why it is none."""
    try:
        if record.get("messages") not in (None, ""):
            return Chat(place, *_messages(record["messages"]))
        return Chat(place, _question_and_answer(record))
    except _BadField as bad:
        return Refused(place, bad.field, bad.code, bad.message)


def _question_and_answer(record: Json) -> Messages:
    messages = []
    for role, name in (("system", "system"), ("user", "prompt"), ("assistant", "completion")):
        text = record.get(name)
        if text is None or (name == "system" and text == ""):
            if name == "system":
                continue
            raise _BadField(name, "missing_field", "the row has no messages, and no text here")
        messages.append({"role": role, "content": _content(text, name, role)})
    return messages


def _messages(value: Any) -> tuple[Messages, frozenset[int]]:
    if isinstance(value, str):
        try:
            value = from_json(value)
        except ValueError as error:
            raise _BadField("messages", "invalid_json", f"is not JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise _BadField("messages", "invalid_type", "is no list of messages, or an empty one")
    messages, unlearned = [], set()
    for at, message in enumerate(value):
        field = f"messages[{at}]"
        if not isinstance(message, dict):
            raise _BadField(field, "invalid_type", "is no object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise _BadField(
                f"{field}.role", "unknown_role", f"is {role!r}; known are {', '.join(ROLES)}"
            )
        content = _content(message.get("content"), f"{field}.content", role)
        messages.append({"role": role, "content": content})
        # As in OpenAI's format. Parquet has null where other messages of the file have a weight.
        if role == "assistant" and (weight := message.get("weight")) is not None:
            if weight not in (0, 1):
                raise _BadField(f"{field}.weight", "unknown_weight", f"is {weight!r}, not 0 or 1")
            if not weight:
                unlearned.add(at)
    if not any(m["role"] == "assistant" and at not in unlearned for at, m in enumerate(messages)):
        raise _BadField("messages", "no_answer", "has no message of the assistant to learn")
    return messages, frozenset(unlearned)


def _content(value: Any, field: str, role: str) -> str:
    if not isinstance(value, str):
        raise _BadField(field, "invalid_type", f"is no text: {str(value)[:60]!r}")
    if role == "assistant" and not value.strip():
        raise _BadField(field, "empty_answer", "the answer is empty")
    return value


class _BadField(Exception):
    def __init__(self, field: str, code: str, message: str) -> None:
        self.field, self.code, self.message = field, code, message


def _records(item: Input) -> Iterator[Json | RowError]:
    if item.uri.lower().endswith(".csv"):
        yield from _csv_records(item)
    elif is_parquet(item.uri):
        file = open_parquet(item)
        names = [name for name in file.schema_arrow.names if name in COLUMNS]
        _check_columns(item.uri, file.schema_arrow.names)
        for table in read_batches(item, file, names):
            yield from records_of(table)
    else:
        yield from map(decode_line, open_lines(item))


def _csv_records(item: Input) -> Iterator[Json | RowError]:
    """Rows of a CSV with a head, as RFC 4180 and spreadsheets write them."""
    # Python's own limit is 131,072 characters a cell, and one for all of the process: a row that is
    # taken here has no longer cell than this.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    with storage_for(item.uri).open(item.uri, etag=item.etag) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        lines = _Lines(text)
        try:
            # A row with more cells than the head has is broken, and so is one with fewer.
            reader = csv.DictReader(lines, restkey=None, restval=None, strict=True)
            _check_columns(item.uri, reader.fieldnames or ())
            while True:
                lines.begin()
                try:
                    record = next(reader, None)
                except _TooLong as error:
                    lines.skip()
                    yield RowError("row_too_long", str(error))
                    continue
                if record is None:
                    return
                if None in record or None in record.values():
                    yield RowError("ragged_row", "it has not as many cells as the head")
                else:
                    yield dict(record)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{item.uri} is not a readable CSV file: {error}") from error


class _TooLong(csv.Error):
    """A row that is not held to its end."""


class _Lines:
    """The lines of a CSV, for `csv.reader`; none of a row beyond `MAX_ROW_BYTES` characters."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.begin()

    def begin(self) -> None:
        """A row begins with the next line."""
        self._size, self._quotes, self._last = 0, 0, ""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if not self._read(MAX_ROW_BYTES + 1):
            raise StopIteration
        if self._size > MAX_ROW_BYTES:
            raise _TooLong(f"the row has more than {MAX_ROW_BYTES:,} characters")
        return self._last

    def skip(self) -> None:
        """Read past the rest of the row: it ends with a line after which no cell is quoted."""
        while not (self._last.endswith(("\n", "\r")) and self._quotes % 2 == 0):
            if not self._read(SKIP_BYTES):
                return

    def _read(self, size: int) -> bool:
        self._last = self._text.readline(size)
        self._size += len(self._last)
        self._quotes += self._last.count('"')
        return bool(self._last)


def _check_columns(uri: str, names: Sequence[str]) -> None:
    if "messages" not in names and not {"prompt", "completion"} <= set(names):
        raise InputError(
            f"{uri} has no column 'messages', nor 'prompt' and 'completion'; "
            f"it has {', '.join(names) or 'none'}"
        )
