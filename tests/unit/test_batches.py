"""The Batch API as the unmodified openai client meets it: whole lifecycles, over real HTTP."""

import json
import re
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from jobs.serve import configuration, parser
from phi4ray.batches.records import new_file_id
from phi4ray.batches.store import Key, Store
from phi4ray.serve.tenants import digest
from tests.batch_service import (
    CHAT,
    Clock,
    client_of,
    counts,
    create,
    ended,
    expected,
    line,
    listening,
    rows_of,
    running,
    service,
    texts_of,
    upload,
    wait,
)

SLOW = {"latency_s": 0.2}


@pytest.fixture
def client(prefix: str) -> Iterator[openai.OpenAI]:
    """A client of a service with a runner, in every kind of store."""
    config = service(prefix, batches={"shard_rows": 3})
    with listening(config) as url, running(config):
        yield client_of(url)


def test_a_batch_goes_from_its_file_to_its_answers(client: openai.OpenAI) -> None:
    bad = line(4, body={"model": "m", "messages": []})
    file_id = upload(client, *map(line, range(4)), bad, *map(line, range(5, 8)))
    created = create(client, file_id, metadata={"job": "nightly"})
    assert (created.object, created.status, created.endpoint) == ("batch", "validating", CHAT)
    assert created.input_file_id == file_id
    assert created.expires_at == created.created_at + 24 * 3600
    batch = ended(client, created.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 8, "completed": 7, "failed": 1}
    assert batch.metadata == {"job": "nightly"}
    assert batch.errors is None
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(at for at in times if at is not None)
    assert (batch.cancelled_at, batch.expired_at, batch.failed_at) == (None, None, None)

    answers = rows_of(client, batch.output_file_id)
    assert texts_of(answers) == expected(0, 1, 2, 3, 5, 6, 7)
    assert all(row["response"]["status_code"] == 200 and row["error"] is None for row in answers)
    (failed,) = rows_of(client, batch.error_file_id)
    assert (failed["custom_id"], failed["error"]["code"]) == ("r4", "empty_messages")
    output = client.files.retrieve(batch.output_file_id or "")
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert output.bytes == len(client.files.content(output.id).content)


def test_without_errors_there_is_no_error_file(client: openai.OpenAI) -> None:
    batch = ended(client, create(client, upload(client, line(1))).id)
    assert batch.output_file_id
    assert batch.error_file_id is None


def test_without_answers_there_is_no_output_file(client: openai.OpenAI) -> None:
    bad = line(1, body={"model": "m", "messages": []})
    batch = ended(client, create(client, upload(client, bad)).id)
    assert batch.status == "completed"
    assert batch.output_file_id is None
    assert [row["custom_id"] for row in rows_of(client, batch.error_file_id)] == ["r1"]


def test_only_files_are_left_of_a_batch_that_ended(client: openai.OpenAI, prefix: str) -> None:
    batch = ended(client, create(client, upload(client, *map(line, range(7)))).id)
    store = Store(prefix)
    wait(client, batch.id, lambda _: not store.open_batches())
    left = [item.uri.removeprefix(store.root) for item in store.storage.list(store.root)]
    assert sorted({name.split("/")[0] for name in left}) == [
        "answers", "contents", "files", "requests", "states",
    ]  # fmt: skip
    assert all(name.endswith(".output.jsonl") for name in left if name.startswith("answers"))
    for file in client.files.list():
        assert client.files.delete(file.id).deleted
    left = [item.uri.removeprefix(store.root) for item in store.storage.list(store.root)]
    assert sorted({name.split("/")[0] for name in left}) == ["requests", "states"]


