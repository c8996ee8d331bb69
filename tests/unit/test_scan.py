"""Planning and reading agree: each row lies in one shard, in order, and is read back whole."""

import gzip
import json
import random
import tempfile
import tracemalloc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from phi4ray.batch import planning
from phi4ray.batch.carried import decode_schema
from phi4ray.batch.executor import InProcessExecutor
from phi4ray.batch.files import Reader
from phi4ray.batch.plan import Input, Plan, make_plan
from phi4ray.batch.planning import list_inputs, scan_inputs
from phi4ray.batch.rows import decode_line
from phi4ray.batch.scan import Cut, Unit, duplicates, scan_unit, units_of
from phi4ray.config import BatchConfig
from phi4ray.errors import InputError
from phi4ray.storage import storage_for
from tests.small_jobs import job, prompts, write_lines, write_parquet

BOM = b"\xef\xbb\xbf"

text = st.text(max_size=12)
row = st.builds(
    lambda prompt, extra: json.dumps({"prompt": prompt, "x": extra}, ensure_ascii=False).encode(),
    text,
    st.none() | st.integers() | text,
)
line = st.one_of(
    row,
    row,
    row.map(lambda data: b"  " + data + b" \t"),
    row.map(lambda data: BOM + data),
    st.sampled_from([b"", b" ", b"\t\r", BOM, BOM + b" ", b"\xff\xfe", b"{", b"a\rb", b"\x00"]),
    st.integers(40, 400).map(lambda size: b'{"prompt": "' + b"\xc3\xa9" * size + b'"}'),
)
jsonl = st.builds(
    lambda lines, ends, last: (
        b"".join(data + end for data, end in zip(lines, ends, strict=False)) + last
    ),
    st.lists(line, max_size=12),
    st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=12, max_size=12),
    line,
)
table_rows = st.lists(
    st.fixed_dictionaries(
        {"id": st.none() | text, "prompt": st.none() | text, "x": st.none() | st.integers(0, 9)}
    ),
    max_size=40,
)
file = st.one_of(
    st.tuples(st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson"]), jsonl),
    st.tuples(st.just(".parquet"), table_rows, st.integers(1, 50)),
)


def write(path: Path, content: Sequence[Any]) -> None:
    if path.suffix == ".parquet":
        schema = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("x", pa.int64())])
        write_parquet(path, pa.Table.from_pylist(content[1], schema), content[2])
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(content[1]))
    elif path.suffix == ".zst":
        path.write_bytes(pa.compress(content[1], codec="zstd", asbytes=True))
    else:
        path.write_bytes(content[1])


def rows_in(content: Sequence[Any]) -> list[Any]:
    """What a row is, said another way than by the code under test."""
    if content[0] == ".parquet":
        names = ("id", "prompt")
        return [{n: row[n] for n in names if row[n] is not None} for row in content[1]]
    lines = [data.removeprefix(BOM).rstrip(b"\r") for data in content[1].split(b"\n")]
    return [decode_line(data) for data in lines if data.strip()]


def plan_of(config: BatchConfig, unit_bytes: int = 1 << 20) -> Plan:
    with mock.patch.object(planning, "units_of", partial(units_of, unit_bytes=unit_bytes)):
        return scan_inputs(config, list_inputs(config), {}, InProcessExecutor())


