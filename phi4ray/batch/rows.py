"""From an input record to an OpenAI request, or to the reason why there is none. Pure.

A record is one decoded JSONL line or one Parquet row. Two forms are understood:

    columns             prompt | messages, and optionally id (or custom_id), sampling
    OpenAI Batch line   custom_id, method, url, body

A record with a prompt or messages has the first form, whatever else is in it. Every other member
is carried through to the output untouched.
"""

import base64
import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic_core import from_json, to_json

from phi4ray.config import LIMITS, BatchConfig, Endpoint
from phi4ray.demand import MOST_TOKENS, max_tokens_of
from phi4ray.protocol import Json, RowError, has_more_values

BATCH_LINE = frozenset({"custom_id", "method", "url", "body"})
ID_COLUMNS = ("custom_id", "id")
"""The first that a row states is its id."""

COLUMNS = frozenset({"custom_id", "id", "prompt", "messages", "sampling"})
RESERVED = BATCH_LINE | COLUMNS
"""Members that may make a request; see `request_members`."""

MAX_ROW_VALUES = 2_000_000
"""Of a line, see `phi4ray.protocol.has_more_values`."""

MAX_NAME_CHARS = 1024
"""Of a member or column: each becomes a column of the output, named in every part's footer."""

ID_BYTES = 1 << 16
"""The id of a line that is no record is looked for in so much of it."""

ENDPOINTS: tuple[Endpoint, ...] = get_args(Endpoint)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a job gives to rows that do not say it themselves."""

    model: str
    endpoint: Endpoint = "/v1/chat/completions"
    system_prompt: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: BatchConfig) -> "Defaults":
        """The defaults that a job's configuration states."""
        return cls(config.engine.model_name, config.endpoint, config.system_prompt, config.sampling)


@dataclass(frozen=True, slots=True)
class BrokenRow(RowError):
    """Why a row is no record, and the id that could be read of it all the same."""

    id: str | None = None

    @classmethod
    def of_line(cls, error: RowError, line: bytes) -> "BrokenRow":
        """Of a line, of which the start is enough."""
        start = line[:ID_BYTES]
        try:
            start.decode("utf-8")
        except UnicodeDecodeError as bad:
            start = start[: bad.start]
        record: Any = None
        with contextlib.suppress(ValueError):
            record = from_json(start, allow_partial=True)
        if not isinstance(record, dict):
            return cls(error.code, error.message)
        if record and not isinstance(record[last := next(reversed(record))], str):
            del record[last]  # it may go on where the start ends
        return cls(error.code, error.message, record_id(record))


@dataclass(frozen=True, slots=True)
class Request:
    """One OpenAI request: where it goes and what is sent there."""

    endpoint: Endpoint
    body: Json


def decode_line(line: bytes | RowError) -> Json | RowError:
    """Decode one JSONL line into a record; one that was not read has its error already."""
    if isinstance(line, RowError):
        return line
    record = _decoded(line)
    return BrokenRow.of_line(record, line) if isinstance(record, RowError) else record


def _decoded(line: bytes) -> Json | RowError:
    if has_more_values(line, MAX_ROW_VALUES):
        return RowError("too_many_values", f"the line has more than {MAX_ROW_VALUES:,} values")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"the line is not UTF-8: {error.reason} at {error.start}")
    try:
        record = from_json(text)
    except ValueError as error:
        return RowError("invalid_json", f"the line is not JSON: {error}")
    if not isinstance(record, dict):
        return RowError("invalid_type", f"the line holds {_kind(record)}, not an object")
    if (longest := max(map(len, record), default=0)) > MAX_NAME_CHARS:
        return RowError(
            "name_too_long",
            f"the line has a member whose name has {longest:,} characters; "
            f"{MAX_NAME_CHARS:,} may be",
        )
    return record


def request_members(record: Mapping[str, Any]) -> frozenset[str]:
    """The members that make this record's request; all others are carried.

    A page's `url` or a mail's `body` beside its prompt are no parts of a Batch line, and an `id`
    beside a `custom_id` is not the row's.
    """
    if record.get("prompt") is not None or record.get("messages") is not None:
        members = COLUMNS
    else:
        members = RESERVED if record.get("body") is None else BATCH_LINE
    return members - {"id"} if as_text(record.get("custom_id")) else members


def record_id(record: Json) -> str | None:
    """The id that a record states, as text; None where it states none."""
    for name in ID_COLUMNS:
        if identifier := as_text(record.get(name)):
            return identifier
    return None


