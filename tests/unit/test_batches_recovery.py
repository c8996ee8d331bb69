"""Batches that another version of phi4ray, or another model, takes up: what is kept of them."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import openai
import pyarrow.parquet as pq
import pytest

from phi4ray.batch.executor import InProcessExecutor
from phi4ray.batch.parts import Receipt
from phi4ray.batches import job, states
from phi4ray.batches.records import BatchState
from phi4ray.batches.runner import Runner
from phi4ray.batches.store import Key, Store
from phi4ray.errors import ClusterError, EngineDeadError, StorageError
from tests.batch_service import (
    Clock,
    at_work,
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

ROWS, DONE = 40, 8
OTHER = {"max_model_len": 1000}
"""Under these settings of the engine a plan has another id."""


class Half(InProcessExecutor):
    """An executor that is gone once it has answered some shards."""

    def run_shards(self, config: Any, plan: Any, pending: Any) -> Iterator[Receipt | None]:
        yield from super().run_shards(config, plan, pending[:DONE])
        raise ClusterError("gone")


def half_done(client: openai.OpenAI, root: str) -> str:
    """A batch that a runner left with its first parts written; gives its id."""
    config = service(root, batches={"shard_rows": 2, "retry_interval_s": 60})
    assert config.batches is not None
    batch_id = create(client, upload(client, *map(line, range(ROWS)))).id
    with at_work(Runner(config.batches, config.engine, lambda _: Half())):
        wait(client, batch_id, lambda _: len(parts(root)) == DONE)
    return batch_id


def parts(root: str) -> list[Path]:
    return sorted(Path(root).glob("answers/*/*/_parts/*.parquet"))


def as_another_version_writes_it(root: str) -> None:
    """Plans have a member that this version does not know."""
    for path in Path(root).glob("answers/*/*/_plan.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"newer": 1}))


def test_a_plan_that_cannot_be_read_any_more_costs_no_answer(tmp_path: Any) -> None:
    config = service(str(tmp_path), engine=OTHER, batches={"shard_rows": 2})
    with listening(config) as url:
        client = client_of(url)
        batch_id = half_done(client, str(tmp_path))
        for path in parts(str(tmp_path)):  # so that it shows where an answer is from
            answered_by(path, "the version before")
        as_another_version_writes_it(str(tmp_path))
        kept = 2 * len(parts(str(tmp_path)))
        with running(config):
            batch = ended(client, batch_id)
        assert (batch.status, counts(batch)) == ("completed", (ROWS, ROWS, 0))
        rows = rows_of(client, batch.output_file_id)
        assert [row["custom_id"] for row in rows] == [f"r{number}" for number in range(ROWS)]
        assert sum(row["response"]["body"]["model"] == "the version before" for row in rows) == kept


def answered_by(path: Path, model: str) -> None:
    table = pq.read_table(path)
    responses = [
        json.dumps(json.loads(one) | {"model": model}) for one in table["response"].to_pylist()
    ]
    at = table.schema.get_field_index("response")
    pq.write_table(table.set_column(at, table.schema.field(at), [responses]), path)


@pytest.mark.parametrize("status", ["cancelled", "expired"])
def test_a_batch_ends_whatever_cannot_be_read_and_keeps_what_can(
    tmp_path: Any, status: str
) -> None:
    clock = Clock()
    config = service(
        str(tmp_path), {"start_error": "no GPU"}, engine=OTHER, batches={"shard_rows": 2}
    )
    with listening(service(str(tmp_path))) as url:
        client = client_of(url)
        batch_id = half_done(client, str(tmp_path))
        as_another_version_writes_it(str(tmp_path))
        broken, *whole = parts(str(tmp_path))
        broken.write_bytes(b"no part")
        if status == "cancelled":
            client.batches.cancel(batch_id)
        else:
            clock.forward_s = 25 * 3600
        with running(config, clock):
            batch = ended(client, batch_id)
        assert batch.status == status
        answers, errors = (
            rows_of(client, batch.output_file_id), rows_of(client, batch.error_file_id),
        )  # fmt: skip
        assert len(answers) == 2 * len(whole)
        assert texts_of(answers).items() <= expected(*range(ROWS)).items()
        assert {row["error"]["code"] for row in errors} == {f"batch_{status}"}
        assert counts(batch) == (ROWS, len(answers), len(errors))


def test_an_engine_that_dies_when_its_batch_is_cancelled_loses_no_row(tmp_path: Any) -> None:
    class Dying(InProcessExecutor):
        def run_shards(self, *_: Any) -> Iterator[Receipt | None]:
            client.batches.cancel(batch_id)
            while self._stopped() is None:
                yield None
            raise EngineDeadError("gone")

    config = service(str(tmp_path))
    assert config.batches is not None
    runner = Runner(config.batches, config.engine, lambda stopped: Dying(stopped=stopped))
    with listening(config) as url:
        client = client_of(url)
        batch_id = create(client, upload(client, *map(line, range(3)))).id
        with at_work(runner):
            batch = ended(client, batch_id)
        assert (batch.status, counts(batch)) == ("cancelled", (3, 0, 3))
        assert len(rows_of(client, batch.error_file_id)) == 3


@pytest.mark.parametrize(("cancel", "status"), [(False, "failed"), (True, "cancelled")])
def test_without_its_file_a_batch_ends_with_what_is_answered(
    tmp_path: Any, cancel: bool, status: str
) -> None:
    config = service(str(tmp_path))
    with listening(config) as url:
        client = client_of(url)
        batch_id = half_done(client, str(tmp_path))
        for content in tmp_path.glob("contents/*/*.jsonl"):
            content.unlink()
        if cancel:
            client.batches.cancel(batch_id)
        with running(config):
            batch = ended(client, batch_id)
        assert batch.status == status
        assert batch.errors is not None
        (error,) = batch.errors.data or ()
        assert error.code == "invalid_file"
        assert str(tmp_path) not in (error.message or "")
        assert str(batch.input_file_id) in (error.message or "")
        answers = rows_of(client, batch.output_file_id)
        assert len(answers) == counts(batch)[1] >= 4


def test_another_model_answers_no_row_and_what_is_answered_stays(tmp_path: Any) -> None:
    other = service(str(tmp_path), engine={"served_model_name": "other"})
    with listening(other) as url:
        client = client_of(url)
        batch_id = half_done(client, str(tmp_path))
        kept = 2 * len(parts(str(tmp_path)))
        with running(other):
            batch = ended(client, batch_id)
        assert batch.status == "failed"
        assert batch.failed_at
        assert batch.errors is not None
        assert [error.code for error in batch.errors.data or ()] == ["model_not_found"]
        assert len(rows_of(client, batch.output_file_id)) == kept
        errors = rows_of(client, batch.error_file_id)
        assert {row["error"]["code"] for row in errors} == {"model_not_found"}
        assert counts(batch) == (ROWS, kept, ROWS - kept)


@pytest.mark.parametrize("readable", [True, False])
def test_a_batch_whose_rows_all_have_answers_needs_no_model(
    tmp_path: Any, monkeypatch: Any, readable: bool
) -> None:
    other = service(str(tmp_path), engine={"served_model_name": "other"})
    with listening(other) as url:
        client = client_of(url)
        batch_id = create(client, upload(client, *map(line, range(3)))).id
        with monkeypatch.context() as patch, running(service(str(tmp_path))):
            patch.setattr(job, "finish", Mock(side_effect=StorageError("full")))
            wait(client, batch_id, lambda batch: batch.status == "finalizing")
        if not readable:
            as_another_version_writes_it(str(tmp_path))
        with running(other):
            batch = ended(client, batch_id)
        assert (batch.status, counts(batch)) == ("completed", (3, 3, 0))
        assert texts_of(rows_of(client, batch.output_file_id)) == expected(*range(3))


def test_cancelled_under_another_model_it_is_cancelled(tmp_path: Any) -> None:
    other = service(str(tmp_path), engine={"served_model_name": "other"})
    with listening(other) as url:
        client = client_of(url)
        batch_id = half_done(client, str(tmp_path))
        kept = 2 * len(parts(str(tmp_path)))
        client.batches.cancel(batch_id)
        with running(other):
            batch = ended(client, batch_id)
        assert (batch.status, counts(batch)) == ("cancelled", (ROWS, kept, ROWS - kept))


@pytest.mark.parametrize("plan", [None, b"{}"])
def test_a_batch_that_was_not_planned_yet_is_not_answered_by_another_model(
    tmp_path: Any, plan: bytes | None
) -> None:
    """As one that waits in the queue; and where a plan does not say any more what it is for."""
    other = service(str(tmp_path), engine={"served_model_name": "other"})
    store = Store(str(tmp_path))
    with listening(other) as url:
        client = client_of(url)
        batch_id = create(client, upload(client, *map(line, range(3)))).id
        key = Key("everyone", batch_id)
        store.write_state(key, states.validated(BatchState(), 3, time.time()))
        if plan is not None:
            store.storage.write(f"{store.answers(key)}/_plan.json", plan)
        with running(other):
            batch = ended(client, batch_id)
        assert (batch.status, counts(batch)) == ("failed", (3, 0, 3))
        errors = rows_of(client, batch.error_file_id)
        assert {row["error"]["code"] for row in errors} == {"model_not_found"}


@pytest.mark.parametrize("shard_rows", [2, 4, 5])
def test_answers_are_kept_under_other_shards(tmp_path: Any, shard_rows: int) -> None:
    """As far as all rows of a shard have one: a shard of which some are missing is answered."""
    config = service(str(tmp_path), batches={"shard_rows": shard_rows})
    with listening(config) as url:
        client = client_of(url)
        batch_id = half_done(client, str(tmp_path))
        for path in parts(str(tmp_path)):
            answered_by(path, "before")
        as_another_version_writes_it(str(tmp_path))
        with running(config):
            batch = ended(client, batch_id)
        rows = rows_of(client, batch.output_file_id)
        assert texts_of(rows) == expected(*range(ROWS))
        kept = [row["response"]["body"]["model"] == "before" for row in rows]
        assert len(rows) == ROWS
        assert sum(kept) == 2 * DONE // shard_rows * shard_rows


def test_a_part_of_another_version_is_read_and_one_that_is_none_answered_again(
    tmp_path: Any,
) -> None:
    """The plan is the same, and its parts have receipts that cannot be read."""
    config = service(str(tmp_path), batches={"shard_rows": 2})
    with listening(config) as url:
        client = client_of(url)
        batch_id = half_done(client, str(tmp_path))
        none, other, *_ = parts(str(tmp_path))
        none.write_bytes(b"no part")
        table = pq.read_table(other)
        pq.write_table(table.replace_schema_metadata({"phi4ray.receipt": "{}"}), other)
        answered_by(other, "before")
        with running(config):
            batch = ended(client, batch_id)
        rows = rows_of(client, batch.output_file_id)
        assert texts_of(rows) == expected(*range(ROWS))
        assert sum(row["response"]["body"]["model"] == "before" for row in rows) == 2
