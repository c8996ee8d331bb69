"""The output as readers see it: plain pyarrow, pandas and duckdb, all parts together."""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from phi4ray.batch.parts import COLUMNS
from phi4ray.config import BatchConfig
from phi4ray.fake import fake_text
from tests.small_jobs import answers, job, parts, prompts, run, write_lines, write_parquet

UTC = datetime.UTC

RICH = pa.table(
    {
        "id": pa.array([f"p{n}" for n in range(12)]),
        "prompt": [f"prompt {n}" for n in range(12)],
        "at": pa.array([datetime.datetime(2026, 1, 1, tzinfo=UTC)] * 12, pa.timestamp("ns", "UTC")),
        "price": pa.array([Decimal("1.25")] * 12, pa.decimal128(10, 2)),
        "kind": pa.array(["a", "b", None] * 4).dictionary_encode(),
        "long": pa.array(["é"] * 12, pa.large_string()),
        "tags": pa.array([["x", None], [], None] * 4),
        "raw": pa.array([b"\xff\x00", None, b""] * 4),
        "nested": pa.array([{"a": [{"b": 1}]}, None, {"a": []}] * 4),
        "none": pa.nulls(12),
        "big": pa.array([2**64 - 1] * 12, pa.uint64()),
        "text": pa.array([f"original {n}" for n in range(12)]),
        "Text": pa.array(range(12)),
    }
)


@pytest.fixture
def finished(tmp_path: Path) -> BatchConfig:
    """A job over files of every kind whose carried columns agree in little."""
    write_parquet(tmp_path / "in" / "a.parquet", RICH, row_group_size=5)
    lines: list[object] = [
        {"id": "j0", "prompt": "prompt 0", "only": 1, "mixed": 1, "text": "mine", "price": 2},
        {"id": "j1", "prompt": "prompt 1", "mixed": "x", "nested": {"other": [1]}, "text": None},
        b"{ no JSON",
        {"id": "j3", "prompt": "prompt 3", "mixed": {"a": "看"}, "only": 2.5},
    ]
    write_lines(tmp_path / "in" / "b.jsonl", lines)
    url = "/v1/completions"
    write_lines(
        tmp_path / "in" / "c.jsonl",
        [
            {
                "custom_id": "b0",
                "method": "POST",
                "url": url,
                "body": {"prompt": "prompt 0"},
                "id": 9,
            }
        ],
    )
    config = job(tmp_path, shard_rows=4)
    run(config)
    return config


def test_all_parts_have_one_schema_with_answers_first(finished: BatchConfig) -> None:
    schemas = [pq.read_schema(path).remove_metadata() for path in parts(finished).values()]
    assert len(schemas) == 5
    assert all(schema.equals(schemas[0], check_metadata=True) for schema in schemas)
    assert pa.schema(list(schemas[0])[: len(COLUMNS)]) == COLUMNS


def test_pyarrow_reads_all_parts_as_one_dataset(finished: BatchConfig) -> None:
    table = ds.dataset(finished.output).to_table()
    assert table.num_rows == 17
    assert table.schema.names == pq.read_table(finished.output).schema.names
    assert ds.dataset(finished.output).count_rows(ds.field("error_code").is_valid()) == 1


def test_pandas_reads_the_prefix(finished: BatchConfig) -> None:
    frame = pd.read_parquet(finished.output).set_index("id")
    assert len(frame) == 17
    assert frame.loc["p3", "text"] == fake_text("prompt 3")
    assert frame.loc["p3", "input_text"] == "original 3"
    assert frame.loc["p0", "at"] == pd.Timestamp("2026-01-01", tz="UTC")


