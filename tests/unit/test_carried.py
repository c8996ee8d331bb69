"""Carried columns: one type over all inputs, no value lost, and never a crash for odd ones."""

import datetime
import io
import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import to_json

from phi4ray.batch.carried import (
    carried_schema,
    carried_table,
    conform,
    decode_schema,
    encode_schema,
    json_kind,
)
from phi4ray.protocol import RowError

UTC = datetime.UTC
CATEGORY = pa.dictionary(pa.int8(), pa.string())
"""As pandas writes up to 127 categories."""
REQUIRED = pa.struct([pa.field("a", pa.int64(), nullable=False)])
AB = pa.struct([("a", pa.int8()), ("b", pa.timestamp("s"))])
OPTIONAL = pa.struct([("a", pa.int64())])
BROKEN_TEXT = pa.array([b"fine", b"\xff\xfe", None]).view(pa.string())

SAMPLES: dict[pa.DataType, list[Any]] = {
    pa.null(): [None],
    pa.bool_(): [True, None],
    pa.int8(): [-128, 127],
    pa.int64(): [-(2**63), 2**63 - 1, None],
    pa.uint8(): [255],
    pa.uint64(): [2**64 - 1, 0],
    pa.float16(): [1.5, None],
    pa.float32(): [0.1, float("inf")],
    pa.float64(): [1e300, None],
    pa.string(): ["é", "", None],
    pa.large_string(): ["看"],
    pa.string_view(): ["view"],
    pa.binary(): [b"\xff\x00", None],
    pa.large_binary(): [b"text"],
    pa.binary(3): [b"\xff\x00a"],
    pa.decimal128(10, 2): [Decimal("1.25"), None],
    pa.decimal128(38, 10): [Decimal("12345678901234567890.5")],
    pa.decimal256(60, 1): [Decimal("1e40")],
    pa.date32(): [datetime.date(2026, 1, 2)],
    pa.time32("s"): [datetime.time(1, 2, 3)],
    pa.timestamp("s"): [datetime.datetime(9999, 1, 1)],
    pa.timestamp("ns"): [datetime.datetime(2026, 1, 2), None],
    pa.timestamp("us", "UTC"): [datetime.datetime(2026, 1, 2, tzinfo=UTC)],
    pa.duration("us"): [datetime.timedelta(seconds=1)],
    pa.dictionary(pa.int32(), pa.string()): ["a", "b", "a", None],
    pa.dictionary(pa.int8(), pa.int64()): [5],
    pa.list_(pa.int32()): [[1, None], [], None],
    pa.list_(pa.int64()): [[2**60]],
    pa.large_list(pa.string()): [["a"]],
    pa.list_(pa.null()): [[]],
    pa.struct([("a", pa.int64())]): [{"a": 1}, None],
    pa.struct([("a", pa.int64()), ("b", pa.binary())]): [{"a": 1, "b": b"\xff"}],
    pa.map_(pa.string(), pa.int64()): [[("k", 1)]],
    pa.uuid(): [bytes(16)],
}

json_rows = st.lists(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.just([1, "é"])
    | st.just({"a": None}),
    min_size=1,
    max_size=5,
)