def test_other_endpoints_are_answered_too(client: openai.OpenAI) -> None:
    for endpoint, name in (("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
        asked = line(1, url=endpoint, body={"model": "m", name: "prompt 1"})
        created = client.batches.create(
            input_file_id=upload(client, asked),
            endpoint=endpoint,  # type: ignore[arg-type]
            completion_window="24h",
        )
        batch = ended(client, created.id)
        assert batch.status == "completed"
        (row,) = rows_of(client, batch.output_file_id)
        assert row["response"]["body"]["object"] in ("text_completion", "list")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ((line(0), b"{broken"), [("invalid_json_line", None, 2)]),
        ((line(0), line(1), line(0)), [("duplicate_custom_id", "custom_id", 3)]),
        ((line(0, url="/v1/embeddings"),), [("invalid_url", "url", 1)]),
        ((line(0, method="GET"),), [("invalid_method", "method", 1)]),
        (
            ({"custom_id": "a"}, b"", line(1, custom_id=7)),
            [("missing_required_parameter", "method", 1), ("invalid_type", "custom_id", 3)],
        ),
        ((line(0, body={"model": "gpt-5"}),), [("model_not_found", "body.model", 1)]),
        ((b"", b"  "), [("empty_file", None, None)]),
        (tuple(map(line, range(11))), [("too_many_tasks", None, None)]),
        ((line(0, body={"x": "y" * 2000}),), [("line_too_long", None, 1)]),
    ],
)
def test_a_file_with_bad_lines_fails_and_names_them(
    tmp_path: Any, rows: tuple[Any, ...], told: list[Any]
) -> None:
    config = service(str(tmp_path), batches={"max_file_rows": 10, "max_row_mib": 0.001})
    with listening(config) as url, running(config):
        client = client_of(url)
        batch = ended(client, create(client, upload(client, *rows)).id)
    assert (batch.status, batch.output_file_id) == ("failed", None)
    assert batch.failed_at
    assert batch.errors is not None
    errors = [(error.code, error.param, error.line) for error in batch.errors.data or ()]
    assert errors == told


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


UNKNOWN_FILE, UNKNOWN_BATCH = "file-" + "0" * 32, "batch_" + "0" * 32


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
            (lambda: client.put("/files", cast_to=object, body={}), 405, "not_found", None),
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


def keys(folder: Any) -> dict[str, Any]:
    tenants = [
        {"name": "a/b", "key_sha256": [digest("one")], "models": ["m"]},
        {"name": "..", "key_sha256": [digest("two")]},
        {"name": "c", "key_sha256": [digest("four")], "models": ["other"]},
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"tenants": tenants}))
    return {"keys_file": f"{folder}/keys.yaml"}


def test_cancelling_keeps_finished_rows(client: openai.OpenAI, prefix: str) -> None:
    config = service(f"{prefix}slow", SLOW, engine={"max_num_seqs": 2})
    with listening(config) as url, running(config):
        slow = client_of(url)
        batch_id = create(slow, upload(slow, *map(line, range(200)))).id
        wait(slow, batch_id, lambda batch: bool(batch.request_counts and counts(batch)[1] >= 4))
        batch = slow.batches.cancel(batch_id)
        assert batch.status in ("cancelling", "cancelled")
        assert batch.cancelling_at
        batch = ended(slow, batch_id)
        assert batch.status == "cancelled"
        assert batch.cancelled_at
        answers, errors = rows_of(slow, batch.output_file_id), rows_of(slow, batch.error_file_id)
        # All of them lie in one shard, which was open when it was cancelled.
        assert 4 <= len(answers) < 200
        assert texts_of(answers).items() <= expected(*range(200)).items()
        assert {row["error"]["code"] for row in errors} == {"batch_cancelled"}
        ids = [row["custom_id"] for row in answers + errors]
        assert sorted(ids) == sorted(f"r{number}" for number in range(200))
        assert counts(batch) == (200, len(answers), len(errors))
        assert slow.batches.cancel(batch_id).status == "cancelled"


def test_a_batch_that_ended_cannot_be_cancelled(client: openai.OpenAI) -> None:
    batch = ended(client, create(client, upload(client, line(1))).id)
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.batches.cancel(batch.id)


def test_cancelled_before_any_runner_looks_it_needs_no_engine(tmp_path: Any) -> None:
    config = service(str(tmp_path), {"start_error": "no GPU"})
    with listening(config) as url:
        client = client_of(url)
        batch_id = create(client, upload(client, line(1))).id
        assert client.batches.cancel(batch_id).status == "cancelling"
        with running(config):
            batch = ended(client, batch_id)
        assert (batch.status, batch.output_file_id) == ("cancelled", None)
        (row,) = rows_of(client, batch.error_file_id)
        assert row["error"]["code"] == "batch_cancelled"


