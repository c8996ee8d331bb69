"""Whatever lies in an input, each of its rows is answered or has an error, or the file is named."""

import gzip
import io
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phi4ray.batch.manifest import list_parts
from phi4ray.batch.parts import COLUMNS, read_part
from phi4ray.batch.planning import obtain_plan
from phi4ray.batch.rows import RESERVED
from phi4ray.errors import InputError
from tests.fuzz import broken_texts, budget, damaged, dumped, near, texts, values
from tests.small_jobs import InProcessExecutor, job, run

pytestmark = pytest.mark.slow

ROW = {
    "id": "r1",
    "prompt": "hello",
    "messages": [{"role": "user", "content": "hello"}],
    "sampling": {"max_tokens": 3},
    "meta": 1,
}
BATCH_LINE = {
    "custom_id": "r1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "hello"}]},
}


def answered(name: str, data: bytes, rows: int | None = None) -> list[dict[str, Any]] | None:
    """The output rows of a whole job over one file; None where the file was refused by name."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "in" / name
        path.parent.mkdir()
        path.write_bytes(data)
        config = job(Path(folder), shard_rows=3)
        try:
            summary = run(config)
        except InputError as error:
            refusal = str(error)
        else:
            refusal = None
        if refusal is not None:
            assert str(path) in refusal
            return None
        plan = obtain_plan(config, InProcessExecutor())
        found: list[dict[str, Any]] = []
        for shard in sorted(list_parts(config.output, plan)):
            part = read_part(config.output, plan, shard)
            part.validate(full=True)
            found += part.select(COLUMNS.names).to_pylist()
        assert [row["source_row"] for row in found] == list(range(summary.rows))
        for row in found:
            assert (row["error_code"] is None) != (row["response"] is None or row["text"] is None)
            if row["response"] is None:
                assert f"{path}#{row['source_row']}: " in row["error_message"]
        return found


lines = st.one_of(
    broken_texts,
    near(ROW).map(dumped),
    near(BATCH_LINE).map(dumped),
    near(ROW).map(lambda row: dumped(row, ascii_only=False)),
)
files = st.lists(lines.map(lambda line: line.replace(b"\n", b"")), max_size=6)


@budget(40)
@given(files, st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
@example([b'{"prompt": "x", "' + b"a" * 2000 + b'": 1}'], b"\n")
@example([b'{"prompt": "x", "n": ' + b"9" * 4000 + b"}", b'{"prompt": "x", "n": 1.5}'], b"\n")
def test_each_row_of_jsonl_is_answered_or_has_an_error(rows: list[bytes], end: bytes) -> None:
    found = answered("a.jsonl", end.join(rows))
    assert found is not None
    blank = [row for row in rows if not row.removeprefix(b"\xef\xbb\xbf").strip()]
    assert len(found) == len(rows) - len(blank)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_of_compressed_jsonl_too(kind: str) -> None:
    def pack(data: bytes) -> bytes:
        return gzip.compress(data) if kind == "gz" else pa.compress(data, "zstd", asbytes=True)

    whole = pack(b"".join(dumped(ROW | {"n": n}) + b"\n" for n in range(50)))

    @budget(30)
    @given(files.map(b"\n".join).map(pack) | damaged(whole) | st.binary(max_size=50))
    def check(data: bytes) -> None:
        answered(f"a.jsonl.{kind}", data)

    check()


kinds = st.recursive(
    st.sampled_from(
        [
            pa.null(), pa.bool_(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.string(),
            pa.large_string(), pa.binary(), pa.date32(), pa.timestamp("us"), pa.time64("us"),
            pa.timestamp("us", "Europe/Berlin"), pa.timestamp("us", "No/Where"), pa.duration("s"),
            pa.decimal128(38, 3), pa.dictionary(pa.int32(), pa.string()),
        ]
    ),
    lambda inner: st.one_of(
        inner.map(pa.list_),
        st.lists(st.tuples(st.sampled_from("abc"), inner), min_size=1, max_size=3).map(pa.struct),
        inner.map(lambda kind: pa.map_(pa.string(), kind)),
        inner.map(lambda kind: pa.map_(pa.list_(pa.int64()), kind)),
    ),
    max_leaves=3,
)  # fmt: skip


def column_of(kind: pa.DataType, data: bytes, rows: int) -> pa.Array:
    """A column of any type, its values whatever these bytes mean there."""
    bits = (data * (rows * 16 // len(data) + 1))[: rows * 16]
    if pa.types.is_list(kind):
        inner = column_of(kind.value_type, data, rows)
        return pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), inner)
    if pa.types.is_struct(kind):
        return pa.StructArray.from_arrays(
            [
                column_of(kind.field(at).type, data[at:] + data[:at], rows)
                for at in range(kind.num_fields)
            ],
            [kind.field(at).name for at in range(kind.num_fields)],
        )
    if pa.types.is_map(kind):
        keys, items = (column_of(each, data, rows) for each in (kind.key_type, kind.item_type))
        return pa.MapArray.from_arrays(pa.array(range(rows + 1), pa.int32()), keys, items)
    if pa.types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(
            pa.array([0] * rows, pa.int32()), column_of(kind.value_type, data, 1)
        )
    if pa.types.is_null(kind):
        return pa.nulls(rows)
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        offsets = pa.py_buffer(b"".join((at * 3).to_bytes(4, "little") for at in range(rows + 1)))
        return pa.Array.from_buffers(kind, rows, [None, offsets, pa.py_buffer(bits)])
    if pa.types.is_large_string(kind):
        offsets = pa.py_buffer(b"".join((at * 3).to_bytes(8, "little") for at in range(rows + 1)))
        return pa.Array.from_buffers(kind, rows, [None, offsets, pa.py_buffer(bits)])
    return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(bits)])


names = st.sampled_from([*sorted(RESERVED), "meta", "text", "a\x00b"]) | texts.map(
    lambda name: name.encode("utf-8", "replace").decode()
)
seeds = st.sampled_from([b"abc", b"\x00", b"\xff", b"\xff\x7f", b"7\xc3\xa4"]) | st.binary(
    min_size=1, max_size=24
)
tables = st.dictionaries(names, st.tuples(kinds, seeds), max_size=4)


@budget(50)
@given(tables, st.integers(1, 5))
@example({"prompt": (pa.string(), b"abc"), "id": (pa.timestamp("us"), b"\xff\x7f")}, 1)
@example({"prompt": (pa.time64("us"), b"\xff\x7f")}, 1)
@example({"prompt": (pa.string(), b"abc"), "sampling": (pa.duration("s"), b"\xff\x7f")}, 1)
@example({"prompt": (pa.timestamp("us", "No/Where"), b"\x00")}, 1)
@example({"prompt": (pa.map_(pa.list_(pa.int64()), pa.string()), b"abc")}, 1)
@example({"prompt": (pa.struct([("a", pa.string()), ("a", pa.string())]), b"abc")}, 1)
@example({"prompt": (pa.string(), b"abc"), "meta": (pa.time64("us"), b"\xff\x7f")}, 2)
def test_each_row_of_parquet_is_answered_or_has_an_error(
    columns: dict[str, tuple[pa.DataType, bytes]], rows: int
) -> None:
    table = pa.table(
        {name: column_of(kind, data, rows) for name, (kind, data) in columns.items()}
        or {"none": [1]}
    )
    stream = io.BytesIO()
    try:
        pq.write_table(table, stream)
    except (pa.ArrowException, LookupError):  # no writer makes a file of that
        return
    found = answered("a.parquet", stream.getvalue())
    assert found is None or len(found) == table.num_rows


def whole_parquet() -> bytes:
    stream = io.BytesIO()
    rows = [ROW | {"id": f"r{n}", "prompt": "x" * n} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), stream, row_group_size=7)
    return stream.getvalue()


@budget(80)
@given(damaged(whole_parquet()) | st.binary(max_size=60).map(lambda data: b"PAR1" + data + b"PAR1"))
@example(whole_parquet().replace(b"prompt", b"\x80rompt"))
@example(b"")
@example(b"PAR1")
@example(b"PAR1\xff\xff\xff\x7fPAR1")
def test_damaged_parquet_is_refused_by_name_or_read(data: bytes) -> None:
    answered("a.parquet", data)


@budget(30)
@given(st.lists(st.dictionaries(texts, values, max_size=4), min_size=1, max_size=6))
def test_carried_members_of_any_kind_come_through(extras: list[dict[str, Any]]) -> None:
    rows = [dumped({**extra, "prompt": "x", "messages": None, "body": None}) for extra in extras]
    found = answered("a.jsonl", b"\n".join(rows))
    assert found is not None
    assert len(found) == len(extras)
