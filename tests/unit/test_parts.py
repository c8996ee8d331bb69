"""Parts: complete Parquet with a receipt, written once, and never taken for another."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.batch import parts as parts_module
from phi4ray.batch.parts import (
    COLUMNS,
    LATENCY_EDGES_S,
    PACK_FROM_BYTES,
    RECEIPT_KEY,
    TOKEN_EDGES,
    Receipt,
    Result,
    encode_part,
    error_of,
    failed_rows,
    histogram,
    make_receipt,
    output_name,
    part_reader,
    part_table,
    read_part,
    read_receipt,
    receipt_of,
    results_of,
    write_part,
)
from phi4ray.batch.plan import Input, Plan, Slice, make_plan, pack
from phi4ray.errors import IncompleteOutputError, ObjectNotFoundError
from phi4ray.protocol import Answer, RowError

ROW = Result("a", "s3://in/a.jsonl", 0)
NONE_CARRIED = pa.table({})


def plan_of(parts: int = 2, name: str = "a") -> Plan:
    pieces = [Slice(file=0, row_start=10 * at, rows=10) for at in range(parts)]
    inputs = [Input(uri=f"s3://in/{name}.jsonl", size=1, etag="e")]
    return make_plan({}, inputs, list(pack(pieces, 10, 1 << 20)), carried="")


def rows(count: int = 10, errors: int = 0) -> list[Result]:
    good = Answer(200, chat("hi"))
    return [
        Result(str(at), "s3://in/a.jsonl", at).answered(good)
        if at >= errors
        else Result(str(at), "s3://in/a.jsonl", at).failed(RowError("invalid_json", "no"))
        for at in range(count)
    ]


def part_of(plan: Plan, shard: int, results: list[Result], started_at: float = 5.0) -> pa.Table:
    receipt = make_receipt(plan.plan_id, shard, results, started_at, 9.0)
    return part_table(results, NONE_CARRIED, receipt)


def chat(content: str | None, **message: Any) -> dict[str, Any]:
    return {
        "choices": [{"finish_reason": "stop", "message": {"content": content, **message}}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3},
    }


# Rows


def test_a_chat_answer_gives_its_first_choice_and_usage() -> None:
    row = ROW.answered(Answer(200, chat("看")))
    assert (row.text, row.finish_reason) == ("看", "stop")
    assert (row.prompt_tokens, row.completion_tokens) == (5, 3)
    assert (row.error_code, row.error_message) == (None, None)
    assert json.loads(row.response or "") == chat("看")


@pytest.mark.parametrize(
    ("body", "text", "reason"),
    [
        ({"choices": [{"text": "done", "finish_reason": "length"}]}, "done", "length"),
        (chat(None, tool_calls=[{"id": "1"}]), None, "stop"),
        ({"choices": [{"text": "first"}, {"text": "second"}]}, "first", None),
        ({"object": "list", "data": [{"embedding": [0.5]}]}, None, None),
        ({"choices": []}, None, None),
    ],
)
def test_answers_of_every_endpoint_fit(body: dict[str, Any], text: Any, reason: Any) -> None:
    row = ROW.answered(Answer(200, body))
    assert (row.text, row.finish_reason, row.error_code) == (text, reason, None)
    assert json.loads(row.response or "") == body


def test_what_json_has_not_is_null_in_a_response() -> None:
    row = ROW.answered(Answer(200, {"choices": [{"text": "x", "logprobs": [float("-inf")]}]}))
    assert json.loads(row.response or "")["choices"][0]["logprobs"] == [None]


def test_half_a_character_costs_an_answer_that_character_alone() -> None:
    call = {"function": {"arguments": '{"say": "\ud83d"}'}}
    body = chat("pair \ud83d\ude00, half \ude00", tool_calls=[call]) | {"p": float("nan")}
    row = ROW.answered(Answer(200, body))
    assert (row.text, row.completion_tokens) == ("pair 😀, half �", 3)
    assert json.loads(row.response or "") == chat(
        "pair 😀, half �", tool_calls=[{"function": {"arguments": '{"say": "�"}'}}]
    ) | {"p": None}
    assert results_of(part_table([row], NONE_CARRIED, make_receipt("p", 0, [row], 0, 1))) == [row]


def test_half_a_character_in_a_refusal_leaves_its_code_and_message() -> None:
    error = {"message": "no \ud83d", "code": "odd \ud83d"}
    row = ROW.answered(Answer(400, {"error": error}))
    assert (row.error_code, row.error_message) == ("odd �", "no �")
    assert results_of(part_table([row], NONE_CARRIED, make_receipt("p", 0, [row], 0, 1))) == [row]


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (400, {"code": "context_length_exceeded"}, "context_length_exceeded"),
        (400, {"code": 400, "param": "input_tokens"}, "context_length_exceeded"),
        (400, {"code": 400, "param": "temperature"}, "invalid_parameter"),
        (400, {"code": 400, "param": None}, "invalid_request"),
        (400, {"code": "400"}, "invalid_request"),
        (404, {"code": 404}, "not_found"),
        (408, {}, "timeout"),
        (422, {}, "invalid_request"),
        (500, {"code": 500}, "engine_error"),
        (503, None, "engine_error"),
        (500, "broken", "engine_error"),
    ],
)
def test_an_engines_refusal_has_a_stable_code(status: int, error: Any, code: str) -> None:
    body = {"error": error | {"message": "why"} if isinstance(error, dict) else error}
    assert error_of(Answer(status, body)).code == code
    row = ROW.answered(Answer(status, body))
    assert (row.error_code, row.text) == (code, None)
    assert row.error_message
    assert json.loads(row.response or "") == body


# Receipts


@given(st.lists(st.floats(0, 1e7)))
def test_a_histogram_counts_every_value_between_its_edges(values: list[float]) -> None:
    for edges in (LATENCY_EDGES_S, TOKEN_EDGES):
        bounds = [-math.inf, *edges, math.inf]
        assert list(histogram(values, edges)) == [
            sum(low <= value < high for value in values) for low, high in itertools.pairwise(bounds)
        ]


def test_a_receipt_adds_its_rows_up() -> None:
    receipt = make_receipt("p", 3, rows(10, errors=4), 5.0, 9.0)
    assert (receipt.rows, receipt.errors, receipt.error_rows) == (10, {"invalid_json": 4}, 4)
    assert (receipt.prompt_tokens, receipt.completion_tokens) == (30, 18)
    assert sum(receipt.latency_s) == sum(receipt.prompt_lengths) == 6


def test_a_receipt_survives_its_part(tmp_path: Path) -> None:
    plan = plan_of()
    table = part_of(plan, 1, rows(10, errors=1))
    written = write_part(str(tmp_path), plan, table)
    assert written == receipt_of(table.schema) == read_receipt(str(tmp_path), plan, 1)
    assert read_part(str(tmp_path), plan, 1).equals(table, check_metadata=True)


def test_the_failed_rows_of_a_part_are_found_by_reading_one_column(tmp_path: Path) -> None:
    plan = plan_of()
    write_part(str(tmp_path), plan, part_of(plan, 1, rows(10, errors=3)[::-1]))
    path = tmp_path / plan.part_name(1)
    data, columns = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(0)
    response = columns.column(COLUMNS.get_field_index("response"))
    first, size = response.dictionary_page_offset, response.total_compressed_size
    data[first : first + size] = bytes(size)
    path.write_bytes(data)
    with pytest.raises(IncompleteOutputError):
        read_part(str(tmp_path), plan, 1)
    assert failed_rows(str(tmp_path), plan, 1) == [7, 8, 9]


results = st.builds(
    Result,
    id=st.text(),
    source_file=st.text(),
    source_row=st.integers(0, 2**62),
    text=st.none() | st.text(),
    finish_reason=st.none() | st.text(),
    response=st.none() | st.text(),
    prompt_tokens=st.none() | st.integers(0, 2**40),
    completion_tokens=st.none() | st.integers(0, 2**40),
    error_code=st.none() | st.text(min_size=1),
    error_message=st.none() | st.text(),
    attempts=st.integers(0, 99),
    latency_s=st.floats(0, 1e6),
)


@given(st.lists(results, max_size=5))
def test_rows_survive_their_part(found: list[Result]) -> None:
    assert results_of(part_table(found, NONE_CARRIED, make_receipt("p", 0, found, 0, 1))) == found


# Large responses


def large(row: Result, size: int = 10 * PACK_FROM_BYTES) -> Result:
    return row.answered(Answer(200, chat("看" + "x" * size)))


def test_a_large_response_is_held_compressed_and_a_small_one_as_it_is() -> None:
    small, whole = rows(1)[0], large(ROW)
    assert small.pack() is small
    packed = whole.pack()
    assert packed.response is None
    assert packed.held_bytes < whole.held_bytes / 10
    assert packed.response_text() == whole.response
    assert packed.text == whole.text


def test_a_part_of_packed_rows_is_that_of_the_rows(tmp_path: Path) -> None:
    plan, whole = plan_of(), [large(row) if at % 3 else row for at, row in enumerate(rows())]
    tables = [part_of(plan, 0, held) for held in (whole, [row.pack() for row in whole])]
    assert tables[0].equals(tables[1], check_metadata=True)
    assert encode_part(tables[0]) == encode_part(tables[1])
    write_part(str(tmp_path), plan, tables[1])
    assert results_of(read_part(str(tmp_path), plan, 0)) == whole


def test_a_part_is_made_and_read_in_groups_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "GROUP_BYTES", 25 * PACK_FROM_BYTES)
    plan, carried = plan_of(), pa.table({"n": range(10)})
    held = [large(row).pack() for row in rows()]
    receipt = make_receipt(plan.plan_id, 0, held, 5.0, 9.0)
    write_part(str(tmp_path), plan, part_reader(held, carried, receipt))
    file = pq.ParquetFile(tmp_path / plan.part_name(0))
    assert [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)] == [2] * 5
    assert read_part(str(tmp_path), plan, 0).equals(part_table(held, carried, receipt))


# Carried columns


def test_answers_come_first_and_carried_columns_after_them() -> None:
    carried = pa.table({"z": [1], "a": ["x"]})
    table = part_table([ROW], carried, make_receipt("p", 0, [ROW], 0, 1))
    assert table.column_names == [*COLUMNS.names, "z", "a"]


@pytest.mark.parametrize(
    ("name", "taken", "output"),
    [
        ("note", ["note"], "note"),
        ("text", ["text"], "input_text"),
        ("text", ["text", "input_text"], "input_input_text"),
        ("input_text", ["text", "input_text"], "input_text"),
    ],
)
def test_a_carried_column_never_hides_an_answer_column(
    name: str, taken: list[str], output: str
) -> None:
    assert output_name(name, taken) == output


@given(st.sets(st.sampled_from([*COLUMNS.names, "note"]).flatmap(
    lambda name: st.sampled_from(["", "input_", "input_input_"]).map(lambda front: front + name)
)))  # fmt: skip
def test_carried_columns_have_names_of_their_own(names: set[str]) -> None:
    outputs = [output_name(name, names) for name in names]
    assert len(set(outputs)) == len(names)
    assert not set(outputs) & set(COLUMNS.names)


# Writing


def test_a_part_that_stands_is_kept_and_its_receipt_returned(tmp_path: Path) -> None:
    plan = plan_of()
    first = write_part(str(tmp_path), plan, part_of(plan, 0, rows(10), started_at=1.0))
    before = (tmp_path / plan.part_name(0)).read_bytes()
    second = write_part(str(tmp_path), plan, part_of(plan, 0, rows(10, errors=2), started_at=2.0))
    assert second == first
    assert (tmp_path / plan.part_name(0)).read_bytes() == before


def test_a_rerun_replaces_a_part(tmp_path: Path) -> None:
    plan = plan_of()
    write_part(str(tmp_path), plan, part_of(plan, 0, rows(10, errors=2)))
    write_part(str(tmp_path), plan, part_of(plan, 0, rows(10)), replacing=True)
    assert read_receipt(str(tmp_path), plan, 0).errors == {}


def test_a_missing_part_is_no_broken_one(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFoundError):
        read_receipt(str(tmp_path), plan_of(), 0)
    with pytest.raises(ObjectNotFoundError):
        failed_rows(str(tmp_path), plan_of(), 0)


def footer_zeroed(data: bytes) -> bytes:
    length = int.from_bytes(data[-8:-4], "little")
    return data[: -8 - length] + bytes(length) + data[-8:]


@pytest.mark.parametrize(
    "broken",
    [
        lambda data: b"",
        lambda data: b"hello",
        lambda data: data[:-20],
        lambda data: data[: len(data) // 2],
        footer_zeroed,
    ],
    ids=["empty", "no Parquet", "cut", "half", "footer of zeros"],
)
def test_an_object_in_a_parts_place_that_is_none_is_refused_by_name(
    tmp_path: Path, broken: Any
) -> None:
    plan = plan_of()
    write_part(str(tmp_path), plan, part_of(plan, 0, rows()))
    path = tmp_path / plan.part_name(0)
    path.write_bytes(broken(path.read_bytes()))
    with pytest.raises(IncompleteOutputError, match=rf"{path.name}.*delete it and run"):
        read_receipt(str(tmp_path), plan, 0)
    with pytest.raises(IncompleteOutputError, match=rf"{path.name}.*delete it and run"):
        failed_rows(str(tmp_path), plan, 0)


@pytest.mark.parametrize("metadata", [None, {RECEIPT_KEY: b"{}"}, {RECEIPT_KEY: b"\xff"}])
def test_parquet_without_a_receipt_of_ours_is_refused(tmp_path: Path, metadata: Any) -> None:
    plan = plan_of()
    table = pa.table({"x": [1]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / plan.part_name(0))
    with pytest.raises(IncompleteOutputError, match="not a part that phi4ray wrote"):
        read_receipt(str(tmp_path), plan, 0)


@pytest.mark.parametrize(("plan_name", "shard"), [("a", 1), ("b", 0)])
def test_a_part_of_another_shard_or_plan_is_refused(
    tmp_path: Path, plan_name: str, shard: int
) -> None:
    plan, other = plan_of(), plan_of(name=plan_name)
    write_part(str(tmp_path), other, part_of(other, shard, rows()))
    (tmp_path / other.part_name(shard)).rename(tmp_path / plan.part_name(0))
    with pytest.raises(IncompleteOutputError, match="holds another shard"):
        read_receipt(str(tmp_path), plan, 0)


def test_receipts_are_closed_to_unknown_members() -> None:
    receipt = make_receipt("p", 0, rows(), 0, 1).model_dump() | {"more": 1}
    with pytest.raises(ValueError, match="more"):
        Receipt.model_validate(receipt)
