"""What every store must do, run against files and against S3 by real HTTP."""

import hashlib
import io
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi4ray.errors import (
    ConfigError,
    InputError,
    ObjectNotFoundError,
    PreconditionError,
)
from phi4ray.storage import copy_tree, expand, join, normal, storage_for, upload_tree

NAMES = [
    "plain",
    "with space",
    "日本語",
    "a%20b",
    "plus+plus",
    "hash#1",
    "what?",
    "deep/er/name",
    "q'uo\"te",
]


def put(prefix: str, name: str, data: bytes = b"x") -> str:
    uri = join(prefix, name)
    storage_for(uri).write(uri, data)
    return uri


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_whatever_its_name(prefix: str, name: str) -> None:
    uri = put(prefix, name, b"content")
    storage = storage_for(uri)
    assert storage.read(uri) == b"content"
    assert [item.uri for item in storage.list(prefix)] == [uri]
    assert storage.head(uri).size == 7
    storage.delete(uri)
    with pytest.raises(ObjectNotFoundError, match="there is no"):
        storage.read(uri)
    storage.delete(uri)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, None, b"0123456789"), (3, 7, b"3456"), (3, None, b"3456789"), (8, 99, b"89"),
     (10, 12, b""), (20, None, b""), (4, 4, b"")],
)  # fmt: skip
def test_ranges_are_cut_at_the_end(
    prefix: str, start: int, end: int | None, expected: bytes
) -> None:
    uri = put(prefix, "digits", b"0123456789")
    assert storage_for(uri).read(uri, start, end) == expected


def test_an_empty_object_is_an_object(prefix: str) -> None:
    uri = put(prefix, "empty", b"")
    storage = storage_for(uri)
    assert storage.read(uri) == b""
    assert storage.head(uri).size == 0
    with storage.open(uri) as stream:
        assert stream.read() == b""


def test_a_stream_seeks_and_reads_lines(prefix: str) -> None:
    lines = [f"line {number}".encode() * (number % 50) + b"\n" for number in range(30_000)]
    data = b"".join(lines)
    uri = put(prefix, "lines", data)
    with storage_for(uri).open(uri) as stream:
        assert stream.seekable()
        assert list(stream) == lines
        for place in (0, 5_000_000, 17, len(data) - 3, len(data), 1_000_000, 1_000_001):
            stream.seek(place)
            assert stream.tell() == place
            assert stream.read(100) == data[place : place + 100]
        stream.seek(-5, os.SEEK_END)
        assert stream.read() == data[-5:]


def test_parquet_is_read_by_row_groups(prefix: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"n": range(10_000)}), buffer, row_group_size=1000)
    uri = put(prefix, "table.parquet", buffer.getvalue())
    with storage_for(uri).open(uri) as stream:
        file = pq.ParquetFile(stream)
        assert file.num_row_groups == 10
        assert file.read_row_group(7)["n"][0].as_py() == 7000


def test_an_object_that_changed_is_not_read(prefix: str) -> None:
    uri = put(prefix, "changing", b"old")
    storage = storage_for(uri)
    old = storage.head(uri).etag
    assert storage.read(uri, etag=old) == b"old"
    storage.write(uri, b"newer")
    assert storage.head(uri).etag != old
    with pytest.raises(PreconditionError):
        storage.read(uri, etag=old)
    with pytest.raises(PreconditionError):
        storage.open(uri, etag=old)


def test_a_new_object_is_written_once(prefix: str) -> None:
    uri = join(prefix, "new/object")
    storage = storage_for(uri)
    storage.write_new(uri, b"first")
    with pytest.raises(PreconditionError):
        storage.write_new(uri, b"second")
    assert storage.read(uri) == b"first"


def test_of_many_racing_writers_of_a_new_object_one_succeeds(prefix: str) -> None:
    uri = join(prefix, "raced")
    storage = storage_for(uri)
    start = threading.Barrier(8)

    def write(writer: int) -> int:
        start.wait()
        try:
            storage.write_new(uri, f"writer {writer}".encode())
        except PreconditionError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(8))) == 1
    assert storage.read(uri).startswith(b"writer")


