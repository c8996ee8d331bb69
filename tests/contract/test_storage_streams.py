"""Streams over objects, of which Arrow reads; and objects too large for one request."""

import gzip
import hashlib
import io
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi4ray.errors import (
    PreconditionError,
)
from phi4ray.storage import join, storage_for

pytestmark = pytest.mark.slow

SIZE = 3 << 20


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["read", "seek", "seek from end", "skip"]),
        st.integers(0, SIZE + 10) | st.integers(0, 100),
    ),
    max_size=8,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(MOVES)
def test_a_stream_moves_as_a_file_does(prefix: str, moves: list[tuple[str, int]]) -> None:
    data = hashlib.shake_256(b"x").digest(SIZE)
    uri = join(prefix, "data")
    if not list(storage_for(uri).list(prefix)):
        storage_for(uri).write(uri, data)
    with storage_for(uri).open(uri) as stream, io.BytesIO(data) as model:
        for move, count in moves:
            for file in (stream, model):
                match move:
                    case "seek":
                        file.seek(count)
                    case "seek from end":
                        file.seek(-min(count, SIZE), io.SEEK_END)
                    case "skip":
                        file.seek(count, io.SEEK_CUR)
            if move == "read":
                assert stream.read(count) == model.read(count)
            assert stream.tell() == model.tell()


def test_arrow_reads_parquet_from_a_stream(prefix: str) -> None:
    table = pa.table({"id": range(50_000), "text": [f"row {n}" for n in range(50_000)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=5000)
    uri = join(prefix, "t.parquet")
    storage_for(uri).write(uri, buffer.getvalue())
    with storage_for(uri).open(uri) as stream:
        file = pq.ParquetFile(stream)
        assert file.read_row_group(9) == table.slice(45_000)
        assert file.read(columns=["text"]) == table.select(["text"])


def test_arrow_unpacks_text_from_a_stream(prefix: str) -> None:
    uri, lines = join(prefix, "t.jsonl.gz"), [b"%d\n" % number for number in range(300_000)]
    storage_for(uri).write(uri, gzip.compress(b"".join(lines), 1))
    with storage_for(uri).open(uri) as stream:
        unpacked = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "gzip")
        assert list(io.BufferedReader(unpacked)) == lines


def test_a_change_under_arrow_is_told_as_what_it_is(s3_prefix: str) -> None:
    uri = join(s3_prefix, "t.parquet")
    table = pa.table({"data": [os.urandom(1 << 20) for _ in range(12)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=1)
    storage_for(uri).write(uri, buffer.getvalue())
    with storage_for(uri).open(uri) as stream:
        file = pq.ParquetFile(stream)
        storage_for(uri).write(uri, buffer.getvalue()[::-1])
        with pytest.raises(PreconditionError):
            file.read()


@pytest.mark.parametrize("method", ["write", "write_new"])
def test_a_large_object_is_written_to_s3_in_parts(
    s3_prefix: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4ray.storage.s3.MULTIPART_BYTES", 5 << 20)
    uri, data = join(s3_prefix, "data"), os.urandom(1 << 20) * 17
    storage = storage_for(uri)
    getattr(storage, method)(uri, data, sha256="00ff")
    assert storage.read(uri) == data
    assert storage.head(uri).etag.endswith("-3")  # S3's etag of 17 MiB in parts of 8
    assert storage.sha256(uri) == "00ff"
    with pytest.raises(PreconditionError):
        storage.write_new(uri, data, sha256="11ee")


def test_s3_keeps_a_digest_that_it_is_given(s3_prefix: str) -> None:
    uri = join(s3_prefix, "data")
    storage_for(uri).write(uri, b"content", sha256="00ff")
    assert storage_for(uri).sha256(uri) == "00ff"
