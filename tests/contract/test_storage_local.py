"""What can go wrong on this machine: disks, rights, processes, threads, copies."""

import multiprocessing
import os
import pickle
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest

from phi4ray.errors import (
    AccessDeniedError,
    ObjectNotFoundError,
    PreconditionError,
    StorageError,
)
from phi4ray.storage import copy_tree, join, storage_for
from phi4ray.storage.local import LocalStorage


def put(prefix: str, *names: str) -> list[str]:
    """Write small objects, each holding its name; returns their URIs."""
    uris = [join(prefix, name) for name in names]
    for uri, name in zip(uris, names, strict=True):
        storage_for(uri).write(uri, name.encode())
    return uris


def in_a_fork(work: Callable[[], str]) -> str:
    """What a function returns in a forked process, or the type and text of what it raises."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        try:
            theirs.send(work())
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=child)
    process.start()
    theirs.close()
    try:
        assert ours.poll(30)
        text: str = ours.recv()
        return text
    finally:
        process.join()


def test_a_file_is_no_folder_to_write_into(tmp_path: Path) -> None:
    (file,) = put(str(tmp_path), "file")
    for method in ("write", "write_new"):
        with pytest.raises(StorageError, match="file") as caught:
            getattr(storage_for(file), method)(f"{file}/data", b"")
        assert not isinstance(caught.value, PreconditionError | ObjectNotFoundError)


def test_what_lies_behind_links_is_listed_and_links_in_a_circle_end(tmp_path: Path) -> None:
    put(str(tmp_path / "in"), "a", "sub/b")
    put(str(tmp_path / "far"), "c", "deep/d")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "file").symlink_to(tmp_path / "far" / "c")
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "far" / "deep" / "back").symlink_to(tmp_path / "in" / "sub")
    (tmp_path / "in" / "gone").symlink_to(tmp_path / "nowhere")
    found = [
        item.uri.removeprefix(f"{tmp_path}/in/")
        for item in LocalStorage().list(str(tmp_path / "in"))
    ]
    assert found == ["a", "file", "link/c", "link/deep/back/b", "link/deep/d", "sub/b"]


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    put(str(tmp_path), "folder/data")
    uri = join(str(tmp_path), "folder")
    with pytest.raises(StorageError) as caught:
        storage_for(uri).write(uri, b"")
    assert not isinstance(caught.value, ObjectNotFoundError)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    uri = join(str(tmp_path), "data")
    storage_for(uri).write(uri, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match="make room"):
            storage_for(uri).write(uri, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["data"]
    assert storage_for(uri).read(uri) == b"old"


@pytest.mark.parametrize("method", ["read", "write", "list"])
def test_a_user_without_rights_is_told_so(tmp_path: Path, method: str) -> None:
    (uri,) = put(str(tmp_path), "folder/data")
    folder = os.path.dirname(uri)
    os.chmod(folder, 0)

    def work() -> str:
        if os.geteuid() == 0:
            os.setuid(65534)
        storage = storage_for(uri)
        match method:
            case "read":
                return repr(storage.read(uri))
            case "write":
                return repr(storage.write(uri, b""))
        return repr(list(storage.list(folder)))

    try:
        assert in_a_fork(work).startswith(f"{AccessDeniedError.__name__}: {folder}")
    finally:
        os.chmod(folder, 0o700)


def test_a_bucket_that_is_not_there_is_named(s3_prefix: str) -> None:
    bucket = f"{s3_prefix.split('/')[2]}-none"
    uri = f"s3://{bucket}/data"
    for call in (
        lambda: storage_for(uri).read(uri),
        lambda: storage_for(uri).write(uri, b""),
        lambda: list(storage_for(uri).list(uri)),
    ):
        with pytest.raises(StorageError, match=f"no bucket {bucket}: create it") as caught:
            call()
        # Whoever looks for an object would take it for one that is not written yet.
        assert not isinstance(caught.value, ObjectNotFoundError)


def test_a_store_travels_to_other_processes(prefix: str) -> None:
    (uri,) = put(prefix, "data")
    storage = storage_for(uri)
    storage.read(uri)
    assert pickle.loads(pickle.dumps(storage)).read(uri) == b"data"


def test_threads_share_one_client(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: list[boto3.Session] = []

    class Counted(boto3.Session):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            sessions.append(self)

    monkeypatch.setattr(boto3, "Session", Counted)
    start = threading.Barrier(8)

    def write(name: int) -> None:
        start.wait()
        put(s3_prefix, str(name))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(list(storage_for(s3_prefix).list(s3_prefix))) == 8
    assert len(sessions) == 1


def test_a_copy_follows_what_changed_there_or_was_cut_here(prefix: str, tmp_path: Path) -> None:
    source, folder = join(prefix, "m"), tmp_path / "copy"
    put(prefix, "m/a", "m/b", "m/c")
    copy_tree(source, folder)
    storage_for(prefix).write(join(prefix, "m/a"), b"new")
    (folder / "b").write_bytes(b"")
    (folder / "c").unlink()
    copy_tree(source, folder)
    assert [(folder / name).read_text() for name in "abc"] == ["new", "m/b", "m/c"]


def test_a_key_cannot_leave_the_folder_it_is_copied_to(s3_prefix: str, tmp_path: Path) -> None:
    put(s3_prefix, "m/a", "m/../../escaped")
    with pytest.raises(StorageError, match="escaped"):
        copy_tree(join(s3_prefix, "m"), tmp_path / "deep" / "copy")
    assert list(tmp_path.rglob("escaped")) == []


def test_a_full_disk_is_told_as_a_storage_error(s3_prefix: str, tmp_path: Path) -> None:
    put(s3_prefix, "m/a")
    uri = join(s3_prefix, "m/big")
    storage_for(uri).write(uri, b"x" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match="big"):
            copy_tree(join(s3_prefix, "m"), tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "copy" / "big").exists()