def test_readers_never_see_half_an_object(prefix: str) -> None:
    uri = put(prefix, "replaced", b"0" * 300_000)
    storage = storage_for(uri)
    stop = threading.Event()

    def read() -> set[bytes]:
        seen = set()
        while not stop.is_set():
            data = storage.read(uri)
            assert len(data) == 300_000
            seen |= {data[:1], data[-1:]} if data[0] != data[-1] else {data[:1]}
            assert data.count(data[:1]) == len(data)
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for digit in b"123456789":
            storage.write(uri, bytes([digit]) * 300_000)
        stop.set()
        assert all(reader.result() for reader in readers)


def test_digests_are_those_of_the_content(prefix: str) -> None:
    data = os.urandom(3_000_000)
    digest = hashlib.sha256(data).hexdigest()
    uri = put(prefix, "computed", data)
    assert storage_for(uri).sha256(uri) == digest
    kept = join(prefix, "kept")
    storage_for(kept).write(kept, data, sha256=digest)
    assert storage_for(kept).sha256(kept) == digest


def test_listing_is_of_a_folder_and_not_of_names_that_begin_like_it(prefix: str) -> None:
    uris = sorted(put(prefix, name) for name in ("a/1", "a/b/2", "a/3"))
    put(prefix, "ab/4")
    put(prefix, "a.txt")
    assert [item.uri for item in storage_for(prefix).list(join(prefix, "a"))] == uris
    assert list(storage_for(prefix).list(join(prefix, "nothing"))) == []


@pytest.mark.slow
def test_listing_goes_past_one_page(prefix: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        uris = list(pool.map(lambda n: put(prefix, f"many/{n:04d}", b""), range(1100)))
    assert [item.uri for item in storage_for(prefix).list(join(prefix, "many"))] == uris


def _write_from_child(uri: str) -> None:
    storage_for(uri).write(uri, b"from a child")


def test_a_forked_process_can_write_too(prefix: str) -> None:
    uri = put(prefix, "forked", b"from the parent")
    child = multiprocessing.get_context("fork").Process(target=_write_from_child, args=(uri,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert storage_for(uri).read(uri) == b"from a child"


EVERY = [
    "a-2.jsonl", "a.jsonl", "b.jsonl.gz", "c.parquet", "sub/d.jsonl", "sub/deep/e.ndjson.zst"
]  # fmt: skip


def tree(prefix: str) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "readme.txt", "_old.jsonl", ".hidden.jsonl",
                 "sub/d.jsonl", "sub/deep/e.ndjson.zst", "_tmp/f.jsonl", "a-2.jsonl"):  # fmt: skip
        put(prefix, f"in/{name}")
    put(prefix, "in-other/g.jsonl")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in", EVERY),
        ("in/", EVERY),
        ("in/a.jsonl", ["a.jsonl"]),
        ("in/_old.jsonl", ["_old.jsonl"]),
        ("in/*.jsonl", ["a-2.jsonl", "a.jsonl"]),
        ("in/*.jsonl*", ["a-2.jsonl", "a.jsonl", "b.jsonl.gz"]),
        ("in/?.parquet", ["c.parquet"]),
        ("in/[ab].*", ["a.jsonl", "b.jsonl.gz"]),
        ("in/[!a].parquet", ["c.parquet"]),
        ("in/**/*.jsonl", ["a-2.jsonl", "a.jsonl", "sub/d.jsonl"]),
        ("in/sub/**", ["sub/d.jsonl", "sub/deep/e.ndjson.zst"]),
        ("in/*/d.jsonl", ["sub/d.jsonl"]),
    ],
)  # fmt: skip
def test_patterns_stand_for_files(prefix: str, pattern: str, expected: list[str]) -> None:
    tree(prefix)
    found = [item.uri for item in expand([join(prefix, "") + pattern])]
    assert found == [join(prefix, f"in/{name}") for name in expected]


def test_a_file_that_is_named_twice_comes_once_where_it_came_first(prefix: str) -> None:
    tree(prefix)
    found = expand(
        [join(prefix, "in/b.jsonl.gz"), join(prefix, "in"), join(prefix, "in/*.parquet")]
    )
    assert found[0].uri == join(prefix, "in/b.jsonl.gz")
    assert len(found) == len({item.uri for item in found}) == 6


def test_a_file_may_be_called_like_a_glob(prefix: str) -> None:
    uri = put(prefix, "what[1]*.jsonl")
    assert [item.uri for item in expand([uri])] == [uri]


