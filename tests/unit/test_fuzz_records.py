"""What lies under an output prefix is ours, as it was written, or is refused by its name."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phi4ray.batch.manifest import list_parts
from phi4ray.batch.parts import RECEIPT_KEY
from phi4ray.batch.plan import MANIFEST_NAME, PLAN_NAME, PROGRESS_NAME, read_plan
from phi4ray.batch.planning import obtain_plan
from phi4ray.batch.progress_file import read_progress
from phi4ray.batch.results import read_results, rows_of
from phi4ray.batches.records import BatchRequest, BatchState, FileRecord
from phi4ray.batches.store import Key, Store
from phi4ray.errors import ConfigError, IncompleteOutputError, Phi4rayError, StorageError
from phi4ray.storage import join
from tests.fuzz import broken_texts, budget, damaged, dumped, near, values
from tests.small_jobs import InProcessExecutor, job, prompts, run, write_lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job of four parts that is done."""
    folder = tmp_path_factory.mktemp("job")
    write_lines(folder / "in" / "a.jsonl", prompts(8))
    run(job(folder, shard_rows=2))
    return folder


@pytest.fixture(scope="module")
def objects(finished: Path) -> dict[str, bytes]:
    """The objects of the job's output, by name."""
    return {path.name: path.read_bytes() for path in sorted((finished / "out").iterdir())}


@pytest.fixture(scope="module")
def changed(finished: Path, objects: dict[str, bytes]) -> Callable[[str, bytes], str]:
    """Puts other content into one object of the job's output, alone; gives the output."""

    def put(name: str, data: bytes) -> str:
        for other, content in objects.items():
            path = finished / "out" / other
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
        (finished / "out" / name).write_bytes(data)
        return f"{finished}/out"

    return put


Changed = Callable[[str, bytes], str]


def outcome(function: Callable[[], Any]) -> Phi4rayError | None:
    """The error that was raised on purpose; any other fails the test."""
    try:
        function()
    except Phi4rayError as error:
        return error
    return None


def test_a_plan_is_read_as_it_was_written_or_refused(objects: dict[str, bytes]) -> None:
    whole = objects[PLAN_NAME]
    plan = read_plan(whole, "_plan.json")
    members = json.loads(whole)

    @budget(150)
    @given(damaged(whole) | near(members).map(dumped) | values.map(dumped) | broken_texts)
    @example(dumped(members | {"version": 2}))
    @example(dumped(members | {"folder": "../"}))
    @example(dumped(members | {"shards": members["shards"][:2]}))
    def check(data: bytes) -> None:
        try:
            found = read_plan(data, "_plan.json")
        except ConfigError as error:
            refusal = str(error)
        else:  # what decides no answer may differ, such as the number of repeated ids
            refusal = "_plan.json"
            sealed = {"identity", "inputs", "shards", "plan_id"}
            assert found.model_dump(include=sealed) == plan.model_dump(include=sealed)
        assert "_plan.json" in refusal

    check()


def test_a_job_whose_plan_carries_columns_that_cannot_be_read_says_so(
    finished: Path, objects: dict[str, bytes], changed: Changed
) -> None:
    members = json.loads(objects[PLAN_NAME])

    @budget(60)
    @given(st.text(max_size=30) | st.binary(max_size=60).map(lambda data: data.hex()))
    @example("")
    @example("AAAA")
    @example(members["carried"][:-8])
    def check(carried: str) -> None:
        changed(PLAN_NAME, dumped(members | {"carried": carried}))
        next((finished / "out").glob("part-*")).unlink()  # so that there is a shard to run
        error = outcome(lambda: run(job(finished, shard_rows=2)))
        assert error is None or PLAN_NAME in str(error)

    check()


def test_a_part_that_is_none_is_named(
    finished: Path, objects: dict[str, bytes], changed: Changed
) -> None:
    config = job(finished, shard_rows=2)
    name = read_plan(objects[PLAN_NAME], PLAN_NAME).part_name(1)
    part = objects[name]
    table = pq.read_table(pa.BufferReader(part))
    receipt = json.loads(table.schema.metadata[RECEIPT_KEY])

    def with_receipt(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({RECEIPT_KEY: data}), sink)
        return bytes(sink.getvalue())

    receipts = near(receipt).map(dumped) | damaged(dumped(receipt)) | broken_texts

    @budget(80)
    @given(receipts.map(with_receipt) | damaged(part) | st.binary(max_size=50))
    @example(with_receipt(dumped(receipt | {"rows": -2, "errors": {"x": 10**30}})))
    @example(with_receipt(dumped(receipt | {"latency_s": [1], "started_at": float("inf")})))
    def check(data: bytes) -> None:
        changed(name, data)
        for again in (config, config.model_copy(update={"retry_errors": True})):
            error = outcome(lambda again=again: run(again))  # type: ignore[misc]
            if error is not None:
                assert isinstance(error, IncompleteOutputError)
                assert name in str(error)

    check()


