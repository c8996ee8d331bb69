"""Reading slices: every format to the same records, forward and again, and files that break."""

import datetime
import gzip
import io
import json
import os
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.batch import files, lines, parquet
from phi4ray.batch.carried import decode_schema
from phi4ray.batch.executor import InProcessExecutor
from phi4ray.batch.files import Reader
from phi4ray.batch.lines import row_of
from phi4ray.batch.parquet import plain
from phi4ray.batch.plan import Plan, Slice
from phi4ray.batch.planning import list_inputs, scan_inputs
from phi4ray.batch.rows import Defaults, Request, to_request
from phi4ray.errors import InputChangedError, InputError, TransientStorageError
from phi4ray.protocol import RowError
from phi4ray.storage.local import LocalStorage
from tests.small_jobs import job, prompts, write_lines, write_parquet

HELLO = [{"role": "user", "content": "hello"}]


def planned(folder: Path, **changes: Any) -> tuple[Plan, Reader, list[Slice]]:
    config = job(folder, **changes)
    plan = scan_inputs(config, list_inputs(config), {}, InProcessExecutor())
    pieces = [piece for shard in plan.shards for piece in shard.slices]
    return plan, Reader(plan.inputs, decode_schema(plan.carried)), pieces


def read_table(folder: Path, table: pa.Table) -> tuple[list[Any], pa.Table]:
    """The records and carried columns of a Parquet file."""
    write_parquet(folder / "in" / "a.parquet", table)
    _, reader, pieces = planned(folder)
    records = reader.read(pieces[0])
    return records.rows, records.carried


def request_of(record: Any) -> dict[str, Any]:
    request = to_request(record, Defaults("tiny"))
    assert isinstance(request, Request), request
    return request.body


# Lines


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (b"{}\n", b"{}"),
        (b"{}\r\n", b"{}"),
        (b"{}", b"{}"),
        (b"\xef\xbb\xbf{}\n", b"{}"),
        (b" {} \n", b" {} "),
        (b"{\r}\n", b"{\r}"),
        (b"\n", None),
        (b" \t\r\n", None),
        (b"\xef\xbb\xbf\r\n", None),
        (b"", None),
    ],
)
def test_a_row_is_a_line_without_its_end_and_a_blank_line_is_none(
    line: bytes, row: bytes | None
) -> None:
    assert row_of(line) == row


def test_every_packing_of_the_same_lines_reads_the_same(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in prompts(3000))
    (tmp_path / "in").mkdir()
    half = len(data) // 2
    packed = {
        "a.jsonl": data,
        "b.jsonl.gz": gzip.compress(data),
        "c.jsonl.zst": pa.compress(data, codec="zstd", asbytes=True),
        # Files that were put together from packed pieces are packed files.
        "d.jsonl.gz": gzip.compress(data[:half]) + gzip.compress(data[half:]),
        "e.jsonl.zst": b"".join(
            pa.compress(piece, codec="zstd", asbytes=True) for piece in (data[:half], data[half:])
        ),
    }
    for name, content in packed.items():
        (tmp_path / "in" / name).write_bytes(content)
    plan, reader, pieces = planned(tmp_path, shard_rows=1000)
    rows: dict[int, list[Any]] = {file: [] for file in range(5)}
    for piece in pieces:
        rows[piece.file] += reader.read(piece).rows
    assert [item.rows for item in plan.inputs] == [3000] * 5
    assert all(found == prompts(3000) for found in rows.values())


def test_a_line_of_ten_megabytes_is_one_row_among_others(tmp_path: Path) -> None:
    huge = {"prompt": "é" * (5 << 20)}
    write_lines(tmp_path / "in" / "a.jsonl", [{"prompt": "a"}, huge, {"prompt": "b"}])
    _, reader, pieces = planned(tmp_path, shard_mib=1)
    assert [reader.read(piece).rows for piece in pieces] == [
        [{"prompt": "a"}],
        [huge],
        [{"prompt": "b"}],
    ]


# Parquet values


