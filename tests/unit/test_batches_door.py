"""The Batch API's HTTP door: what it takes, refuses and lists, and how little it holds."""

import io
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import pytest

from jobs.serve import configuration, parser
from phi4ray.batches.store import Store
from phi4ray.errors import TransientStorageError
from phi4ray.storage.local import LocalStorage
from tests.batch_service import (
    CHAT,
    client_of,
    create,
    ended,
    keys,
    line,
    listening,
    running,
    service,
    upload,
)

UNKNOWN_FILE, UNKNOWN_BATCH = "file-" + "0" * 32, "batch_" + "0" * 32
ODD = ["\\ud800", "\\u0000", "../x", "😀", "%2e%2e", "x" * 5000]


def test_files_and_batches_come_in_pages_newest_first(tmp_path: Any) -> None:
    config = service(str(tmp_path))
    with listening(config) as url:
        client = client_of(url)
        files = [upload(client, line(number)) for number in range(5)]
        batches = [create(client, file_id).id for file_id in files]
        assert [one.id for one in client.files.list(limit=2)] == files[::-1]
        assert [one.id for one in client.files.list(limit=2, order="asc")] == files
        assert [one.id for one in client.batches.list(limit=2)] == batches[::-1]
        page = client.batches.list(limit=2, after=batches[3])
        assert ([one.id for one in page.data], page.has_more) == (batches[2:0:-1], True)
        last = client.files.list(after=files[1])
        assert ([one.id for one in last.data], last.has_more) == (files[:1], False)
        raw = client.get("/batches?limit=2", cast_to=object)
        assert raw["first_id"] == batches[4]  # type: ignore[index]
        assert raw["last_id"] == batches[3]  # type: ignore[index]
        assert client.files.list(purpose="batch_output").data == []
        assert len(client.files.list(purpose="batch").data) == 5


def test_what_is_refused_and_how(tmp_path: Any) -> None:
    config = service(str(tmp_path), batches={"max_file_mib": 0.01})
    with listening(config) as url:
        client = client_of(url)
        good = upload(client, line(0))
        refusals: list[tuple[Any, int, str, str | None]] = [
            (lambda: client.files.retrieve(UNKNOWN_FILE), 404, "not_found", "file_id"),
            (lambda: client.files.retrieve("file-../../x"), 404, "not_found", None),
            (lambda: client.files.content(UNKNOWN_FILE), 404, "not_found", "file_id"),
            (lambda: client.files.delete(UNKNOWN_FILE), 404, "not_found", "file_id"),
            (lambda: client.batches.retrieve(UNKNOWN_BATCH), 404, "not_found", "batch_id"),
            (lambda: client.batches.retrieve("batch_1"), 404, "not_found", "batch_id"),
            (lambda: client.batches.cancel(UNKNOWN_BATCH), 404, "not_found", "batch_id"),
            (lambda: create(client, UNKNOWN_FILE), 404, "not_found", "file_id"),
            (lambda: client.batches.list(limit=1000), 400, "invalid_value", "limit"),
            (lambda: client.batches.list(after="x"), 400, "invalid_value", "after"),
            (
                lambda: client.files.create(file=b"{}", purpose="fine-tune"),
                400, "invalid_value", "purpose",
            ),
            (
                lambda: client.files.create(file=b"x" * 20_000, purpose="batch"),
                413, "file_too_large", "file",
            ),
            (
                lambda: client.files.create(file=b"x" * 200_000, purpose="batch"),
                413, "body_too_large", None,
            ),
            (
                lambda: client.files.create(
                    file=b"{}", purpose="batch",
                    expires_after={"anchor": "created_at", "seconds": 5},
                ),
                400, "invalid_value", "seconds",
            ),
            (
                lambda: client.batches.create(
                    input_file_id=good, endpoint=CHAT, completion_window="1h"  # type: ignore
                ),
                400, "invalid_value", "completion_window",
            ),
            (
                lambda: client.batches.create(
                    input_file_id=good, endpoint="/v1/responses", completion_window="24h"
                ),
                400, "invalid_value", "endpoint",
            ),
            (lambda: create(client, good, metadata={"k": "v" * 513}), 400, "invalid_value",
             "metadata.k"),
            (lambda: client.post("/batches", cast_to=object, body={}), 400,
             "missing_required_parameter", "input_file_id"),
            (lambda: client.post("/batches", cast_to=object, body=[]), 400, "invalid_json", None),
            (lambda: client.post("/files", cast_to=object, body={}), 400, "invalid_form", None),
            (lambda: client.put("/files", cast_to=object, body={}), 405, "method_not_allowed",
             None),
        ]  # fmt: skip
        for refused, status, code, param in refusals:
            with pytest.raises(openai.APIStatusError) as told:
                refused()
            error: Any = told.value.body
            assert (told.value.status_code, error["code"], error["param"]) == (status, code, param)
            assert error["message"]
        # Nothing is left of what was refused.
        assert [one.id for one in client.files.list()] == [good]
        store = Store(str(tmp_path))
        assert len(store.contents()) == 1