@pytest.mark.slow
@budget(max_examples=120, deadline=None)
@given(
    st.lists(file, min_size=1, max_size=4),
    st.integers(1, 200),
    st.integers(1, 12),
    st.integers(1, 600),
    st.none() | st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_every_row_lies_in_one_shard_in_order_and_is_read_back(
    contents: list[Sequence[Any]],
    unit_bytes: int,
    shard_rows: int,
    shard_bytes: int,
    limit: int | None,
    order: random.Random,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").mkdir()
        for index, content in enumerate(contents):
            write(Path(folder) / "in" / f"{index}{content[0]}", content)
        config = job(
            Path(folder), shard_rows=shard_rows, shard_mib=shard_bytes / (1 << 20), limit=limit
        )
        plan = plan_of(config, unit_bytes)
        reader = Reader(plan.inputs, decode_schema(plan.carried))
        read = {}
        for shard in order.sample(plan.shards, len(plan.shards)):  # in any order
            read[shard.index] = [(piece, reader.read(piece)) for piece in shard.slices]

    expected = [
        (index, at, row)
        for index, content in enumerate(contents)
        for at, row in enumerate(rows_in(content))
    ][:limit]
    found = [
        (piece.file, number, row)
        for shard in plan.shards
        for piece, records in read[shard.index]
        for number, row in enumerate(records.rows, piece.row_start)
    ]
    assert found == expected
    assert plan.rows == len(expected)
    for shard in plan.shards:
        assert 0 < shard.rows <= shard_rows
        size = sum(piece.size for piece in shard.slices)
        assert (
            size <= shard_bytes
            or shard.rows == 1
            or contents[shard.slices[0].file][0] == (".parquet")
        )
        for piece, records in read[shard.index]:
            assert records.carried.schema == decode_schema(plan.carried)
            assert all(len(column) == piece.rows for column in records.carried.columns)
            if contents[piece.file][0] == ".parquet":
                whole = [row["x"] for row in contents[piece.file][1]]
                there = whole[piece.row_start : piece.row_start + piece.rows]
                assert [None if x is None else str(x) for x in there] == [
                    None if x is None else str(x) for x in records.carried["x"].to_pylist()
                ]


@budget(max_examples=60, deadline=None)
@given(jsonl, st.integers(1, 60))
def test_units_cut_anywhere_find_the_rows_of_the_whole(data: bytes, unit_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(data)
        item = Input(
            uri=str(path), size=len(data), etag=storage_for(str(path)).head(str(path)).etag
        )
        scans = [scan_unit(item, unit, Cut(1, 1)) for unit in units_of([item], unit_bytes)]
    pieces = [piece for scan in scans for piece in scan.slices]
    assert sum(scan.rows for scan in scans) == len(pieces)
    rows = [data[piece.start : piece.end] for piece in pieces]
    assert [decode_line(row.strip(b"\r\n").removeprefix(BOM)) for row in rows] == rows_in(
        (".jsonl", data)
    )


def test_only_plain_jsonl_is_cut_into_units() -> None:
    sizes = {"a.jsonl": 10, "b.jsonl.gz": 9, "c.jsonl.zst": 9, "d.parquet": 9, "e.jsonl": 0}
    inputs = [Input(uri=name, size=size, etag="") for name, size in sizes.items()]
    whole = [Unit(file, 0, 9) for file in (1, 2, 3)]
    assert list(units_of(inputs, 4)) == [Unit(0, 0, 4), Unit(0, 4, 8), Unit(0, 8, 10), *whole]


def test_a_plan_is_the_same_however_units_are_cut_where_shards_are(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(20))
    config = job(tmp_path, shard_rows=1)
    assert plan_of(config, 7).plan_id == plan_of(config).plan_id


def test_a_limit_stops_scanning(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(20))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(b"not gzip: reading this would fail")
    plan = plan_of(job(tmp_path, limit=20, shard_rows=8))
    assert [shard.rows for shard in plan.shards] == [8, 8, 4]
    assert [item.rows for item in plan.inputs] == [20, 0]


def test_the_estimate_of_prompts_counts_planned_rows_only(tmp_path: Path) -> None:
    table = pa.table({"prompt": [f"{n:0100}" for n in range(1000)]})
    write_parquet(tmp_path / "in" / "a.parquet", table)
    whole, part = plan_of(job(tmp_path)), plan_of(job(tmp_path, limit=100))
    assert part.prompt_bytes == pytest.approx(whole.prompt_bytes / 10, rel=0.02)


def test_the_plan_knows_the_highest_limit_that_a_row_of_each_shard_states(tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "sampling": {"max_tokens": 7}},
        {"prompt": "b", "sampling": {"max_tokens": 70, "n": 2}},
        {"custom_id": "c", "url": "/v1/chat/completions", "body": {**body, "max_tokens": 9}},
        {"prompt": "d", "body": {"max_tokens": 99}},  # beside a prompt, `body` is carried
        {"prompt": "e", "sampling": "{}"},
        {"prompt": "f", "sampling": {"max_tokens": "many"}},
        {"prompt": "g", "sampling": {"max_tokens": 10**18}},
    ]
    write_lines(tmp_path / "in" / "a.jsonl", [*rows, b"{"])
    found = plan_of(job(tmp_path, shard_rows=2))
    assert [shard.longest for shard in found.shards] == [140, 9, None, 1 << 31]
    # It is no part of what the job is: plans of before it was known stay what they are.
    forgotten = [
        shard.model_copy(
            update={"slices": tuple(s.model_copy(update={"longest": 0}) for s in shard.slices)}
        )
        for shard in found.shards
    ]
    again = make_plan(found.identity, found.inputs, forgotten, carried=found.carried)
    assert again.plan_id == found.plan_id


def test_inputs_without_rows_make_an_empty_plan(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        (folder / name).write_bytes(b"")
    (folder / "d.jsonl").write_bytes(b"\n\r\n \n")
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b""))
    write_parquet(folder / "f.parquet", pa.table({"prompt": pa.array([], pa.string())}))
    plan = plan_of(job(tmp_path))
    assert (plan.rows, plan.shards, len(plan.inputs)) == (0, (), 6)


# Files that are not what their names claim


def test_parquet_without_a_request_column_is_refused_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", pa.table({"question": ["x"], "n": [1]}))
    with pytest.raises(InputError, match=r"a\.parquet has no column 'prompt'.*has question, n"):
        plan_of(job(tmp_path))


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.table([["x"], [1], [2]], names=["prompt", "n", "n"])
    write_parquet(tmp_path / "in" / "a.parquet", table)
    with pytest.raises(InputError, match=r"a\.parquet has more than one column 'n'"):
        plan_of(job(tmp_path))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.parquet", b""),
        ("a.parquet", b"PAR1 but no more"),
        ("a.jsonl.gz", b'{"prompt": "x"}\n'),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 999, mtime=0)[:-9]),
        ("a.jsonl.zst", b'{"prompt": "x"}\n'),
        ("a.jsonl.zst", pa.compress(b'{"prompt": "x"}\n' * 999, codec="zstd", asbytes=True)[:-5]),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        plan_of(job(tmp_path))