def test_what_is_not_answered_in_its_window_expires_and_the_rest_stays(tmp_path: Any) -> None:
    clock = Clock()
    config = service(str(tmp_path), SLOW, engine={"max_num_seqs": 2}, batches={"shard_rows": 100})
    with listening(config) as url, running(config, clock):
        client = client_of(url)
        batch_id = create(client, upload(client, *map(line, range(300)))).id
        wait(client, batch_id, lambda batch: counts(batch)[1] >= 4)
        clock.forward_s = 24 * 3600
        batch = ended(client, batch_id)
        assert batch.status == "expired"
        assert batch.expired_at
        answers, errors = (
            rows_of(client, batch.output_file_id),
            rows_of(client, batch.error_file_id),
        )
        assert 4 <= len(answers) < 300
        assert {row["error"]["code"] for row in errors} == {"batch_expired"}
        ids = [row["custom_id"] for row in answers + errors]
        assert sorted(ids) == sorted(f"r{number}" for number in range(300))


def test_an_engine_that_dies_is_started_again(tmp_path: Any) -> None:
    # Each engine answers forty rows: a shard is ten.
    config = service(str(tmp_path), {"die_after": 40}, batches={"shard_rows": 10})
    with listening(config) as url, running(config):
        client = client_of(url)
        batch = ended(client, create(client, upload(client, *map(line, range(100)))).id)
        assert batch.status == "completed"
        assert texts_of(rows_of(client, batch.output_file_id)) == expected(*range(100))


def test_several_batches_run_at_once_and_no_more_than_so_many(tmp_path: Any) -> None:
    config = service(str(tmp_path), SLOW, batches={"max_concurrent_batches": 2})
    with listening(config) as url, running(config) as runner:
        client = client_of(url)
        ids = [create(client, upload(client, *map(line, range(20)))).id for _ in range(5)]
        most = 0
        while any(client.batches.retrieve(one).status != "completed" for one in ids):
            most = max(most, runner.answering())
            time.sleep(0.01)
        assert most == 2


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