@pytest.mark.parametrize("failing", ["_read", "_write"])
def test_no_client_makes_two_batches_or_files_of_one(
    tmp_path: Any, monkeypatch: Any, failing: str
) -> None:
    """Whatever fails after the write, or in it: a client that repeats is not asked to."""
    done = getattr(Store, failing)

    def fails(self: Store, name: str, record: Any) -> Any:
        if failing == "_write":
            done(self, name, record)
        raise TransientStorageError("PutObject: SlowDown")

    with listening(service(str(tmp_path))) as url:
        client = client_of(url).with_options(max_retries=2)
        file_id = upload(client, line(0))
        record = Store(str(tmp_path)).file("everyone", file_id)
        monkeypatch.setattr(Store, "file", lambda *_: record)
        monkeypatch.setattr(Store, failing, fails)
        if failing == "_read":
            assert create(client, file_id).status == "validating"
            upload(client, line(1))
        else:
            for asked in (lambda: create(client, file_id), lambda: upload(client, line(1))):
                with pytest.raises(openai.InternalServerError, match="look for it") as told:
                    asked()
                assert told.value.code == "outcome_unknown"
        monkeypatch.undo()
        assert len(client.batches.list().data) == 1
        assert len(client.files.list().data) == 2


def test_where_the_files_are_kept_is_in_the_log_and_not_told(
    tmp_path: Any, monkeypatch: Any, caplog: Any
) -> None:
    with listening(service(str(tmp_path))) as url:
        client = client_of(url)
        error = TransientStorageError(f"GetObject: SlowDown: {tmp_path}/files")
        monkeypatch.setattr(Store, "file", Mock(side_effect=error))
        with pytest.raises(openai.InternalServerError) as told:
            client.files.retrieve(UNKNOWN_FILE)
    assert (told.value.status_code, told.value.code) == (503, "store_failed")
    assert str(tmp_path) not in told.value.message
    assert str(tmp_path) in caplog.text


def test_a_service_without_a_store_says_that_it_has_no_batch_api() -> None:
    config = service("unused", batches=None)
    with listening(config) as url:
        client = client_of(url)
        for asked in (client.batches.list, client.files.list, lambda: upload(client, line(0))):
            with pytest.raises(openai.NotFoundError) as told:
                asked()  # type: ignore[operator]
            assert told.value.code == "batches_off"


def test_tenants_see_only_what_is_theirs(tmp_path: Any) -> None:
    config = service(f"{tmp_path}/store", gate=keys(tmp_path))
    with listening(config) as url, running(config):
        ours, theirs = client_of(url, "one"), client_of(url, "two")
        file_id = upload(ours, line(1))
        batch = ended(ours, create(ours, file_id).id)
        for denied in (
            lambda: theirs.files.retrieve(file_id),
            lambda: theirs.files.content(batch.output_file_id or ""),
            lambda: theirs.files.delete(file_id),
            lambda: create(theirs, file_id),
            lambda: theirs.batches.retrieve(batch.id),
            lambda: theirs.batches.cancel(batch.id),
        ):
            with pytest.raises(openai.NotFoundError):
                denied()
        assert theirs.files.list().data == theirs.batches.list().data == []
        assert len(ours.files.list().data) == 2
        with pytest.raises(openai.AuthenticationError):
            client_of(url, "three").files.list()
        # A tenant of other models may keep files here, and have none answered.
        other = client_of(url, "four")
        with pytest.raises(openai.PermissionDeniedError):
            create(other, upload(other, line(1)))