def test_a_struct_states_only_the_members_its_row_has(tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": "hello", "name": None, "tools": None}],
        [{"role": "user", "content": "hello", "name": "ada", "tools": [{"a": None, "b": 1}]}],
        None,
    ]
    rows, _ = read_table(tmp_path, pa.table({"messages": messages, "prompt": [None, None, "x"]}))
    assert rows == [
        {"messages": HELLO},
        {"messages": [HELLO[0] | {"name": "ada", "tools": [{"b": 1}]}]},
        {"prompt": "x"},
    ]


@pytest.mark.parametrize(
    "messages",
    [
        pa.array([HELLO]),
        pa.array([json.dumps(HELLO)]),
        pa.array([json.dumps(HELLO)], pa.large_string()),
        pa.array([json.dumps(HELLO)]).dictionary_encode(),
        pa.array(
            [[[("role", "user"), ("content", "hello")]]],
            pa.list_(pa.map_(pa.string(), pa.string())),
        ),
    ],
    ids=lambda array: str(array.type),
)
def test_messages_may_be_structs_maps_or_json(tmp_path: Path, messages: pa.Array) -> None:
    rows, _ = read_table(tmp_path, pa.table({"messages": messages}))
    assert request_of(rows[0])["messages"] == HELLO


@pytest.mark.parametrize(
    "sampling",
    [
        pa.array([{"temperature": 0.5, "max_tokens": 8, "stop": None}]),
        pa.array(['{"temperature": 0.5, "max_tokens": 8}']),
        pa.array(
            [{"temperature": Decimal("0.5"), "max_tokens": Decimal(8)}],  # as DuckDB writes them
            pa.struct([("temperature", pa.decimal128(2, 1)), ("max_tokens", pa.decimal128(5, 0))]),
        ),
        pa.array([[("temperature", 0.5), ("max_tokens", 8.0)]], pa.map_(pa.string(), pa.float64())),
    ],
    ids=lambda array: str(array.type),
)
def test_sampling_may_be_a_struct_a_map_or_json(tmp_path: Path, sampling: pa.Array) -> None:
    rows, _ = read_table(tmp_path, pa.table({"prompt": ["hello"], "sampling": sampling}))
    body = request_of(rows[0])
    assert body == {"model": "tiny", "messages": HELLO, "temperature": 0.5, "max_tokens": 8}


def test_batch_lines_may_be_columns(tmp_path: Path) -> None:
    url = "/v1/chat/completions"
    lines = [{"custom_id": "a", "method": "POST", "url": url, "body": {"messages": HELLO}, "k": 1}]
    rows, carried = read_table(tmp_path, pa.Table.from_pylist(lines))
    assert request_of(rows[0])["messages"] == HELLO
    assert carried.to_pylist() == [{"k": 1}]


def test_columns_beside_a_prompt_are_carried_even_where_a_batch_line_has_such(
    tmp_path: Path,
) -> None:
    table = pa.table(
        {"prompt": ["hello"], "url": ["https://example.org"], "body": ["<p>"], "method": ["GET"]}
    )
    rows, carried = read_table(tmp_path, table)
    assert request_of(rows[0])["messages"] == HELLO
    assert carried.to_pylist() == [{"body": "<p>", "method": "GET", "url": "https://example.org"}]


@pytest.mark.parametrize(
    "prompt",
    [
        pa.array(["hello"], pa.large_string()),
        pa.array(["hello"], pa.string_view()),
        pa.array(["hello"]).dictionary_encode(),
        pa.array([b"hello"]),  # writers that do not mark their text
    ],
    ids=lambda array: str(array.type),
)
def test_a_prompt_may_have_any_type_of_text(tmp_path: Path, prompt: pa.Array) -> None:
    rows, _ = read_table(tmp_path, pa.table({"prompt": prompt}))
    assert request_of(rows[0])["messages"] == HELLO


def test_rows_that_are_not_utf8_are_errors_and_their_neighbours_are_not(tmp_path: Path) -> None:
    bad = pa.array([b"ok", b"\xff", b"ok", b"ok"]).view(pa.string())
    note = pa.array([b"a", b"b", b"\xfe", None]).view(pa.string())
    rows, carried = read_table(tmp_path, pa.table({"prompt": bad, "note": note}))
    assert [row.code if isinstance(row, RowError) else row for row in rows] == [
        {"prompt": "ok"},
        "invalid_utf8",
        "invalid_utf8",
        {"prompt": "ok"},
    ]
    assert carried["note"].to_pylist() == ["a", "b", None, None]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
        | st.decimals(allow_nan=False, allow_infinity=False) | st.datetimes() | st.dates()
        | st.times() | st.timedeltas() | st.uuids(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    )
)  # fmt: skip
def test_any_parquet_value_but_broken_text_is_one_that_json_has(value: Any) -> None:
    json.dumps(plain(value), default=lambda left: left.decode("latin-1"))


