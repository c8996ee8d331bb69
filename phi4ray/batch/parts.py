"""Parts: the output objects. One shard makes one part, and the part carries its own receipt.

A part is complete Parquet written by one atomic write under one deterministic name, so a shard is
done when its part exists. The receipt lies in the file's metadata under `phi4ray.receipt`.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from pydantic_core import from_json, to_json

from phi4ray.batch.plan import Plan
from phi4ray.config import Config
from phi4ray.errors import IncompleteOutputError, PreconditionError
from phi4ray.protocol import Answer, Json, RowError
from phi4ray.storage import join, storage_for

RECEIPT_KEY = b"phi4ray.receipt"

COLUMNS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source_file", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("response", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("latency_s", pa.float64(), nullable=False),
    ]
)
"""The answer's columns. `response` is the whole OpenAI response, or error, as JSON text.

`source_row` counts the file's rows from 0. `latency_s` is the time of the last attempt. A row
has `error_code` or an answer, never both.
"""

PACK_FROM_BYTES = 16 << 10
"""From this size on a response is held compressed: one with logprobs has megabytes, a sixth so."""

GROUP_ROWS = 4096
GROUP_BYTES = 64 << 20
"""Of a row group, the most rows, and so many bytes of responses if it has several rows.

Whoever writes or reads a part needs not hold all of it in full.
"""

LATENCY_EDGES_S = tuple(2.0**power for power in range(-8, 13))
TOKEN_EDGES = tuple(2.0**power for power in range(19))


def row_name(source_file: str, source_row: int) -> str:
    """Where a row comes from: the id of those without one, and how their errors begin."""
    return f"{source_file}#{source_row}"


class Packed(NamedTuple):
    """A text in UTF-8, compressed, and its size before."""

    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Result:
    """One row of a part; members are `COLUMNS`.

    A large response may be `packed` instead, until the row is written.
    """

    id: str
    source_file: str
    source_row: int
    text: str | None = None
    finish_reason: str | None = None
    response: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    attempts: int = 0
    latency_s: float = 0.0
    packed: Packed | None = None

    @property
    def held_bytes(self) -> int:
        """What the response takes as it is held."""
        return len(self.packed.data) if self.packed else len(self.response or "")

    @property
    def response_size(self) -> int:
        """What the response takes in full."""
        return self.packed.size if self.packed else len(self.response or "")

    def pack(self) -> "Result":
        """This row with its response compressed, if that is large."""
        if self.response is None or len(self.response) < PACK_FROM_BYTES:
            return self
        text = self.response.encode()
        data = pa.compress(text, codec="zstd", asbytes=True)
        return replace(self, response=None, packed=Packed(data, len(text)))

    def response_text(self) -> str | None:
        """The response in full, packed or not."""
        if self.packed is None:
            return self.response
        data, size = self.packed
        return pa.decompress(data, size, codec="zstd", asbytes=True).decode()  # type: ignore[no-any-return]

    def failed(self, error: RowError) -> "Result":
        """This row, with the reason why it has no answer."""
        return replace(self, error_code=error.code, error_message=error.message)

    def answered(self, answer: Answer) -> "Result":
        """This row, with what the engine said: an answer or an error."""
        try:
            response = to_json(answer.body, inf_nan_mode="null").decode()
        except ValueError:  # a half of a pair of surrogates, which JSON can escape: tool calls do
            answer = Answer(answer.status, _mended(answer.body))
            response = to_json(answer.body, inf_nan_mode="null").decode()
        if answer.status != 200:
            return replace(self, response=response).failed(error_of(answer))
        usage: Json = answer.body.get("usage") or {}
        choice: Json = next(iter(answer.body.get("choices") or ()), {})
        return replace(
            self,
            text=choice["message"].get("content") if "message" in choice else choice.get("text"),
            finish_reason=choice.get("finish_reason"),
            response=response,
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens") or 0,
        )


def _mended(body: Json) -> Json:
    """A body whose text is UTF-8: what is half a character becomes U+FFFD."""
    text = json.dumps(body, ensure_ascii=False).encode("utf-16", "surrogatepass")
    mended: Json = from_json(text.decode("utf-16", "replace"))
    return mended


def error_of(answer: Answer) -> RowError:
    """The stable code of an OpenAI error answer: its own `code`, or its parameter's, or status'.

    vLLM puts the HTTP status in `code`, and says by `param` what was wrong: `input_tokens`, or
    `input_text` where it need not count them, of a prompt that is longer than the context.
    """
    error = answer.body.get("error")
    error = error if isinstance(error, dict) else {"message": str(answer.body)}
    message, code = str(error.get("message") or "no message"), error.get("code")
    if isinstance(code, str) and not code.isdigit():
        return RowError(code, message)
    if error.get("param"):
        too_long = error["param"] in ("input_tokens", "input_text")
        return RowError("context_length_exceeded" if too_long else "invalid_parameter", message)
    by_status = {400: "invalid_request", 404: "not_found", 408: "timeout", 422: "invalid_request"}
    return RowError(by_status.get(answer.status, "engine_error"), message)


Count = Annotated[int, Field(ge=0, lt=1 << 63)]


def _length(edges: Sequence[float]) -> Any:
    return Field(min_length=len(edges) + 1, max_length=len(edges) + 1)


class Receipt(Config):
    """What a part holds, written into the part. Histograms count rows by the edges above.

    `rerun_at` is when the last rerun of its failed rows began, if there was one.
    """

    plan_id: str
    shard: Count
    rows: Count
    errors: Mapping[str, Count]
    prompt_tokens: Count
    completion_tokens: Count
    started_at: float
    finished_at: float
    rerun_at: float | None = None
    latency_s: Annotated[tuple[Count, ...], _length(LATENCY_EDGES_S)]
    prompt_lengths: Annotated[tuple[Count, ...], _length(TOKEN_EDGES)]
    completion_lengths: Annotated[tuple[Count, ...], _length(TOKEN_EDGES)]

    @property
    def error_rows(self) -> int:
        """Rows without an answer."""
        return sum(self.errors.values())

    @property
    def took_s(self) -> float:
        """How long the run that wrote the part was about it."""
        return self.finished_at - (self.started_at if self.rerun_at is None else self.rerun_at)


def make_receipt(
    plan_id: str, shard: int, results: Sequence[Result], started_at: float, finished_at: float
) -> Receipt:
    """Add up a shard's rows. Times are Unix seconds."""
    good = [row for row in results if row.error_code is None]
    return Receipt(
        plan_id=plan_id,
        shard=shard,
        rows=len(results),
        errors=dict(Counter(row.error_code for row in results if row.error_code is not None)),
        prompt_tokens=sum(row.prompt_tokens or 0 for row in results),
        completion_tokens=sum(row.completion_tokens or 0 for row in results),
        started_at=started_at,
        finished_at=finished_at,
        latency_s=histogram([row.latency_s for row in good], LATENCY_EDGES_S),
        prompt_lengths=histogram([row.prompt_tokens or 0 for row in good], TOKEN_EDGES),
        completion_lengths=histogram([row.completion_tokens or 0 for row in good], TOKEN_EDGES),
    )


