"""Objects whose content comes in pieces: whole or not at all, and never held."""

import os
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest

from phi4ray.errors import ObjectNotFoundError
from phi4ray.storage import join, storage_for
from phi4ray.storage.s3 import S3Storage

pytestmark = pytest.mark.slow

SIZES = [0, 1, 1000, (5 << 20) - 1, 5 << 20, (5 << 20) + 1, 13 << 20]


@pytest.mark.parametrize("size", SIZES)
def test_an_object_is_what_came_in_pieces(
    prefix: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4ray.storage.s3.PIECE_BYTES", 5 << 20)
    uri, data = join(prefix, "data"), os.urandom(1024) * (size // 1024 + 1)
    with storage_for(uri).create(uri) as writer:
        for start in range(0, size, 700_001):
            writer.write(data[start : min(size, start + 700_001)])
        with pytest.raises(ObjectNotFoundError):
            storage_for(uri).head(uri)
    assert storage_for(uri).read(uri) == data[:size]


@pytest.mark.parametrize("size", [10, 11 << 20])
def test_an_object_whose_writer_gives_up_never_was(
    prefix: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4ray.storage.s3.PIECE_BYTES", 5 << 20)
    uri = join(prefix, "data")
    storage_for(uri).write(uri, b"old")
    with suppress(ZeroDivisionError), storage_for(uri).create(uri) as writer:
        writer.write(b"x" * size)
        raise ZeroDivisionError
    assert storage_for(uri).read(uri) == b"old"
    assert [item.uri for item in storage_for(uri).list(prefix)] == [uri]
    if uri.startswith("s3://"):
        bucket = uri.split("/")[2]
        left = S3Storage()._client.list_multipart_uploads(Bucket=bucket)
        assert "Uploads" not in left


def test_what_is_held_of_an_object_in_pieces_is_bounded(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4ray.storage.s3.PIECE_BYTES", 5 << 20)
    sent: list[int] = []
    if prefix.startswith("s3://"):  # whose server, in this process, would hold it: count it only

        def count(**part: Any) -> dict[str, str]:
            sent.append(len(part["Body"]))
            return {"ETag": "e"}

        monkeypatch.setattr(S3Storage()._client, "upload_part", count)
    uri, piece = join(prefix, "data"), b"x" * (1 << 20)
    tracemalloc.start()
    try:
        with suppress(ZeroDivisionError), storage_for(uri).create(uri) as writer:
            for _ in range(200):
                writer.write(piece)
            raise ZeroDivisionError
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 25 << 20
    if uri.startswith("s3://"):
        assert sum(sent) > 190 << 20
        assert set(sent) == {5 << 20}