def test_dates_and_durations_are_text() -> None:
    assert plain({"d": datetime.date(2026, 1, 2)}) == {"d": "2026-01-02"}


def test_row_groups_are_read_from_the_one_that_holds_the_slice(tmp_path: Path) -> None:
    table = pa.table({"prompt": [f"p{n}" for n in range(5000)], "n": list(range(5000))})
    write_parquet(tmp_path / "in" / "a.parquet", table, row_group_size=700)
    _, _, pieces = planned(tmp_path, shard_rows=900)
    for at in (5, 2, 0, 4, 1, 3):  # each reader begins somewhere in the file
        _, reader, _ = planned(tmp_path, shard_rows=900)
        records = reader.read(pieces[at])
        first = pieces[at].row_start
        assert records.carried["n"].to_pylist() == list(range(first, first + pieces[at].rows))
        assert records.rows[0] == {"prompt": f"p{first}"}


def test_columns_that_no_one_asked_for_are_not_read(tmp_path: Path) -> None:
    table = pa.table({"a.b": [1], "prompt.x": ["no"], "prompt": ["yes"], "x": [{"y": 1}]})
    rows, carried = read_table(tmp_path, table)
    assert rows == [{"prompt": "yes"}]
    assert carried.to_pylist() == [{"a.b": 1, "prompt.x": "no", "x": {"y": 1}}]


# Reading on