def test_expired_files_are_gone_and_then_swept(tmp_path: Any) -> None:
    clock = Clock()
    config = service(str(tmp_path))
    store = Store(str(tmp_path))
    with listening(config, clock) as url, running(config, clock) as runner:
        client = client_of(url)
        short = client.files.create(
            file=b"{}", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert short.expires_at == short.created_at + 3600
        file_id = upload(client, line(1))
        batch = ended(
            client,
            create(
                client, file_id, output_expires_after={"anchor": "created_at", "seconds": 7200}
            ).id,
        )
        clock.forward_s = 3601
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(short.id)
        assert {one.id for one in client.files.list()} == {file_id, batch.output_file_id}
        clock.forward_s = 7300
        assert [one.id for one in client.files.list()] == [file_id]
        runner.sweep()
        assert [record.id for _, record in store.all_files()] == [file_id]
        assert store.contents() == [("everyone", file_id)]
        assert list(store.storage.list(store.uri("answers/"))) == []


def test_an_upload_that_never_became_a_file_is_swept(tmp_path: Any) -> None:
    clock = Clock()
    config = service(str(tmp_path))
    store = Store(str(tmp_path))
    young = store.content_name("everyone", new_file_id(clock()))
    store.storage.write(store.uri(young), b"")
    with running(config, clock) as runner:
        runner.sweep()
        assert len(store.contents()) == 1
        clock.forward_s = 25 * 3600
        runner.sweep()
        assert store.contents() == []


def test_two_runners_at_once_do_no_harm(tmp_path: Any) -> None:
    config = service(str(tmp_path), {"latency_s": 0.02}, batches={"shard_rows": 5})
    with listening(config) as url, running(config), running(config):
        client = client_of(url)
        ids = [create(client, upload(client, *map(line, range(60)))).id for _ in range(3)]
        for one in ids:
            batch = ended(client, one)
            assert batch.status == "completed"
            answers = rows_of(client, batch.output_file_id)
            assert len(answers) == 60
            assert texts_of(answers) == expected(*range(60))


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


def test_a_batch_outlives_a_change_of_the_engine_and_not_one_of_the_model(tmp_path: Any) -> None:
    root = str(tmp_path)
    held = service(root, {"latency_s": 60}, batches={"shard_rows": 2})
    store = Store(root)

    def planned(batch: Any) -> bool:
        return any(store.storage.list(store.answers(Key("everyone", batch.id))))

    with listening(held) as url:
        client = client_of(url)
        ids = [create(client, upload(client, *map(line, range(5)))).id for _ in range(3)]
        with running(held):
            for one in ids:
                wait(client, one, planned)
        client.batches.cancel(ids[1])
        with running(service(root, engine={"max_model_len": 1000}, batches={"shard_rows": 7})):
            batch = ended(client, ids[0])
            assert (batch.status, counts(batch)) == ("completed", (5, 5, 0))
            assert ended(client, ids[1]).status == "cancelled"
            ended(client, ids[2])

        another = create(client, upload(client, line(1))).id
        with running(held):
            wait(client, another, planned)
        with running(service(root, engine={"served_model_name": "other"})):
            batch = ended(client, another)
        assert batch.status == "failed"
        assert batch.errors is not None
        assert [error.code for error in batch.errors.data or ()] == ["model_not_found"]


def test_a_broken_record_holds_nobody_else_up(tmp_path: Any) -> None:
    config = service(str(tmp_path))
    store = Store(str(tmp_path))
    with listening(config) as url:
        client = client_of(url)
        broken, whole = (create(client, upload(client, line(1))).id for _ in range(2))
        store.storage.write(store.uri(f"requests/everyone/{broken}.json"), b"{")
        with running(config):
            assert ended(client, whole).status == "completed"
        with pytest.raises(openai.InternalServerError, match="no record"):
            client.batches.retrieve(broken)
        assert Key("everyone", broken) in store.open_batches()


def test_a_store_that_fails_for_a_while_costs_only_time(tmp_path: Any) -> None:
    config = service(f"{tmp_path}/store")
    with listening(config) as url:
        client = client_of(url)
        batch_id = create(client, upload(client, line(1))).id
        states = tmp_path / "store" / "states"
        states.write_text("a file where a folder should be")
        with running(config):
            time.sleep(0.3)
            states.unlink()
            assert ended(client, batch_id).status == "completed"


ODD = ["\\ud800", "\\u0000", "../x", "😀", "%2e%2e", "x" * 5000]


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


def test_the_readmes_example_works(tmp_path: Any) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    (script,) = [block for block in blocks if "client.batches" in block]
    config = service(str(tmp_path))
    with listening(config) as url, running(config):
        script = script.replace("http://localhost:8000", url).replace("microsoft/phi-4", "m")
        shown = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    assert shown[0].startswith("completed")
    assert [json.loads(row)["custom_id"] for row in shown[1:4]] == ["Lima", "Oslo", "Accra"]


def test_one_tenants_long_queue_is_not_before_anothers_batch(tmp_path: Any) -> None:
    config = service(
        f"{tmp_path}/store", {"latency_s": 0.1}, gate=keys(tmp_path),
        batches={"max_concurrent_batches": 2}, engine={"max_num_seqs": 10},
    )  # fmt: skip
    with listening(config) as url:
        many, one = client_of(url, "one"), client_of(url, "two")
        file_id = upload(many, *map(line, range(20)))
        queue = [create(many, file_id).id for _ in range(6)]
        last = create(one, upload(one, line(1))).id
        with running(config):
            ended(one, last)
            assert many.batches.retrieve(queue[-1]).status == "in_progress"
            assert all(ended(many, batch_id).status == "completed" for batch_id in queue)


def test_a_flag_of_the_service_switches_it_on(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for given, store in (("s3://b/phi4/", "s3://b/phi4/"), ("files", f"{tmp_path}/files")):
        arguments = parser().parse_args(["--recipe", "fake", "--batches", given])
        batches = configuration(arguments).batches
        assert batches is not None
        assert (batches.store, batches.max_file_mib, batches.max_file_rows) == (store, 200, 50_000)
    assert configuration(parser().parse_args(["--recipe", "fake"])).batches is None