def histogram(values: Sequence[float], edges: Sequence[float]) -> tuple[int, ...]:
    """Counts of values below the first edge, between each two, and from the last edge on."""
    places = np.searchsorted(edges, values, side="right")
    return tuple(int(n) for n in np.bincount(places, minlength=len(edges) + 1))


def part_table(results: Sequence[Result], carried: pa.Table, receipt: Receipt) -> pa.Table:
    """The table of a part: answers, then carried columns, in the order of the source rows.

    A carried column whose name an answer column has becomes `input_<name>`.
    """
    return part_reader(results, carried, receipt).read_all()


def part_reader(
    results: Sequence[Result], carried: pa.Table, receipt: Receipt
) -> pa.RecordBatchReader:
    """A part's table in pieces, each made when it is read: see `part_table` and `GROUP_BYTES`."""
    fields = list(COLUMNS)
    for column in carried.schema:
        fields.append(column.with_name(output_name(column.name, carried.schema.names)))
    schema = pa.schema(fields, metadata={RECEIPT_KEY: receipt.model_dump_json()})

    def batches() -> Iterator[pa.RecordBatch]:
        for first, end in _groups(results):
            columns = [_column(results[first:end], column) for column in COLUMNS]
            columns += carried.slice(first, end - first).columns
            yield from pa.table(columns, schema=schema).combine_chunks().to_batches()

    return pa.RecordBatchReader.from_batches(schema, batches())


def _column(results: Sequence[Result], column: pa.Field) -> pa.Array:
    if column.name == "response":
        return pa.array([row.response_text() for row in results], column.type)
    return pa.array([getattr(row, column.name) for row in results], column.type)


