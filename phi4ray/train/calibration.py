"""The texts that a quantization is calibrated on: a random few of many rows.

A row has `messages` (a chat), or `prompt` and optionally `completion` and `system`, or `text`.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from phi4ray.batch.files import is_parquet
from phi4ray.batch.lines import open_lines
from phi4ray.batch.parquet import open_parquet, read_batches, records_of
from phi4ray.batch.plan import Input
from phi4ray.batch.rows import decode_line
from phi4ray.errors import InputError
from phi4ray.protocol import Json, RowError
from phi4ray.storage import expand

T = TypeVar("T")

COLUMNS = ("messages", "prompt", "completion", "system", "text")


def read_samples(patterns: Sequence[str], count: int, seed: int) -> list[Json]:
    """At most `count` rows of the files, chosen at random, each with `messages` or `text`.

    Raises:
        InputError: a file cannot be read, a row has no text, or there is no row.
    """
    inputs = [Input(uri=one.uri, size=one.size, etag=one.etag) for one in expand(patterns)]
    rows = (
        to_sample(record, f"{item.uri} row {at}")
        for item in inputs
        for at, record in enumerate(_records(item))
    )
    chosen = choose(rows, count, seed)
    if not chosen:
        raise InputError(f"{', '.join(patterns)}: no rows to calibrate on")
    return chosen


def to_sample(record: Json | RowError, place: str) -> Json:
    """A row as `{"messages": …}` or `{"text": …}`.

    Raises:
        InputError: it has neither, or something else under their names.
    """
    if isinstance(record, RowError):
        raise InputError(f"{place}: {record.message}")
    messages = record.get("messages")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise InputError(f"{place}: 'messages' is not JSON: {error}") from error
    if messages is None and isinstance(record.get("prompt"), str):
        roles = {"system": "system", "prompt": "user", "completion": "assistant"}
        messages = [
            {"role": role, "content": record[name]}
            for name, role in roles.items()
            if isinstance(record.get(name), str)
        ]
    if _is_chat(messages):
        return {"messages": messages}
    text = record.get("text")
    if messages is None and isinstance(text, str) and text:
        return {"text": text}
    raise InputError(
        f"{place}: a row to calibrate on has 'messages' with role and content, 'prompt' or 'text'"
    )


def choose(rows: Iterable[T], count: int, seed: int) -> list[T]:
    """`count` rows, each as likely as any other, in their order; all if there are fewer.

    Source: Vitter (1985), Random Sampling with a Reservoir, algorithm R. One pass, `count` in
    memory.
    """
    generator = random.Random(seed)
    held: list[tuple[int, T]] = []
    for at, row in enumerate(rows):
        if at < count:
            held.append((at, row))
        elif (place := generator.randrange(at + 1)) < count:
            held[place] = (at, row)
    return [row for _, row in sorted(held, key=lambda pair: pair[0])]


def _is_chat(messages: object) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(one, dict)
            and isinstance(one.get("role"), str)
            and isinstance(one.get("content"), str)
            for one in messages
        )
    )


def _records(item: Input) -> Iterator[Json | RowError]:
    if not is_parquet(item.uri):
        yield from map(decode_line, open_lines(item))
        return
    file = open_parquet(item)
    names = [name for name in file.schema_arrow.names if name in COLUMNS]
    for table in read_batches(item, file, names):
        yield from records_of(table)