def test_patterns_without_a_match_are_errors_that_say_what_was_looked_for(prefix: str) -> None:
    tree(prefix)
    with pytest.raises(InputError, match=r"nothing/\*.jsonl matches no file: .*\.jsonl"):
        expand([join(prefix, "nothing/*.jsonl")])
    with pytest.raises(InputError, match="its name does not tell its format"):
        expand([join(prefix, "in/readme.txt")])


def test_a_tree_is_copied_once(prefix: str, tmp_path: Path) -> None:
    for name in ("config.json", "sub/weights-1.safetensors", "sub/weights-2.safetensors"):
        put(prefix, f"model/{name}", name.encode() * 1000)
    folder = tmp_path / "copy"
    assert copy_tree(join(prefix, "model"), folder) == folder
    first = (folder / "config.json").stat().st_mtime_ns
    assert (
        folder / "sub/weights-2.safetensors"
    ).read_bytes() == b"sub/weights-2.safetensors" * 1000
    put(prefix, "model/sub/weights-1.safetensors", b"changed")
    copy_tree(join(prefix, "model"), folder)
    assert (folder / "config.json").stat().st_mtime_ns == first
    assert (folder / "sub/weights-1.safetensors").read_bytes() == b"changed"
    with pytest.raises(ObjectNotFoundError, match="nothing under"):
        copy_tree(join(prefix, "no-model"), folder)


@pytest.mark.parametrize(
    "size",
    [0, 1, pytest.param((64 << 20) + 1, marks=pytest.mark.slow)],  # which goes to S3 in parts
)
def test_a_file_is_written_as_it_is(prefix: str, tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    uri = put(prefix, "object", b"what was there before")
    storage_for(uri).write_file(uri, path)
    assert storage_for(uri).read(uri) == path.read_bytes()
    assert [item.uri for item in storage_for(uri).list(join(prefix, ""))].count(uri) == 1


def test_a_file_that_is_not_there_cannot_be_written(prefix: str, tmp_path: Path) -> None:
    uri = join(prefix, "object")
    with pytest.raises(ObjectNotFoundError, match="missing"):
        storage_for(uri).write_file(uri, tmp_path / "missing")
    with pytest.raises(ObjectNotFoundError):
        storage_for(uri).head(uri)


def test_a_tree_that_is_uploaded_is_the_one_that_was_copied(prefix: str, tmp_path: Path) -> None:
    for name in ("a", "deep/er/b"):
        put(prefix, f"model/{name}", name.encode())
    folder = copy_tree(join(prefix, "model"), tmp_path / "copy")
    upload_tree(folder, join(prefix, "again"))
    root = join(prefix, "again/")
    found = {item.uri.removeprefix(root) for item in storage_for(root).list(root)}
    assert found == {"a", "deep/er/b"}
    assert storage_for(root).read(join(root, "deep/er/b")) == b"deep/er/b"


def test_other_files_are_inputs_where_their_endings_are_asked_for(prefix: str) -> None:
    for name in ("in/a.csv", "in/b.jsonl"):
        put(prefix, name)
    folder = join(prefix, "in/")
    assert [item.uri for item in expand([folder])] == [join(folder, "b.jsonl")]
    both = expand([folder], (".csv", ".jsonl"))
    assert [item.uri for item in both] == [join(folder, "a.csv"), join(folder, "b.jsonl")]
    with pytest.raises(InputError, match=r"known are \.jsonl"):
        expand([join(folder, "a.csv")])


def test_uris_have_one_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert normal("a/b") == f"{tmp_path}/a/b"
    assert normal("file:///a/b/") == "/a/b/"
    assert normal("s3://bucket/key") == "s3://bucket/key"
    assert join("s3://bucket/out", "x") == join("s3://bucket/out/", "x") == "s3://bucket/out/x"
    assert join("s3://bucket", "") == "s3://bucket/"
    assert join("out", "") == f"{tmp_path}/out/"


@pytest.mark.parametrize("uri", ["gs://bucket/key", "https://host/file.jsonl", "s3:///key"])
def test_other_stores_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"known are s3://, file:// and plain paths|no bucket"):
        storage_for(uri) if not uri.startswith("s3") else normal(uri)


def test_an_object_tells_when_it_was_written(prefix: str) -> None:
    storage, uri = storage_for(prefix), join(prefix, "a")
    storage.write(uri, b"1")
    (listed,) = storage.list(prefix)
    for found in (listed, storage.head(uri)):
        assert abs(found.modified_s - time.time()) < 60