def array(kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return kind.wrap_array(pa.array(SAMPLES[kind], kind.storage_type))
    return pa.array(SAMPLES[kind], kind)


def categorized(kind: pa.DataType, text: str) -> Any:
    """A value of a type that has `CATEGORY` somewhere."""
    if pa.types.is_dictionary(kind):
        return text
    if pa.types.is_struct(kind):
        return {"a": text, "b": 1}
    return [("key", text)] if pa.types.is_map(kind) else [text, text]


def schema_of(rows: Sequence[Any] = (), *types: pa.DataType) -> pa.Schema:
    """The schema of a column "x" with these JSON values, and these Parquet types."""
    kinds = [{"x": {json_kind(value)}} for value in rows]
    return carried_schema(kinds, [pa.schema([("x", kind)]) for kind in types])


def carry(rows: Sequence[Any]) -> tuple[pa.DataType, list[Any]]:
    schema = schema_of(rows)
    column = carried_table([{"x": value} for value in rows], schema)["x"]
    return column.type, column.to_pylist()


# JSON members


@pytest.mark.parametrize(
    ("values", "kind", "carried"),
    [
        ([True, None, False], pa.bool_(), [True, None, False]),
        ([1, None, -(2**63)], pa.int64(), [1, None, -(2**63)]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        (["a", "é"], pa.string(), ["a", "é"]),
        ([None, None], pa.string(), [None, None]),
        ([1, "a"], pa.string(), ["1", "a"]),
        ([True, 1], pa.string(), ["true", "1"]),
        ([2**63, 1], pa.string(), [str(2**63), "1"]),
        ([{"a": [1, None]}, None], pa.string(), ['{"a":[1,null]}', None]),
        ([[1], "x", 2.5], pa.string(), ["[1]", "x", "2.5"]),
        ([float("nan"), "x"], pa.string(), [None, "x"]),
        ([float("inf"), 1], pa.float64(), [float("inf"), 1.0]),
    ],
)
def test_json_members_have_the_type_that_all_rows_fit(
    values: list[Any], kind: pa.DataType, carried: list[Any]
) -> None:
    assert carry(values) == (kind, carried)


@given(json_rows)
def test_any_json_values_can_be_carried(values: list[Any]) -> None:
    _, carried = carry(values)
    assert len(carried) == len(values)
    for value, found in zip(values, carried, strict=True):
        if isinstance(value, list | dict):
            assert json.loads(found) == value
        if value is None:
            assert found is None


def test_error_rows_and_rows_without_the_member_are_null() -> None:
    schema = pa.schema([("x", pa.int64())])
    rows = [{"x": 1}, RowError("invalid_json", ""), {}, {"x": None}]
    assert carried_table(rows, schema)["x"].to_pylist() == [1, None, None, None]


def test_a_member_that_makes_one_rows_request_is_carried_only_from_others() -> None:
    schema = pa.schema([("url", pa.string())])
    page = {"prompt": "x", "url": "https://example.org"}
    line = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}}
    assert carried_table([page, line], schema)["url"].to_pylist() == ["https://example.org", None]


# Parquet columns


@pytest.mark.parametrize("kind", SAMPLES, ids=str)
def test_one_files_type_is_kept_with_every_value(kind: pa.DataType) -> None:
    schema = schema_of([], kind)
    table, broken = conform(pa.table({"x": array(kind)}), schema)
    assert not broken
    if pa.types.is_null(kind):  # no reader takes a column without a type
        assert schema.field("x").type == pa.string()
    elif pa.types.is_dictionary(kind):
        assert table["x"].to_pylist() == SAMPLES[kind]
    else:
        assert table["x"].combine_chunks().equals(array(kind))


@pytest.mark.parametrize(
    ("kind", "lasts"),
    [
        (CATEGORY, pa.dictionary(pa.int32(), pa.string())),
        (
            pa.dictionary(pa.int8(), pa.string(), ordered=True),
            pa.dictionary(pa.int32(), pa.string(), ordered=True),
        ),
        (
            pa.struct([("a", CATEGORY), ("b", pa.int8())]),
            pa.struct([("a", pa.string()), ("b", pa.int8())]),
        ),
        (pa.list_(CATEGORY), pa.list_(pa.string())),
        (pa.large_list(CATEGORY), pa.large_list(pa.string())),
        (pa.list_(CATEGORY, 2), pa.list_(pa.string(), 2)),
        (pa.map_(pa.string(), CATEGORY), pa.map_(pa.string(), pa.string())),
        (pa.list_view(CATEGORY), pa.string()),
    ],
    ids=str,
)
def test_categories_of_any_files_can_be_put_together(kind: pa.DataType, lasts: pa.DataType) -> None:
    schema = schema_of([], kind)
    assert schema.field("x").type == lasts
    assert decode_schema(encode_schema(pa.schema([("x", kind)]))) == schema  # of an old plan
    tables, expected = [], []
    for name in "abc":
        texts = [f"{name}{at}" for at in range(100)]
        values = [categorized(kind, text) for text in texts]
        tables.append(conform(pa.table({"x": pa.array([*values, None], kind)}), schema)[0])
        tables.append(conform(pa.table({"y": [1]}), schema)[0])
        expected += [*values, None, None]
    whole = pa.concat_tables(tables)["x"].combine_chunks()
    whole.validate(full=True)
    if pa.types.is_string(lasts):
        expected = [value and to_json(value).decode() for value in expected]
    assert whole.to_pylist() == expected