def _groups(results: Sequence[Result]) -> Iterator[tuple[int, int]]:
    """Where groups of rows begin and end; each has a row."""
    first, size = 0, 0
    for at, row in enumerate(results):
        if at > first and (at - first == GROUP_ROWS or size + row.response_size > GROUP_BYTES):
            yield first, at
            first, size = at, 0
        size += row.response_size
    if first < len(results):
        yield first, len(results)


def output_name(name: str, taken: Iterable[str]) -> str:
    """The name of a carried column in the output."""
    names = set(taken)
    while name in COLUMNS.names:
        name = f"input_{name}"
        while name in names:
            name = f"input_{name}"
    return name


def write_part(
    output: str, plan: Plan, table: pa.Table | pa.RecordBatchReader, *, replacing: bool = False
) -> Receipt:
    """Write a part by one atomic write; see `put_part`."""
    receipt = receipt_of(table.schema)
    return put_part(output, plan, receipt, encode_part(table), replacing=replacing)


def encode_part(table: pa.Table | pa.RecordBatchReader) -> bytes:
    """A part as it is written: Parquet, with a row group for each piece of the table."""
    pieces = table.to_reader() if isinstance(table, pa.Table) else table
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, pieces.schema, compression="zstd") as writer:
        for batch in pieces:
            writer.write_batch(batch, row_group_size=GROUP_ROWS)
    return buffer.getvalue()


def put_part(
    output: str, plan: Plan, receipt: Receipt, data: bytes, *, replacing: bool = False
) -> Receipt:
    """Write an encoded part by one atomic write; returns the receipt of the part that stands.

    Where the store can refuse to overwrite, a part that a racing worker has already written is
    kept as it is; where it cannot, the last of two complete parts wins. Either is correct.
    """
    uri = join(output, plan.part_name(receipt.shard))
    storage, digest = storage_for(uri), hashlib.sha256(data).hexdigest()
    if replacing:
        storage.write(uri, data, sha256=digest)
        return receipt
    try:
        storage.write_new(uri, data, sha256=digest)
    except PreconditionError:
        return read_receipt(output, plan, receipt.shard)
    return receipt


def read_part(output: str, plan: Plan, shard: int) -> pa.Table:
    """Read a whole part.

    Raises:
        ObjectNotFoundError: the shard is not done.
        IncompleteOutputError: the object is no part.
    """
    return read_table(join(output, plan.part_name(shard)))


def read_table(uri: str) -> pa.Table:
    """Read the part that lies there; see `read_part`."""
    data = storage_for(uri).read(uri)
    try:
        table = pq.read_table(io.BytesIO(data))
        receipt_of(table.schema)
        table.select(COLUMNS.names).validate(full=True)
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise _no_part(uri) from error
    return table


def failed_rows(output: str, plan: Plan, shard: int) -> list[int]:
    """The places of a part's rows without an answer; of the part, one column is read.

    Raises:
        ObjectNotFoundError: the shard is not done.
        IncompleteOutputError: the object is no part.
    """
    uri = join(output, plan.part_name(shard))
    with storage_for(uri).open(uri) as stream:
        try:
            codes = pq.read_table(stream, columns=["error_code"])["error_code"].to_pylist()
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise _no_part(uri) from error
    return [at for at, code in enumerate(codes) if code is not None]


def read_receipt(output: str, plan: Plan, shard: int) -> Receipt:
    """Read a part's receipt; costs the file's footer.

    Raises:
        IncompleteOutputError: the object is no part of this plan.
    """
    uri = join(output, plan.part_name(shard))
    with storage_for(uri).open(uri) as stream:
        try:
            receipt = receipt_of(pq.read_schema(stream))
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            raise _no_part(uri) from error
    if (receipt.plan_id, receipt.shard) != (plan.plan_id, shard):
        raise IncompleteOutputError(f"{uri} holds another shard: delete it and run the job again")
    return receipt


def _no_part(uri: str) -> IncompleteOutputError:
    return IncompleteOutputError(
        f"{uri} is not a part that phi4ray wrote: delete it and run the job again"
    )


def receipt_of(schema: pa.Schema) -> Receipt:
    """The receipt in a part's schema."""
    return Receipt.model_validate_json((schema.metadata or {})[RECEIPT_KEY])


def results_of(table: pa.Table) -> list[Result]:
    """A part's rows, decoded: what a rerun of its failed rows starts from."""
    return [Result(**row) for row in table.select(COLUMNS.names).to_pylist()]