def test_duckdb_reads_the_parts(finished: BatchConfig) -> None:
    files = f"{finished.output}/*.parquet"
    found = duckdb.sql(
        f"""SELECT count(*), count(DISTINCT (source_file, source_row)), count(error_code),
            sum(completion_tokens), max(price), min(len(tags)) FROM '{files}'"""
    ).fetchall()
    assert found == [(17, 17, 1, 16 * 4, "2", 0)]
    assert duckdb.sql(f"SELECT text FROM '{files}' WHERE id = 'j1'").fetchall() == [
        (fake_text("prompt 1"),)
    ]
    (counts,) = duckdb.sql(f"SELECT count(COLUMNS(*)) FROM '{files}'").fetchall()
    assert len(counts) == pq.read_table(finished.output).num_columns


def test_carried_values_are_the_inputs_own(finished: BatchConfig) -> None:
    rows = {row["id"]: row for row in answers(finished)}
    for n, source in enumerate(RICH.to_pylist()):
        found = rows[f"p{n}"]
        for name in ("at", "kind", "long", "tags", "raw", "big", "Text"):
            assert found[name] == source[name], name
        assert found["input_text"] == source["text"]
        assert (found["none"], found["only"], found["mixed"]) == (None, None, None)
    assert [rows[name]["mixed"] for name in ("j0", "j1", "j3")] == ["1", "x", '{"a":"看"}']
    assert [rows[name]["only"] for name in ("j0", "j1", "j3")] == [1.0, None, 2.5]
    assert [rows[name]["input_text"] for name in ("j0", "j1")] == ["mine", None]
    assert rows["j0"]["price"] == "2"  # no decimal of ten digits holds every integer
    assert rows["p0"]["price"] == "1.25"
    assert [rows[name]["nested"] for name in ("p0", "j1")] == ['{"a":[{"b":1}]}', '{"other":[1]}']
    assert rows["b0"]["input_id"] == 9


def test_a_row_has_an_answer_or_an_error_and_says_where_it_is_from(finished: BatchConfig) -> None:
    for row in answers(finished):
        assert (row["error_code"] is None) == (row["text"] is not None)
        assert (row["error_code"] is None) == (row["error_message"] is None)
        assert row["source_row"] >= 0
        assert row["source_file"].rsplit("/", 1)[1] in {"a.parquet", "b.jsonl", "c.jsonl"}
    (bad,) = [row for row in answers(finished) if row["error_code"]]
    assert bad["id"] == f"{bad['source_file']}#2"


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a.b",
        "a/b",
        'quo"te',
        "看",
        "\U0001f600",
        "_x",
        "part",
        "x" * 500,
        "a\nb",
        "a=b",
        "a\0b",
    ],
)
def test_a_carried_column_may_have_any_name(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [row | {name: row["n"]} for row in prompts(6)])
    config = job(tmp_path, shard_rows=3)
    run(config)
    assert ds.dataset(config.output).to_table()[name].to_pylist() == list(range(6))
    assert pd.read_parquet(config.output)[name].to_list() == list(range(6))
    assert len(duckdb.sql(f"SELECT * FROM '{config.output}/*.parquet'").fetchall()) == 6


def test_a_file_whose_text_is_broken_does_not_break_the_output(tmp_path: Path) -> None:
    note = pa.array([b"fine", b"\xff", None]).view(pa.string())
    table = pa.table({"prompt": ["a", "b", "c"], "note": note, "deep": pa.array([[1], [2], None])})
    write_parquet(tmp_path / "in" / "a.parquet", table)
    config = job(tmp_path)
    run(config)
    assert pd.read_parquet(config.output)["error_code"].to_list()[1] == "invalid_utf8"
    assert len(duckdb.sql(f"SELECT * FROM '{config.output}/*.parquet'").fetchall()) == 3
    assert [row["deep"] for row in answers(config)] == [[1], [2], None]


def test_embeddings_have_a_response_and_no_text(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(2))
    config = job(tmp_path, endpoint="/v1/embeddings")
    run(config)
    found: list[dict[str, Any]] = answers(config)
    assert [row["text"] for row in found] == [None, None]
    assert all('"embedding"' in row["response"] for row in found)