@pytest.mark.parametrize(
    ("kind", "value", "lasts"),
    [
        (REQUIRED, {"a": 1}, OPTIONAL),
        (
            pa.struct([pa.field("s", REQUIRED, nullable=False)]),
            {"s": {"a": 1}},
            pa.struct([("s", OPTIONAL)]),
        ),
        (
            pa.list_(pa.field("element", REQUIRED, nullable=False)),
            [{"a": 1}],
            pa.list_(pa.field("element", OPTIONAL)),
        ),
        (
            pa.list_(pa.field("item", pa.int64(), nullable=False), 2),
            [1, 2],
            pa.list_(pa.int64(), 2),
        ),
    ],
    ids=str,
)
def test_required_members_are_carried_and_may_be_null_where_a_file_has_not_the_column(
    kind: pa.DataType, value: Any, lasts: pa.DataType
) -> None:
    schema = schema_of([], kind)
    assert schema.field("x").type == lasts
    files = [pa.table({"x": pa.array([value, value], kind)}), pa.table({"y": [1]})]
    table = pa.concat_tables([conform(file, schema)[0] for file in files]).combine_chunks()
    pq.write_table(table, part := io.BytesIO())
    assert pq.read_table(part)["x"].to_pylist() == [value, value, None]


def test_the_schema_survives_the_plan_file() -> None:
    schema = carried_schema([], [pa.schema([(str(at), kind)]) for at, kind in enumerate(SAMPLES)])
    assert decode_schema(encode_schema(schema)) == schema


def test_a_file_without_the_column_has_nulls() -> None:
    schema = schema_of([], pa.date32())
    table, broken = conform(pa.table({"y": [1, 2]}), schema)
    assert (table.schema, table["x"].to_pylist(), broken) == (schema, [None, None], {})


@pytest.mark.parametrize(
    ("types", "kind"),
    [
        ([pa.int8(), pa.int64()], pa.int64()),
        ([pa.int64(), pa.float32()], pa.float64()),
        ([pa.null(), pa.int32()], pa.int32()),
        ([pa.int8(), pa.decimal128(10, 2)], pa.decimal128(10, 2)),
        ([pa.large_string(), pa.string()], pa.string()),
        ([pa.timestamp("s"), pa.timestamp("ns")], pa.string()),  # ns end in the year 2262
        ([pa.duration("s"), pa.duration("ms")], pa.string()),
        ([pa.time32("s"), pa.time64("ns")], pa.time64("ns")),
        ([pa.list_(pa.timestamp("us")), pa.list_(pa.timestamp("ns"))], pa.string()),
        ([pa.struct([("a", pa.uint64())]), pa.struct([("a", pa.int8())])], pa.string()),
        ([pa.struct([("a", pa.int64())]), pa.struct([("a", pa.float64())])], pa.string()),
        ([pa.struct([("a", pa.int8())]), AB], AB),
        ([pa.timestamp("us"), pa.timestamp("us", "UTC")], pa.string()),
        ([pa.uint64(), pa.uint8()], pa.uint64()),
        ([pa.uint64(), pa.int8()], pa.string()),  # no integer holds both
        ([pa.float16(), pa.decimal128(10, 2)], pa.string()),  # Arrow cannot convert these
        ([pa.int64(), pa.decimal128(10, 2)], pa.string()),
        ([pa.string(), pa.int64()], pa.string()),
        ([pa.bool_(), pa.int64()], pa.string()),
        ([pa.list_(pa.int32()), pa.list_(pa.int64())], pa.list_(pa.int64())),
        ([pa.list_(pa.int32()), pa.struct([("a", pa.int8())])], pa.string()),
    ],
)
def test_files_that_disagree_meet_in_a_wider_type(
    types: list[pa.DataType], kind: pa.DataType
) -> None:
    assert schema_of([], *types).field("x").type == kind
    assert schema_of([], *reversed(types)).field("x").type == kind


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (pa.int64(), [str(-(2**63)), str(2**63 - 1), None]),
        (pa.uint64(), [str(2**64 - 1), "0"]),
        (pa.bool_(), ["true", None]),
        (pa.date32(), ["2026-01-02"]),
        (pa.timestamp("us", "UTC"), ["2026-01-02 00:00:00.000000Z"]),
        (pa.decimal128(10, 2), ["1.25", None]),
        (pa.binary(), ["/wA=", None]),
        (pa.large_string(), ["看"]),
        (pa.dictionary(pa.int32(), pa.string()), ["a", "b", "a", None]),
        (pa.list_(pa.int32()), ["[1,null]", "[]", None]),
        (pa.struct([("a", pa.int64()), ("b", pa.binary())]), ['{"a":1,"b":"_w=="}']),
        (pa.map_(pa.string(), pa.int64()), ['{"k":1}']),
        (pa.uuid(), ["00000000-0000-0000-0000-000000000000"]),
    ],
)
def test_beside_text_every_type_becomes_text(kind: pa.DataType, texts: list[str]) -> None:
    table, broken = conform(pa.table({"x": array(kind)}), schema_of(["text"], kind))
    assert table["x"].to_pylist() == texts
    assert not broken