def own_limit(record: Json, members: frozenset[str]) -> int:
    """The limit of its answer that a record states in plain sight, for planning; else 0.

    `members` are its `request_members`.
    """
    stated = record.get("body" if members == BATCH_LINE else "sampling")
    limit = max_tokens_of(stated) if isinstance(stated, dict) else None
    return min(limit or 0, MOST_TOKENS)


def as_text(value: Any) -> str | None:
    """Text as it is; numbers, lists and objects as JSON; binary data as base64; NaN is none."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, bool | int | float | list | dict):
        return to_json(value, fallback=str, inf_nan_mode="null", bytes_mode="base64").decode()
    return str(value)


def to_request(record: Json, defaults: Defaults) -> Request | RowError:
    """Turn a record into the request that answers it.

    The row's own parameters win over the job's. `model` is always the job's: it is what runs.
    """
    try:
        endpoint, body = _parse(record, defaults)
    except _BadField as bad:
        return bad.error
    if body.get("stream"):
        return RowError("unsupported_parameter", "'stream' has no meaning in a batch: remove it")
    sampling = defaults.sampling
    if not LIMITS.isdisjoint(body):
        sampling = {name: value for name, value in sampling.items() if name not in LIMITS}
    body = {**sampling, **body, "model": defaults.model}
    body.pop("stream_options", None)
    try:
        json.dumps(body, allow_nan=False)
    except (TypeError, ValueError) as error:  # NaN, or what Parquet holds and JSON cannot
        return RowError("invalid_value", f"the request cannot be written as JSON: {error}")
    return Request(endpoint, body)


def _parse(record: Json, defaults: Defaults) -> tuple[Endpoint, Json]:
    messages, prompt = record.get("messages"), record.get("prompt")
    if messages is None and prompt is None:
        if record.get("body") is None:
            raise _BadField("missing_prompt", "the row has no 'prompt', 'messages' or 'body'")
        return _batch_line(record)
    own = _object(record, "sampling") if record.get("sampling") is not None else {}
    if messages is not None:
        return "/v1/chat/completions", {**own, "messages": _messages(messages)}
    if defaults.endpoint != "/v1/chat/completions":
        if not isinstance(prompt, str | list):
            raise _BadField("invalid_type", f"'prompt' is {_kind(prompt)}, not a string")
        name = "prompt" if defaults.endpoint == "/v1/completions" else "input"
        return defaults.endpoint, {**own, name: prompt}
    if not isinstance(prompt, str):
        raise _BadField("invalid_type", f"'prompt' is {_kind(prompt)}, not a string")
    chat = [{"role": "user", "content": prompt}]
    if defaults.system_prompt is not None:
        chat.insert(0, {"role": "system", "content": defaults.system_prompt})
    return "/v1/chat/completions", {**own, "messages": chat}


def _batch_line(record: Json) -> tuple[Endpoint, Json]:
    method = record.get("method")
    if method not in (None, "POST"):
        raise _BadField("unsupported_method", f"'method' is {method!r}; only 'POST' is answered")
    url = record.get("url")
    if url not in ENDPOINTS:
        raise _BadField("unsupported_url", f"'url' is {url!r}; known are {', '.join(ENDPOINTS)}")
    body = _object(record, "body")
    if url == "/v1/chat/completions":
        if body.get("messages") is None:
            raise _BadField("missing_prompt", "'body' has no 'messages'")
        body["messages"] = _messages(body["messages"])
    return url, body


def _messages(value: Any) -> list[Any]:
    if isinstance(value, str):
        value = _json(value, "messages")
    if not isinstance(value, list):
        raise _BadField("invalid_type", f"'messages' is {_kind(value)}, not a list")
    if not value:
        raise _BadField("empty_messages", "'messages' is empty")
    for message in value:
        if not isinstance(message, dict):
            raise _BadField("invalid_type", f"a message is {_kind(message)}, not an object")
    return value


def _object(record: Json, name: str) -> Json:
    value = record[name]
    if isinstance(value, str):
        value = _json(value, name)
    if not isinstance(value, dict):
        raise _BadField("invalid_type", f"{name!r} is {_kind(value)}, not an object")
    return dict(value)


def _json(text: str, name: str) -> Any:
    try:
        return from_json(text)
    except ValueError as error:
        raise _BadField("invalid_json", f"{name!r} is a string but not JSON: {error}") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, int | float) else "binary data")


class _BadField(Exception):
    def __init__(self, code: str, message: str) -> None:
        self.error = RowError(code, message)