def test_a_parquet_page_of_ids_that_is_corrupt_fails_the_file_by_name(tmp_path: Path) -> None:
    ids = [f"{n:032}" for n in range(99)]
    path = write_parquet(tmp_path / "in" / "a.parquet", pa.table({"id": ids, "prompt": ids}))
    data = bytearray(path.read_bytes())
    data[4:100] = bytes(96)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.parquet holds rows that cannot be read"):
        plan_of(job(tmp_path))


# Ids


def test_duplicates_are_counted_over_all_files_with_the_first_pair(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{"id": i, "prompt": "x"} for i in ("a", "b", "a")])
    rows = pa.table({"custom_id": ["c", None, "b"], "id": ["a", "a", "z"], "prompt": ["x"] * 3})
    write_parquet(tmp_path / "in" / "b.parquet", rows)
    plan = plan_of(job(tmp_path, shard_rows=2))
    assert plan.duplicate_ids == 3  # a, by its id where custom_id is null, and b
    places = plan.duplicate_example or ""
    assert places in {
        f"{tmp_path}/in/a.jsonl#0 and {tmp_path}/in/a.jsonl#2",
        f"{tmp_path}/in/a.jsonl#1 and {tmp_path}/in/b.parquet#2",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_of_a_whole_file_s_ids_a_few_bytes_each_are_held(tmp_path: Path, name: str) -> None:
    def peak(rows: int) -> int:
        ids, path = [f"row-{n}" for n in range(rows)], tmp_path / f"{rows}-{name}"
        if name.endswith(".parquet"):
            write_parquet(path, pa.table({"id": ids, "prompt": ids}), row_group_size=1000)
        else:
            lines = (json.dumps({"id": one, "prompt": "p"}) for one in ids)
            path.write_bytes(gzip.compress("\n".join(lines).encode(), 1))
        found = storage_for(str(path)).head(str(path))
        item = Input(uri=found.uri, size=found.size, etag=found.etag)
        tracemalloc.start()
        try:
            assert len(scan_unit(item, Unit(0, 0, item.size), Cut(1000, 1 << 20)).ids) == rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)  # what is imported and cached the first time
    assert peak(50_000) - peak(35_000) < 15_000 * 30


def test_rows_without_an_id_are_no_duplicates(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x"},
        {"prompt": "x"},
        {"id": None, "prompt": "x"},
        {"id": "", "prompt": "x"},
    ]
    write_lines(tmp_path / "in" / "a.jsonl", [*rows, {"id": "", "prompt": "y"}, b"{", b"["])
    assert plan_of(job(tmp_path)).duplicate_ids == 0


def test_rows_behind_the_limit_are_no_duplicates(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{"id": i, "prompt": "x"} for i in ("a", "b", "a")])
    assert plan_of(job(tmp_path, limit=2)).duplicate_ids == 0
    assert plan_of(job(tmp_path, limit=3)).duplicate_ids == 1


@given(st.lists(st.integers(0, 9), max_size=40))
def test_duplicates_are_rows_that_repeat_an_earlier_id(ids: list[int]) -> None:
    count, pair = duplicates(np.array(ids, np.uint64))
    named = [i for i in ids if i]
    assert count == len(named) - len(set(named))
    assert (pair is None) == (count == 0)
    if pair:
        assert pair[0] < pair[1]
        assert ids[pair[0]] == ids[pair[1]] != 0


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([b"ok", b"\xff", None]).view(pa.string()),
        pa.array([b"ok", b"\xff", None]),
        pa.array([1, 2, None]),
        pa.array([[1], [1, 2], None]),
        pa.array([{"a": 1}, {"a": 2}, None]),
    ],
    ids=lambda ids: str(ids.type),
)
def test_ids_of_any_type_can_be_planned_and_read(tmp_path: Path, ids: pa.Array) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", pa.table({"id": ids, "prompt": ["x", "y", "z"]}))
    plan = plan_of(job(tmp_path))
    records = Reader(plan.inputs, decode_schema(plan.carried)).read(plan.shards[0].slices[0])
    assert (plan.duplicate_ids, len(records.rows)) == (0, 3)