def test_a_file_that_a_batch_reads_is_not_deleted(tmp_path: Any) -> None:
    config = service(str(tmp_path))
    with listening(config) as url:
        client = client_of(url)
        file_id = upload(client, line(1))
        batch_id = create(client, file_id).id
        with pytest.raises(openai.BadRequestError, match=batch_id):
            client.files.delete(file_id)
        with running(config):
            ended(client, batch_id)
        assert client.files.delete(file_id).deleted
        assert client.batches.retrieve(batch_id).status == "completed"


def test_what_a_newer_version_wrote_hides_nothing_else(tmp_path: Path) -> None:
    with listening(service(str(tmp_path))) as url:
        client = client_of(url)
        files = [upload(client, line(number)) for number in range(4)]
        batches = [create(client, file_id).id for file_id in files[:2]]
        for unknown in (files[0], batches[1]):
            (record,) = (one for one in tmp_path.rglob(f"{unknown}.json") if "ends" not in str(one))
            record.write_text('{"newer": 1}')
        assert [one.id for one in client.files.list(limit=1)] == files[:0:-1]
        assert [one.id for one in client.batches.list(limit=1)] == batches[:1]
        assert client.files.delete(files[3]).deleted


def test_to_ask_how_large_a_file_is_does_not_read_it(tmp_path: Path, monkeypatch: Any) -> None:
    with listening(service(str(tmp_path))) as url:
        file_id = upload(client_of(url), line(1))
        opened: list[str] = []
        open_ = LocalStorage.open

        def noting(storage: LocalStorage, uri: str, **options: Any) -> Any:
            opened.append(uri.rpartition(".")[2])
            return open_(storage, uri, **options)

        monkeypatch.setattr(LocalStorage, "open", noting)
        found = httpx.head(f"{url}/v1/files/{file_id}/content")
        assert opened == ["json"]  # its record
        assert found.status_code == 200
        assert int(found.headers["content-length"]) > 100


@pytest.mark.slow
def test_a_file_goes_in_and_out_without_being_held(tmp_path: Any) -> None:
    size, chunk = 150 << 20, b"x" * (256 << 10)
    head = b'--B\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
    tail = b'\r\n--B\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--B--\r\n'

    def body() -> Iterator[bytes]:
        yield head
        for _ in range(size // len(chunk)):
            yield chunk
        yield tail

    config = service(str(tmp_path))
    with listening(config) as url, httpx.Client(base_url=url, timeout=120) as client:
        client.get("/v1/files")
        tracemalloc.start()
        try:
            sent = client.post(
                "/v1/files",
                content=body(),
                headers={"content-type": "multipart/form-data; boundary=B"},
            ).json()
            received = 0
            with client.stream("GET", f"/v1/files/{sent['id']}/content") as content:
                for data in content.iter_raw():
                    received += len(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert sent["bytes"] == received == size
    assert peak < 30 << 20


def test_a_client_that_hangs_up_in_a_download_stops_nobody_else(
    tmp_path: Any, monkeypatch: Any
) -> None:
    began, go_on, closed = (threading.Event() for _ in range(3))

    class Slow(io.RawIOBase):
        """The store's answer, which comes only when the test says so."""

        def readable(self) -> bool:
            return True

        def readinto(self, _: Any) -> int:
            began.set()
            go_on.wait(20)
            return 0

        def close(self) -> None:
            super().close()
            closed.set()

    config = service(str(tmp_path))
    with listening(config) as url, httpx.Client(base_url=url, timeout=5) as client:
        file_id = upload(client_of(url), line(0))
        opened = LocalStorage.open

        def slow(self: Any, uri: str, **options: Any) -> Any:
            found = opened(self, uri, **options)
            return io.BufferedReader(Slow()) if "/contents/" in uri else found

        monkeypatch.setattr(LocalStorage, "open", slow)
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port or 0)) as connection:
            asked = f"GET /v1/files/{file_id}/content HTTP/1.1\r\nhost: x\r\n\r\n"
            connection.sendall(asked.encode())
            assert began.wait(5)
        try:
            for _ in range(3):
                assert client.get("/health").status_code == 200
                time.sleep(0.02)
        finally:
            go_on.set()
        assert closed.wait(5)