def test_results_are_shown_or_refused_whatever_lies_there(
    objects: dict[str, bytes], changed: Changed
) -> None:
    manifest = json.loads(objects[MANIFEST_NAME])
    part = read_plan(objects[PLAN_NAME], PLAN_NAME).part_name(0)
    others = st.one_of(
        st.tuples(st.just(MANIFEST_NAME), near(manifest).map(dumped) | broken_texts),
        st.tuples(st.just(part), damaged(objects[part])),
        st.tuples(st.just(PROGRESS_NAME), broken_texts),
    )

    def show(output: str) -> None:
        results = read_results(output)
        results.figures()
        list(rows_of(results))

    @budget(80)
    @given(others)
    def check(found: tuple[str, bytes]) -> None:
        name, data = found
        error = outcome(lambda: show(changed(name, data)))
        assert error is None or name in str(error)

    check()


def test_progress_of_any_content_is_shown_or_is_none(
    objects: dict[str, bytes], changed: Changed
) -> None:
    progress = json.loads(objects[PROGRESS_NAME])
    last = progress["window"]["last"]
    windows = near(last).map(
        lambda one: dumped(progress | {"window": progress["window"] | {"last": one}})
    )

    @budget(100)
    @given(windows | near(progress).map(dumped) | broken_texts)
    @example(dumped(progress | {"window": {"first": last, "last": last | {"elapsed_s": 1e300}}}))
    def check(data: bytes) -> None:
        found = read_progress(changed(PROGRESS_NAME, data))
        if found is not None:
            assert found.window.line()

    check()


BATCH_ID, FILE_ID = "batch_" + "0" * 32, "file-" + "0" * 32
REQUEST = BatchRequest(
    id=BATCH_ID,
    endpoint="/v1/chat/completions",
    input_file_id=FILE_ID,
    completion_window="24h",
    created_at=1,
    expires_at=2,
)
FILE = FileRecord(id=FILE_ID, filename="a", purpose="batch", created_at=1, pieces=())


@budget(100)
@given(
    near(REQUEST.model_dump()).map(dumped),
    near(FILE.model_dump()).map(dumped) | broken_texts,
    near(BatchState().model_dump()).map(dumped) | broken_texts,
    st.binary(max_size=20),
)
@example(b"{}", b"{}", b"{}", b"soon")
def test_records_of_the_batch_api_are_read_or_named(
    request: bytes, file: bytes, state: bytes, cancel: bytes
) -> None:
    key = Key("everyone", BATCH_ID)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        for name, data, read in (
            (f"requests/everyone/{BATCH_ID}.json", request, lambda: store.request(key)),
            (f"files/everyone/{FILE_ID}.json", file, lambda: store.file("everyone", FILE_ID)),
            (f"states/everyone/{BATCH_ID}.json", state, lambda: store.state(key)),
            (f"cancels/everyone/{BATCH_ID}", cancel, lambda: store.cancel_at(key)),
        ):
            store.storage.write(store.uri(name), data)
            error = outcome(read)
            if error is not None:
                assert isinstance(error, StorageError)
                assert join(folder, name) in str(error)


def test_objects_beside_the_parts_are_none_of_them(finished: Path) -> None:
    config = job(finished, shard_rows=2)
    plan = obtain_plan(config, InProcessExecutor())

    @budget(60)
    @given(st.text("part-0123456789abcdef.qut\n", max_size=40), st.integers(-1, 10**12))
    def check(name: str, shard: int) -> None:
        made = f"part-{shard:06d}-{plan.plan_id}.parquet"
        assert plan.shard_of(made) == (shard if 0 <= shard < len(plan.shards) else None)
        assert plan.shard_of(name) is None

    check()
    assert sorted(list_parts(config.output, plan)) == [0, 1, 2, 3]
