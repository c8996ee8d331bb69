"""The Batch API as the unmodified openai client meets it: whole lifecycles, over real HTTP."""

from collections.abc import Iterator

import openai
import pytest

from tests.batch_service import (
    client_of,
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
)


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
    assert (created.object, created.status, created.endpoint) == (
        "batch", "validating", "/v1/chat/completions",
    )  # fmt: skip
    assert created.expires_at == created.created_at + 24 * 3600
    batch = ended(client, created.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 8, "completed": 7, "failed": 1}
    assert batch.metadata == {"job": "nightly"}
    assert batch.errors is None
    assert (batch.in_progress_at or 0) <= (batch.finalizing_at or 0) <= (batch.completed_at or 0)
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
