"""The chats of a fine-tune as tokens: made once, before any GPU is asked for, and kept as Parquet.

Every worker reads the same file, so that a run which goes on where another one was killed sees the
same rows in the same order.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from phi4ray.storage import join, storage_for
from phi4ray.train.chats import Chat, Refused
from phi4ray.train.masking import IGNORED, ChatTokenizer, Example, to_example

TOKENS_NAME = "_tokens.parquet"
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
BATCH_ROWS = 4096


def tokenize(
    rows: Iterable[Chat | Refused], tokenizer: ChatTokenizer, max_length_tokens: int
) -> tuple[pa.Table, list[Refused]]:
    """Tokenize and mask chats; gives the table of `SCHEMA`, and the rows that are not in it."""
    refused: list[Refused] = []

    def examples() -> Iterator[Example]:
        for row in rows:
            made = (
                row if isinstance(row, Refused) else to_example(row, tokenizer, max_length_tokens)
            )
            if isinstance(made, Refused):
                refused.append(made)
            else:
                yield made

    return pa.Table.from_batches(_batches(examples()), SCHEMA), refused


def _batches(examples: Iterator[Example]) -> Iterator[pa.RecordBatch]:
    held: list[dict[str, list[int]]] = []
    for example in examples:
        held.append({"input_ids": example.input_ids, "labels": example.labels})
        if len(held) == BATCH_ROWS:
            yield pa.RecordBatch.from_pylist(held, SCHEMA)
            held = []
    if held:
        yield pa.RecordBatch.from_pylist(held, SCHEMA)


def count_tokens(table: pa.Table) -> tuple[int, int]:
    """Tokens of all chats, and those of them that are learned."""
    labels = table["labels"].combine_chunks().flatten().to_numpy()
    return len(labels), int((labels != IGNORED).sum())


def write_tokens(output: str, table: pa.Table) -> None:
    """Keep the table under the output prefix."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    uri = join(output, TOKENS_NAME)
    storage_for(uri).write(uri, sink.getvalue())


def read_tokens(output: str) -> "TokenRows":
    """The table that `write_tokens` kept.

    Raises:
        ObjectNotFoundError: there is none.
    """
    uri = join(output, TOKENS_NAME)
    return TokenRows(pq.read_table(io.BytesIO(storage_for(uri).read(uri))))


class TokenRows(Sequence[dict[str, list[int]]]):
    """The rows of a table as `{"input_ids": [...], "labels": [...]}`: a torch map-style dataset."""

    def __init__(self, table: pa.Table) -> None:
        self._columns = {name: table[name].combine_chunks() for name in SCHEMA.names}

    def __len__(self) -> int:
        return len(self._columns["labels"])

    def __getitem__(self, at: Any) -> Any:
        return {name: column[at].as_py() for name, column in self._columns.items()}