def test_an_upload_that_is_cut_off_is_no_file(tmp_path: Any) -> None:
    config = service(str(tmp_path))
    with listening(config) as url:
        address = httpx.URL(url)
        head = (
            "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n"
            "content-type: multipart/form-data; boundary=B\r\n\r\n"
            '--B\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
        )
        with socket.create_connection((address.host, address.port or 0)) as connection:
            connection.sendall(head.encode() + b"x" * 100_000)
            folder = tmp_path / "contents" / "everyone"
            while not list(folder.glob(".phi4ray-*")):
                time.sleep(0.01)
        while list(folder.iterdir()):
            time.sleep(0.01)
        client = client_of(url)
        assert client.files.list().data == []


def test_no_request_is_odd_enough_for_a_server_error(tmp_path: Any) -> None:
    config = service(str(tmp_path))
    with listening(config) as url, httpx.Client(base_url=url) as client:
        good = client.post("/v1/files", files={"file": b"{}"}, data={"purpose": "batch"}).json()[
            "id"
        ]
        fine = {"input_file_id": good, "endpoint": CHAT, "completion_window": "24h"}
        bodies = [json.dumps(fine | {name: f"{odd}"}) for name in fine for odd in ODD]
        bodies += [json.dumps(fine | {"metadata": {odd: odd}}) for odd in ODD]
        bodies += [json.dumps(fine | {"metadata": odd}) for odd in ([], 5, "x", {"a": 1})]
        bodies += ["null", "5", "", "{", "[]"]
        for body in bodies:
            raw = body.replace("\\\\", "\\").encode()  # what JSON escapes, and Python does not have
            answer = client.post("/v1/batches", content=raw)
            assert answer.status_code in (200, 400, 404), (raw, answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]
        for odd in ("%00", "%ff", "..%2f..%2fx", "a b", "%F0%9F%98%80", "x" * 5000):
            for path in (f"/v1/files/{odd}", f"/v1/files/{odd}/content", f"/v1/batches/{odd}"):
                assert client.get(path).status_code == 404
            for query in ("after", "limit", "purpose", "order"):
                for listed in ("files", "batches"):
                    answer = client.get(f"/v1/{listed}?{query}={odd}")
                    assert answer.status_code in (200, 400), (query, odd, answer.text)
            form = {"purpose": "batch", odd: odd}
            answer = client.post("/v1/files", files={"file": (odd, b"{}")}, data=form)
            assert answer.status_code in (200, 400), answer.text
            answer = client.post("/v1/files", files={"file": b""}, data={"purpose": odd})
            assert answer.status_code == 400
        assert client.get("/v1/batches?limit=100").status_code == 200
        assert client.get("/v1/files").status_code == 200


def test_a_flag_of_the_service_switches_it_on(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for given, store in (("s3://b/phi4/", "s3://b/phi4/"), ("files", f"{tmp_path}/files")):
        arguments = parser().parse_args(["--recipe", "fake", "--batches", given])
        batches = configuration(arguments).batches
        assert batches is not None
        assert (batches.store, batches.max_file_mib, batches.max_file_rows) == (store, 200, 50_000)
    assert configuration(parser().parse_args(["--recipe", "fake"])).batches is None
