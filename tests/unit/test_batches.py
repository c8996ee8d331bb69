"""The Batch API as the unmodified openai client meets it: whole lifecycles, over real HTTP."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from phi4ray.batches import states
from phi4ray.batches.records import BatchState
from phi4ray.batches.store import Key, Store
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

pytestmark = pytest.mark.slow

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
    assert failed["error"]["message"] == "'messages' is empty"  # and not where the store is
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
        "answers", "contents", "ends", "files", "requests", "states",
    ]  # fmt: skip
    assert all(name.endswith(".output.jsonl") for name in left if name.startswith("answers"))
    for file in client.files.list():
        assert client.files.delete(file.id).deleted
    left = [item.uri.removeprefix(store.root) for item in store.storage.list(store.root)]
    assert sorted({name.split("/")[0] for name in left}) == ["ends", "requests", "states"]


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


def test_a_cancel_that_was_taken_never_ends_completed(tmp_path: Any) -> None:
    """Though the runner does not look for it before the last row has its answer."""
    config = service(str(tmp_path), {"latency_s": 1}, batches={"poll_interval_s": 60})
    with listening(config) as url:
        client = client_of(url)
        batch_id = create(client, upload(client, line(1))).id
        with running(config):
            wait(client, batch_id, lambda batch: batch.status == "in_progress")
            assert client.batches.cancel(batch_id).status == "cancelling"
            batch = ended(client, batch_id)
        assert batch.status == "cancelled"
        assert batch.cancelling_at
        assert texts_of(rows_of(client, batch.output_file_id)) == expected(1)


def test_a_cancel_that_comes_too_late_is_not_taken(tmp_path: Any, monkeypatch: Any) -> None:
    store, cancel = Store(str(tmp_path)), Store.cancel

    def late(self: Store, key: Key, now_s: float) -> None:
        state = states.validated(BatchState(), 1, now_s)
        store.write_state(key, states.finalizing(state, now_s))
        cancel(self, key, now_s)

    monkeypatch.setattr(Store, "cancel", late)
    with listening(service(str(tmp_path))) as url:
        client = client_of(url)
        batch_id = create(client, upload(client, line(1))).id
        with pytest.raises(openai.BadRequestError, match="finalizing"):
            client.batches.cancel(batch_id)


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


def test_cancelled_before_its_bad_file_is_seen_it_is_cancelled(tmp_path: Any) -> None:
    config = service(str(tmp_path))
    with listening(config) as url:
        client = client_of(url)
        batch_id = create(client, upload(client, b"{broken")).id
        assert client.batches.cancel(batch_id).status == "cancelling"
        with running(config):
            batch = ended(client, batch_id)
        assert (batch.status, batch.failed_at) == ("cancelled", None)
        assert batch.errors is not None
        assert [error.code for error in batch.errors.data or ()] == ["invalid_json_line"]


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