@given(
    json_rows, st.sampled_from(sorted(SAMPLES, key=str)), st.sampled_from(sorted(SAMPLES, key=str))
)
def test_any_mix_of_values_and_types_can_be_carried(
    values: list[Any], one: pa.DataType, other: pa.DataType
) -> None:
    schema = schema_of(values, one, other)
    for kind in (one, other):
        table, broken = conform(pa.table({"x": array(kind)}), schema)
        assert table.schema == schema
        lost = {at for at, value in enumerate(SAMPLES[kind]) if value is not None} & {
            at for at, value in enumerate(table["x"].is_null().to_pylist()) if value
        }
        assert lost == set(broken)
    assert carried_table([{"x": value} for value in values], schema).schema == schema


# Values that cannot be carried


@pytest.mark.parametrize(
    "column",
    [
        BROKEN_TEXT,
        pa.StructArray.from_arrays([BROKEN_TEXT], ["a"]),
        pa.ListArray.from_arrays([0, 1, 2, 3], BROKEN_TEXT),
        pa.DictionaryArray.from_arrays([0, 1, 2], BROKEN_TEXT),
        BROKEN_TEXT.cast(pa.large_string()),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("rows", [[], ["beside JSON text"]])
def test_text_that_is_not_utf8_makes_its_row_an_error(column: pa.Array, rows: list[str]) -> None:
    schema = schema_of(rows, column.type)
    table, broken = conform(pa.table({"x": column}), schema)
    assert broken == {1: RowError("invalid_utf8", "column 'x' holds text that is not UTF-8")}
    table.validate(full=True)
    assert [value is None for value in table["x"].to_pylist()][:2] == [False, True]


def test_times_of_units_that_differ_cost_no_row_and_lose_no_digit() -> None:
    far = pa.array([datetime.datetime(9999, 12, 31)], pa.timestamp("us"))
    fine = pa.array([1], pa.timestamp("ns"))
    schema = schema_of([], far.type, fine.type)
    carried = [conform(pa.table({"x": column}), schema) for column in (far, fine)]
    assert [broken for _, broken in carried] == [{}, {}]
    assert [table["x"].to_pylist() for table, _ in carried] == [
        ["9999-12-31 00:00:00.000000"],
        ["1970-01-01 00:00:00.000000001"],
    ]


def test_a_value_out_of_a_types_range_makes_its_row_an_error() -> None:
    early = pa.array(
        [datetime.datetime(2026, 1, 1), datetime.datetime(1066, 1, 1)], pa.timestamp("s")
    )
    schema = pa.schema([("x", pa.timestamp("ns"))])  # of an old plan
    table, broken = conform(pa.table({"x": early}), schema)
    assert {at: error.code for at, error in broken.items()} == {1: "invalid_value"}
    assert [value is None for value in table["x"].to_pylist()] == [False, True]