class Reads(LocalStorage):
    """Keeps the sizes of all reads."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def open(self, uri: str, *, etag: str | None = None) -> BinaryIO:
        class Stream(io.FileIO):
            def read(self, size: int | None = -1) -> Any:
                data = super().read(size)
                sizes.append(len(data or b""))
                return data

        sizes = self.sizes
        return cast(BinaryIO, Stream(uri))


def test_a_large_row_group_is_read_in_pieces_and_they_are_not_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {name: [os.urandom(250).hex() for _ in range(2000)] for name in ("prompt", "note")}
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    small = {"data_page_size": 16 << 10, "write_batch_size": 16, "use_dictionary": False}
    pq.write_table(pa.table(columns), path, **small)
    _, reader, pieces = planned(tmp_path)
    storage, most = Reads(), 128 << 10
    monkeypatch.setattr(parquet, "BUFFER_BYTES", most)
    monkeypatch.setattr(parquet, "storage_for", lambda uri: storage)
    for piece in pieces:
        reader.read(piece)
    # Arrow reads a header more than it holds, and the rest of a page that was cut.
    assert max(storage.sizes) <= 2 * most
    assert len(storage.sizes) <= 4 * path.stat().st_size / most


class Counting(LocalStorage):
    """Counts how often files are opened."""

    def __init__(self) -> None:
        self.opened = 0

    def open(self, uri: str, *, etag: str | None = None) -> BinaryIO:
        self.opened += 1
        return super().open(uri, etag=etag)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_slices_in_their_order_cost_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name.endswith(".gz"):
        path = write_lines(tmp_path / "a.jsonl", prompts(4000))
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / name).write_bytes(gzip.compress(path.read_bytes()))
    else:
        write_parquet(tmp_path / "in" / name, pa.Table.from_pylist(prompts(4000)))
    _, reader, pieces = planned(tmp_path, shard_rows=150)
    storage = Counting()
    for module in (files, lines, parquet):
        monkeypatch.setattr(module, "storage_for", lambda uri: storage)
    for piece in pieces:
        reader.read(piece)
    assert storage.opened == 1
    assert reader.read(pieces[3]).rows[0]["prompt"] == "prompt 450"
    assert storage.opened == 2


def test_more_files_than_are_kept_open_can_be_read_in_turn(tmp_path: Path) -> None:
    for file in range(2 * files.MAX_OPEN_FILES):
        table = pa.Table.from_pylist(prompts(20, start=100 * file))
        write_parquet(tmp_path / "in" / f"{file:02}.parquet", table)
    _, reader, pieces = planned(tmp_path, shard_rows=10)
    for piece in sorted(pieces, key=lambda piece: piece.row_start):
        first = 100 * piece.file + piece.row_start
        assert reader.read(piece).carried["n"].to_pylist() == list(range(first, first + 10))


# Faults


class Flaky(LocalStorage):
    """Streams that fail once with a transient error, after so many bytes."""

    def __init__(self, after: int) -> None:
        self.left: int | None = after

    def open(self, uri: str, *, etag: str | None = None) -> BinaryIO:
        stream = super().open(uri, etag=etag)
        storage = self

        class Stream(io.RawIOBase):
            def readable(self) -> bool:
                return True

            def seekable(self) -> bool:
                return True

            def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
                return stream.seek(offset, whence)

            def tell(self) -> int:
                return stream.tell()

            def readinto(self, buffer: Any) -> int:
                if storage.left is not None:
                    storage.left -= len(buffer)
                    if storage.left < 0:
                        storage.left = None
                        raise TransientStorageError("the store is away")
                return stream.readinto(buffer)  # type: ignore[attr-defined, no-any-return]

        return io.BufferedReader(Stream(), 512)


def gz_file(path: Path) -> None:
    data = b"".join(
        os.urandom(60).hex().join(['{"prompt": "', '"}\n']).encode() for _ in range(300)
    )
    path.write_bytes(gzip.compress(data))


def parquet_file(path: Path) -> None:
    texts = [os.urandom(60).hex() for _ in range(300)]
    write_parquet(path, pa.table({"prompt": texts}), row_group_size=50)


@pytest.mark.parametrize(("name", "write"), [("a.jsonl.gz", gz_file), ("a.parquet", parquet_file)])
def test_a_fault_in_the_middle_of_a_file_costs_no_row_when_it_is_read_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path], None],
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / name)
    plan, reader, pieces = planned(tmp_path, shard_rows=40)
    whole = [reader.read(piece).rows for piece in pieces]
    size = (tmp_path / "in" / name).stat().st_size
    hit = 0
    for after in range(0, size, size // 12):
        flaky = partial(lambda storage, uri: storage, Flaky(after))
        for module in (files, lines, parquet):
            monkeypatch.setattr(module, "storage_for", flaky)
        reader = Reader(plan.inputs, decode_schema(plan.carried))
        for piece, rows in zip(pieces, whole, strict=True):
            try:
                found = reader.read(piece).rows
            except TransientStorageError:
                hit += 1
                found = reader.read(piece).rows
            assert found == rows
    assert hit >= 10


def test_an_input_that_changed_is_told_from_one_that_broke(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.parquet", "c.jsonl.gz"):
        path = tmp_path / "in" / name
        if name == "a.jsonl":
            write_lines(path, prompts(5))
        elif name == "b.parquet":
            write_parquet(path, pa.Table.from_pylist(prompts(5)))
        else:
            path.write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 5))
    _, reader, pieces = planned(tmp_path, shard_rows=5)
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(path.read_bytes() + b"\n")
    for piece in pieces:
        with pytest.raises(InputChangedError, match="changed after it was planned"):
            reader.read(piece)
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    for piece in pieces:
        with pytest.raises(InputChangedError, match="removed after it was planned"):
            reader.read(piece)


def test_a_parquet_page_that_is_corrupt_fails_the_file_by_name(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "in" / "a.parquet",
        pa.table({"prompt": [os.urandom(50).hex() for _ in range(99)]}),
    )
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    _, reader, pieces = planned(tmp_path)
    with pytest.raises(InputError, match=r"a\.parquet holds rows that cannot be read"):
        reader.read(pieces[0])


def test_a_slice_that_ends_behind_the_file_is_no_empty_answer(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(5))
    _, reader, pieces = planned(tmp_path)
    more = pieces[0].model_copy(update={"rows": 6})
    with pytest.raises(InputError, match="ends after row 5"):
        reader.read(more)
