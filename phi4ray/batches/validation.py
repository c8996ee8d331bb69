"""Whether a batch's file can be answered: OpenAI's rules for its lines. Pure but for reading."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from reprlib import Repr
from typing import BinaryIO

import numpy as np

from phi4ray.batch.lines import row_of
from phi4ray.batch.rows import decode_line
from phi4ray.batches.records import LineError
from phi4ray.config import Endpoint
from phi4ray.protocol import Json, RowError

MAX_ERRORS = 100
"""So many are told; who has them all wrong sees it from the first hundred."""

_QUOTES = Repr()
_QUOTES.maxstring = _QUOTES.maxother = 100
_QUOTED = _QUOTES.repr
"""Quotes what a client sent, cut: it stays in the batch's record and in each answer about it."""


@dataclass(frozen=True, slots=True)
class Checked:
    """How many requests a file holds, and what is wrong with it."""

    rows: int
    errors: tuple[LineError, ...]


def lines_of(stream: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """The lines of a file; one that is longer than `max_bytes` ends it, one byte too long."""
    while line := stream.readline(max_bytes + 1):
        yield line
        if len(line) > max_bytes:
            return


def check(
    lines: Iterable[bytes], endpoint: Endpoint, model: str, max_rows: int, max_bytes: int
) -> Checked:
    """Look at every line. Costs 16 bytes of memory a row.

    Custom ids are compared by digests of 64 bits: of ten million different ones, two are taken
    for the same once in 400,000 files.
    """
    errors: list[LineError] = []
    ids, places = array("Q"), array("Q")
    for number, line in enumerate(lines, 1):
        if len(line) > max_bytes:
            message = f"The line is longer than the {max_bytes:,} bytes that one may have."
            errors.append(LineError(code="line_too_long", message=message, line=number))
            break
        row = row_of(line)
        if row is None:
            continue
        if len(ids) == max_rows:
            message = f"A batch may have {max_rows:,} requests; this file has more."
            errors.append(LineError(code="too_many_tasks", message=message))
            break
        record = decode_line(row)
        identifier = None if isinstance(record, RowError) else record.get("custom_id")
        ids.append(_digest(identifier) if isinstance(identifier, str) and identifier else 0)
        places.append(number)
        if error := _line_error(record, endpoint, model):
            errors.append(error.model_copy(update={"line": number}))
            if len(errors) == MAX_ERRORS:
                break
    if not ids and not errors:
        errors.append(LineError(code="empty_file", message="The file has no requests."))
    errors += _duplicates(ids, places)
    errors.sort(key=lambda error: error.line or 0)
    return Checked(len(ids), tuple(errors[:MAX_ERRORS]))


def _line_error(record: Json | RowError, endpoint: Endpoint, model: str) -> LineError | None:
    if isinstance(record, RowError):
        return LineError(
            code="invalid_json_line",
            message=f"This line is not parseable as a JSON object: {record.message}.",
        )
    for name in ("custom_id", "method", "url", "body"):
        if record.get(name) in (None, ""):
            return LineError(
                code="missing_required_parameter",
                message=f"Missing required parameter: '{name}'.",
                param=name,
            )
    if not isinstance(record["custom_id"], str):
        message = "'custom_id' must be a string."
        return LineError(code="invalid_type", message=message, param="custom_id")
    if record["method"] != "POST":
        message = f"'method' is {_QUOTED(record['method'])}; only 'POST' is supported."
        return LineError(code="invalid_method", message=message, param="method")
    if record["url"] != endpoint:
        message = f"'url' is {_QUOTED(record['url'])}, not the batch's endpoint {endpoint!r}."
        return LineError(code="invalid_url", message=message, param="url")
    body = record["body"]
    if not isinstance(body, dict):
        message = "'body' must be an object."
        return LineError(code="invalid_type", message=message, param="body")
    if body.get("model", model) != model:
        message = f"The model {_QUOTED(body['model'])} does not exist; this service has {model!r}."
        return LineError(code="model_not_found", message=message, param="body.model")
    for name in ("prompt", "messages"):  # which would be taken for the request itself
        if name in record:
            message = f"{name!r} belongs into 'body'."
            return LineError(code="unknown_parameter", message=message, param=name)
    return None


def _digest(text: str) -> int:
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _duplicates(ids: "array[int]", places: "array[int]") -> list[LineError]:
    found = np.array(ids, np.uint64)
    order = np.argsort(found, kind="stable")
    ranked = found[order]
    repeats = np.flatnonzero((ranked[1:] == ranked[:-1]) & (ranked[1:] != 0)) + 1
    lines = sorted(places[int(row)] for row in order[repeats])[:MAX_ERRORS]
    return [
        LineError(
            code="duplicate_custom_id",
            message="The custom_id of this request is that of an earlier one; it must be unique "
            "in the batch.",
            param="custom_id",
            line=line,
        )
        for line in lines
    ]
