"""A job from its inputs to `_SUCCESS`: each row answered once, however often it is cut off."""

import asyncio
import gzip
import io
import json
import pickle
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from rich.console import Console

from phi4ray.batch import answers as answers_module
from phi4ray.batch.executor import FILLS, MAX_IN_FLIGHT, InProcessExecutor
from phi4ray.batch.manifest import Manifest
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import Plan
from phi4ray.batch.planning import check_shared, list_inputs, obtain_plan
from phi4ray.batch.run import longest_first, run_batch
from phi4ray.config import BatchConfig, Endpoint, EngineConfig
from phi4ray.engines import make_replica
from phi4ray.errors import (
    AccessDeniedError,
    ConfigError,
    EngineDeadError,
    EngineStartError,
    IncompleteOutputError,
    InputError,
    PlanMismatchError,
    StorageError,
    TooManyErrorsError,
)
from phi4ray.fake import FakeReplica, fake_text
from phi4ray.protocol import Answer, Json, Replica
from phi4ray.storage import s3, storage_for
from phi4ray.storage.local import LocalStorage
from tests.fault_proxy import fault_proxy, refusal
from tests.small_jobs import (
    answers,
    engine,
    job,
    parts,
    prompts,
    run,
    standing,
    write_lines,
    write_parquet,
)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "BACKOFF_S", 0.0)


def manifest(config: BatchConfig) -> Manifest:
    return Manifest.model_validate_json((Path(config.output) / "_manifest.json").read_bytes())


def succeeded(config: BatchConfig) -> bool:
    return (Path(config.output) / "_SUCCESS").exists()


def never(config: EngineConfig) -> Replica:
    raise AssertionError("nothing was to be answered")


def check_answers(config: BatchConfig, count: int) -> None:
    """Each row of `prompts(count)` has its one answer."""
    rows = answers(config)
    assert {row["id"]: row["text"] for row in rows} == {
        f"r{n}": fake_text(f"prompt {n}") for n in range(count)
    }
    assert len(rows) == len({(row["source_file"], row["source_row"]) for row in rows}) == count


class Dying(InProcessExecutor):
    """A driver that dies after so many parts."""

    def __init__(self, after: int, make: Callable[[EngineConfig], Replica] = make_replica) -> None:
        super().__init__(make)
        self.after = after

    def run_shards(
        self, config: BatchConfig, plan: Plan, pending: Sequence[int]
    ) -> Iterator[Receipt | None]:
        left = self.after
        work = super().run_shards(config, plan, pending)
        for receipt in work:
            if receipt is not None:
                if not left:
                    work.close()  # type: ignore[attr-defined]
                    raise KeyboardInterrupt
                left -= 1
            yield receipt


class Stuck(FakeReplica):
    """An engine that answers the first 20 prompts only."""

    async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
        if int(body["messages"][0]["content"].removeprefix("prompt ")) >= 20:
            await asyncio.Event().wait()
        return await super().complete(endpoint, body)


# From start to end


def test_every_row_of_every_file_has_its_answer_once(tmp_path: Path) -> None:
    rows = prompts(250)
    write_lines(tmp_path / "in" / "a.jsonl", rows[:100])
    write_lines(tmp_path / "in" / "deep" / "b.jsonl", rows[100:130])
    write_parquet(tmp_path / "in" / "c.parquet", pa.Table.from_pylist(rows[130:]))
    config = job(tmp_path, shard_rows=40)
    summary = run(config)
    check_answers(config, 250)
    assert [row["source_row"] for row in answers(config)] == [*range(100), *range(120), *range(30)]
    assert (summary.rows, summary.error_rows) == (250, 0)
    assert succeeded(config)


def test_an_output_that_ends_in_two_slashes_is_one_folder(tmp_path: Path, s3_prefix: str) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(25))
    config = job(tmp_path, output=f"{s3_prefix}out//", shard_rows=10)
    assert run(config).rows == 25
    run(config, never)
    assert storage_for(s3_prefix).head(f"{s3_prefix}out/_SUCCESS").size == 0


def test_the_manifest_says_what_lies_there(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [*prompts(25), b"{", {"id": "none"}])
    config = job(tmp_path, shard_rows=10)
    summary = run(config)
    found = manifest(config)
    assert (found.rows, found.errors) == (27, {"invalid_json": 1, "missing_prompt": 1})
    assert found.errors == summary.errors
    assert [part.name for part in found.parts] == list(parts(config))
    for part in found.parts:
        path = Path(config.output) / part.name
        assert part.size == path.stat().st_size
        assert part.sha256 == storage_for(config.output).sha256(str(path))
        table = pq.read_table(path)
        assert part.rows == table.num_rows
        assert part.prompt_tokens == sum(table["prompt_tokens"].drop_null().to_pylist())
    assert found.prompt_tokens == sum(part.prompt_tokens for part in found.parts)
    assert found.completion_tokens == 25 * 4


def test_a_job_without_rows_succeeds_with_no_parts(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [])
    config = job(tmp_path)
    assert run(config, never).rows == 0
    assert succeeded(config)
    assert (manifest(config).rows, manifest(config).parts) == (0, ())


def test_a_limit_takes_the_first_rows_of_the_inputs(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 20), ("c", 40)):
        write_lines(tmp_path / "in" / f"{name}.jsonl", prompts(20, start=start))
    config = job(tmp_path, limit=27, shard_rows=10)
    run(config)
    check_answers(config, 27)


def test_a_dry_run_plans_and_writes_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(20))
    plan = obtain_plan(job(tmp_path), InProcessExecutor(), dry_run=True)
    assert plan.rows == 20
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_told_with_file_and_row_and_stop_nothing(tmp_path: Path) -> None:
    lines = [
        *prompts(2),
        b"\xff",
        {"prompt": "x", "sampling": {"stream": True}},
        *prompts(3, start=2),
    ]
    path = write_lines(tmp_path / "in" / "a.jsonl", lines)
    config = job(tmp_path)
    summary = run(config)
    assert summary.errors == {"invalid_utf8": 1, "unsupported_parameter": 1}
    bad = [row for row in answers(config) if row["error_code"]]
    assert [(row["source_file"], row["source_row"]) for row in bad] == [
        (str(path), 2),
        (str(path), 3),
    ]
    assert all(f"{path}#{row['source_row']}: " in row["error_message"] for row in bad)


def test_duplicate_ids_are_told_and_each_answered(tmp_path: Path) -> None:
    rows = [{"id": "same", "prompt": f"prompt {n}"} for n in range(3)]
    path = write_lines(tmp_path / "in" / "a.jsonl", rows)
    config, out = job(tmp_path), io.StringIO()
    run(config, console=Console(file=out, width=500))
    assert f"2 rows repeat an id (first: {path}#0 and {path}#1)" in out.getvalue()
    assert [(row["id"], row["source_row"], row["text"]) for row in answers(config)] == [
        ("same", n, fake_text(f"prompt {n}")) for n in range(3)
    ]


# Again


def test_running_again_recomputes_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [*prompts(50), b"{"])
    config = job(tmp_path, shard_rows=10)
    run(config)
    before, report = standing(config), (tmp_path / "out" / "_report.html").read_bytes()
    assert run(config, never).rows == 51
    assert standing(config) == before
    assert (tmp_path / "out" / "_report.html").read_bytes() == report  # of the run that did it
    assert succeeded(config)


def test_a_part_that_was_deleted_is_made_again_alone(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(50))
    config = job(tmp_path, shard_rows=10)
    run(config)
    before, lost = standing(config), list(parts(config))[2]
    (tmp_path / "out" / lost).unlink()
    run(config)
    after = standing(config)
    assert {name for name in before if before[name] != after[name]} == {lost}
    check_answers(config, 50)


def test_other_machines_and_shard_sizes_go_on_with_the_plan_that_is_there(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(50))
    with pytest.raises(KeyboardInterrupt):
        run_batch(job(tmp_path, shard_rows=10), Dying(2), Console(file=io.StringIO()))
    before = standing(job(tmp_path))
    config = job(tmp_path, shard_rows=7, max_attempts=9, engine={"gpu_memory_utilization": 0.1})
    run(config)
    assert {name: standing(config)[name] for name in before} == before
    assert len(parts(config)) == 5
    check_answers(config, 50)


@pytest.mark.slow
@budget(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=6), st.integers(1, 30))
def test_a_driver_that_dies_at_any_moment_loses_and_repeats_nothing(
    deaths: list[int], shard_rows: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_lines(Path(folder) / "in" / "a.jsonl", prompts(100))
        config = job(Path(folder), shard_rows=shard_rows, shards_in_flight=2)
        seen: dict[str, tuple[bytes, int]] = {}
        for after in deaths:
            try:
                run_batch(config, Dying(after), Console(file=io.StringIO()))
            except KeyboardInterrupt:
                assert not succeeded(config)
            now = standing(config)
            assert {name: now[name] for name in seen} == seen
            seen = now
        run(config)
        now = standing(config)
        assert {name: now[name] for name in seen} == seen
        check_answers(config, 100)
        assert succeeded(config)


def test_shards_whose_rows_state_the_longest_limits_go_first(tmp_path: Path) -> None:
    limits = [10, 20, 3000, 10, None, 40]  # one a shard, in the order of the file
    rows = [{"prompt": f"p{n}", "sampling": {"max_tokens": m}} for n, m in enumerate(limits) if m]
    rows.insert(4, {"prompt": "p4"})
    write_lines(tmp_path / "in" / "a.jsonl", rows)
    config = job(tmp_path, shard_rows=1, shards_in_flight=1)
    plan = obtain_plan(config, InProcessExecutor())
    assert [shard.longest for shard in plan.shards] == limits
    # One without a limit may be the longest of all; 20 and 40 are of two ranks, 10 and 10 of one.
    assert longest_first(plan, range(6)) == [4, 2, 5, 1, 0, 3]
    assert longest_first(plan, [0, 1, 3]) == [1, 0, 3]
    run(config)
    written = {name: modified for name, (_, modified) in standing(config).items()}
    assert [plan.shard_of(name) for name in sorted(written, key=written.__getitem__)] == [
        4, 2, 5, 1, 0, 3,
    ]  # fmt: skip


def test_two_drivers_on_one_prefix_do_no_harm(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(200))
    config = job(tmp_path, shard_rows=10)
    failures: list[BaseException] = []
    start = threading.Barrier(3)

    def drive() -> None:
        try:
            start.wait()
            run(config)
        except BaseException as error:
            failures.append(error)

    drivers = [threading.Thread(target=drive) for _ in range(3)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert failures == []
    check_answers(config, 200)
    assert succeeded(config)
    for part in manifest(config).parts:
        assert part.sha256 == storage_for(config.output).sha256(f"{config.output}/{part.name}")


# Another job


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sampling": {"temperature": 0.1}}, "sampling.temperature was None and is now 0.1"),
        ({"engine": {"model": "other"}}, "engine.model was 'tiny' and is now 'other'"),
        ({"engine": {"chat_template": "{{ x }}"}}, "engine.chat_template was None"),
        ({"system_prompt": "be brief"}, "system_prompt was None and is now 'be brief'"),
        ({"limit": 3}, "limit was None and is now 3"),
    ],
)
def test_a_changed_job_is_refused_by_what_differs_and_harms_nothing(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(20))
    config = job(tmp_path, shard_rows=10)
    run(config)
    before = standing(config)
    with pytest.raises(PlanMismatchError) as caught:
        run(job(tmp_path, **changes), never)
    assert named in str(caught.value)
    assert standing(config) == before
    assert succeeded(config)


def test_changed_inputs_are_refused_by_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in" / "a.jsonl", prompts(20))
    config = job(tmp_path)
    run(config)
    write_lines(path, prompts(20, start=1))
    write_lines(tmp_path / "in" / "b.jsonl", prompts(1))
    with pytest.raises(PlanMismatchError) as caught:
        run(config, never)
    assert f"input {path} changed" in str(caught.value)
    assert f"input {tmp_path}/in/b.jsonl is new" in str(caught.value)


@pytest.mark.parametrize(
    "sampling", [{"logit_bias": {50256: -100}}, {"stop": ["\n", "看"]}, {"top_p": 1}]
)
def test_a_job_with_any_sampling_can_be_run_and_resumed(
    tmp_path: Path, sampling: dict[str, Any]
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(5))
    config = job(tmp_path, sampling=sampling)
    run(config)
    run(config, never)
    check_answers(config, 5)


# Inputs and outputs apart


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ("data/", "data/answers"),
        ("data", "data/answers/deep"),
        ("data/", "data"),
        ("data/*.jsonl", "data"),
        ("data/a.jsonl", "data/"),
        ("data/../data/", "data/answers"),
    ],
)
def test_answers_are_never_written_among_the_inputs(
    tmp_path: Path, inputs: str, output: str
) -> None:
    write_lines(tmp_path / "data" / "a.jsonl", prompts(2))
    with pytest.raises(ConfigError, match="under the"):
        run(job(tmp_path, input=(f"{tmp_path}/{inputs}",), output=f"{tmp_path}/{output}"), never)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.jsonl"]


def test_a_prefix_that_only_begins_like_the_inputs_is_another_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(2))
    run(job(tmp_path, output=f"{tmp_path}/in-answers"))


@pytest.mark.parametrize("output_format", ["parquet", "openai-jsonl"])
def test_a_glob_that_answers_match_too_takes_none_of_them_for_prompts(
    tmp_path: Path, output_format: str
) -> None:
    write_lines(tmp_path / "day" / "a.jsonl", prompts(20))
    config = job(
        tmp_path,
        input=(f"{tmp_path}/**/*.jsonl", f"{tmp_path}/**/*.parquet")
        if output_format == "parquet"
        else (f"{tmp_path}/**/*.jsonl",),
        output_format=output_format,
        shard_rows=10,
    )
    if output_format == "parquet":
        write_parquet(tmp_path / "day" / "b.parquet", pa.Table.from_pylist(prompts(5, start=20)))
    run(config)
    before = standing(config)
    run(config, never)
    assert standing(config) == before
    names = [Path(item.uri).name for item in list_inputs(config)]
    assert names == ["a.jsonl", "b.parquet"][: len(names)]


def test_files_in_capitals_are_read_and_others_are_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "A.JSONL", prompts(5))
    write_parquet(tmp_path / "in" / "B.PARQUET", pa.Table.from_pylist(prompts(5, 5)))
    (tmp_path / "in" / "C.JSONL.GZ").write_bytes(
        gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in prompts(5, 10)))
    )
    (tmp_path / "in" / "d.pq").write_bytes(b"")
    config, shown = job(tmp_path), Console(file=io.StringIO(), width=1000)
    run(config, console=shown)
    check_answers(config, 15)
    line = f"files skipped below {tmp_path}/in/: 1 (first: {tmp_path}/in/d.pq); "
    assert line in shown.file.getvalue()  # type: ignore[attr-defined]


def test_patterns_that_match_nothing_are_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="matches no file"):
        run(job(tmp_path), never)


class Unscanned(InProcessExecutor):
    def map(self, function: Any, items: Any) -> Iterator[Any]:
        raise AssertionError("nothing was to be scanned")


def test_a_bucket_that_is_not_there_is_told_before_the_scan(tmp_path: Path, s3_prefix: str) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(1))
    config = job(tmp_path, output="s3://no-such-bucket/out")
    for dry_run in (False, True):
        with pytest.raises(StorageError, match="no bucket no-such-bucket: create it"):
            obtain_plan(config, Unscanned(), dry_run=dry_run)


def test_an_output_that_cannot_be_written_is_told_before_the_scan(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(1))
    (tmp_path / "file").write_text("no folder")
    config = job(tmp_path, output=f"{tmp_path}/file/out")
    with pytest.raises(StorageError, match="a file stands where its folder should be"):
        obtain_plan(config, Unscanned())


def test_a_bucket_that_refuses_writes_is_told_before_the_scan(
    tmp_path: Path, s3_endpoint: str, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(1))
    config = job(tmp_path, output=s3_prefix)
    with fault_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3._client.cache_clear()
        proxy.on("PUT", refusal(403, "AccessDenied"), times=float("inf"))
        with pytest.raises(AccessDeniedError, match="what its policy allows"):
            obtain_plan(config, Unscanned())
        assert obtain_plan(config, InProcessExecutor(), dry_run=True).rows == 1


def test_proving_that_the_output_can_be_written_leaves_nothing_there(
    tmp_path: Path, s3_prefix: str
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(1))
    obtain_plan(job(tmp_path, output=s3_prefix), InProcessExecutor())
    listed = [item.uri for item in storage_for(s3_prefix).list(s3_prefix)]
    assert listed == [f"{s3_prefix}_plan.json"]


def test_a_finished_job_asks_for_no_proof_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(1))
    config = job(tmp_path)
    plan = obtain_plan(config, InProcessExecutor())
    monkeypatch.setattr(LocalStorage, "write", None)
    assert obtain_plan(config, Unscanned()) == plan


def test_an_input_whose_name_is_not_utf8_is_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "\udcff.jsonl", prompts(2))
    with pytest.raises(InputError, match=r"udcff\.jsonl': its name is not UTF-8"):
        run(job(tmp_path), never)


def test_a_chat_template_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(2))
    with pytest.raises(ConfigError, match="cannot be read"):
        run(job(tmp_path, engine={"chat_template": "no.jinja"}), never)


# Faults


def test_a_dead_engine_ends_the_job_and_the_next_run_goes_on(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(40))
    config = job(tmp_path, shard_rows=10, shards_in_flight=1)
    with pytest.raises(EngineDeadError):
        run(config, engine(die_after=25))
    before = standing(config)
    assert len(before) == 2  # nothing of the shard whose rows the engine took with it
    assert not succeeded(config)
    run(config)
    assert {name: standing(config)[name] for name in before} == before
    check_answers(config, 40)


def test_an_engine_that_cannot_start_ends_the_job_with_its_cause(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(4))
    starts = []

    def make(config: EngineConfig) -> Replica:
        starts.append(config)
        return engine(start_error="no such model")(config)

    with pytest.raises(EngineStartError, match="no such model"):
        run(job(tmp_path), make)
    assert len(starts) == 1


def test_the_same_command_again_is_no_way_around_the_error_fraction(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [*prompts(4), *[b"{"] * 6])
    config = job(tmp_path, shard_rows=5, max_error_fraction=0.5)
    for _ in range(2):
        with pytest.raises(TooManyErrorsError, match="6 of 10 rows failed"):
            run(config)
        assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert run(config.model_copy(update={"max_error_fraction": 0.6})).error_rows == 6


def test_rerun_rows_that_fail_again_are_too_many_only_of_the_whole_job(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [*prompts(19), b"{"])
    config = job(tmp_path, shard_rows=5, max_error_fraction=0.2)
    assert run(config).error_rows == 1
    assert run(config.model_copy(update={"retry_errors": True})).error_rows == 1


def test_a_misconfigured_job_is_stopped_and_its_parts_stay(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [*prompts(50), *[b"{"] * 100])
    config = job(tmp_path, shard_rows=50, max_error_fraction=0.5)
    with pytest.raises(TooManyErrorsError, match=r"100 of 150 rows failed.*invalid_json \(100\)"):
        run(config)
    assert not succeeded(config)
    before = standing(config)
    run(config.model_copy(update={"max_error_fraction": None}))
    assert {name: standing(config)[name] for name in before} == before
    assert len(answers(config)) == 150


def test_a_part_that_is_not_ours_is_named_and_not_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(20))
    config = job(tmp_path, shard_rows=10)
    run(config)
    name = list(parts(config))[1]
    (tmp_path / "out" / name).write_bytes(b"garbage")
    with pytest.raises(IncompleteOutputError, match=f"{name} is not a part.*delete it"):
        run(config, never)
    (tmp_path / "out" / name).unlink()
    run(config)
    check_answers(config, 20)


def test_a_plan_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_plan.json").write_text("{}")
    with pytest.raises(ConfigError, match="use a new --output"):
        run(job(tmp_path), never)


# Failed rows again


def test_failed_rows_are_rerun_and_only_their_parts_rewritten(tmp_path: Path) -> None:
    rows = prompts(40)
    write_lines(tmp_path / "in" / "a.jsonl", [*rows[:20], b"{", *rows[20:]])
    config = job(tmp_path, shard_rows=10, max_attempts=2, shards_in_flight=1)
    assert run(config, engine(fail_times=2)).errors == {"engine_error": 40, "invalid_json": 1}
    again = config.model_copy(update={"retry_errors": True})
    summary = run(again, engine())
    assert summary.errors == manifest(config).errors == {"invalid_json": 1}
    good = [row for row in answers(config) if row["error_code"] is None]
    assert {row["attempts"] for row in good} == {3}
    assert len(good) == 40

    before = standing(config)
    run(again)  # only the part with the line that is no JSON
    after = standing(config)
    assert [name for name in before if before[name] != after[name]] == [list(before)[2]]
    assert succeeded(config)


def test_of_shards_with_few_failed_rows_more_are_rerun_at_once(tmp_path: Path) -> None:
    rows: list[object] = prompts(1000)
    rows[::100] = [b"{"] * 10
    write_lines(tmp_path / "in" / "a.jsonl", rows)
    config = job(tmp_path, shard_rows=100, engine={"max_num_seqs": 10})
    run(config)
    seen: list[int | None] = []

    class Seen(InProcessExecutor):
        def run_shards(
            self, config: BatchConfig, plan: Plan, pending: Sequence[int]
        ) -> Iterator[Receipt | None]:
            seen.append(config.shards_in_flight)
            return super().run_shards(config, plan, pending)

    again = config.model_copy(update={"retry_errors": True})
    run_batch(again, Seen(), Console(file=io.StringIO()))
    set_by_hand = again.model_copy(update={"shards_in_flight": 3})
    run_batch(set_by_hand, Seen(), Console(file=io.StringIO()))
    assert seen == [min(MAX_IN_FLIGHT, 1 + FILLS * 10), 3]  # one row of each shard is asked


def test_failed_rows_of_an_unfinished_job_cannot_be_rerun(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(40))
    config = job(tmp_path, shard_rows=10, shards_in_flight=1)
    with pytest.raises(KeyboardInterrupt):
        run_batch(config, Dying(1, Stuck), Console(file=io.StringIO()))
    with pytest.raises(ConfigError, match="without --retry-errors first"):
        run(config.model_copy(update={"retry_errors": True}), never)


def test_a_rerun_that_is_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(40))
    config = job(tmp_path, shard_rows=10, max_attempts=1, shards_in_flight=1)
    run(config, engine(fail_times=1))
    again = config.model_copy(update={"retry_errors": True})
    with pytest.raises(KeyboardInterrupt):
        run_batch(again, Dying(2), Console(file=io.StringIO()))
    assert not succeeded(config)
    run(again)
    check_answers(config, 40)
    assert succeeded(config)


# OpenAI's files


def openai_lines(config: BatchConfig, kind: str) -> list[dict[str, Any]]:
    files = sorted(Path(config.output).glob(f"part-*.{kind}.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def test_openai_files_have_openais_lines(tmp_path: Path) -> None:
    url = "/v1/chat/completions"
    lines: list[object] = [
        {
            "custom_id": f"c{n}",
            "method": "POST",
            "url": url,
            "body": {"messages": [{"role": "user", "content": f"prompt {n}"}], "max_tokens": n},
        }
        for n in range(4)  # max_tokens=0 is refused
    ]
    path = write_lines(tmp_path / "in" / "a.jsonl", [*lines, b"{"])
    config = job(tmp_path, output_format="openai-jsonl", shard_rows=3)
    run(config)
    done, failed = openai_lines(config, "output"), openai_lines(config, "errors")
    assert [line["custom_id"] for line in done] == ["c1", "c2", "c3"]
    for line in [*done, *failed]:
        assert set(line) == {"id", "custom_id", "response", "error"}
    for number, line in enumerate(done, 1):
        assert line["error"] is None
        assert set(line["response"]) == {"status_code", "request_id", "body"}
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["object"] == "chat.completion"
        message = line["response"]["body"]["choices"][0]["message"]
        assert message["content"] == fake_text(f"prompt {number}")
    assert [line["custom_id"] for line in failed] == ["c0", f"{path}#4"]
    assert failed[0]["response"]["status_code"] == 400
    assert failed[0]["error"]["code"] == "invalid_type"
    assert failed[1]["response"] is None
    assert failed[1]["error"]["code"] == "invalid_json"
    ids = [line["id"] for line in [*done, *failed]]
    assert len(set(ids)) == len(ids)


def test_an_output_folder_that_is_another_one_on_a_node_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(2))
    config = job(tmp_path)
    plan = obtain_plan(config, InProcessExecutor())
    check_shared(config, plan, "here")
    here = config.model_copy(update={"output": str(tmp_path / "other")})
    with pytest.raises(ConfigError, match=r"on node there .*s3://"):
        check_shared(here, plan, "there")
    obtain_plan(job(tmp_path, output=here.output, limit=1), InProcessExecutor())
    with pytest.raises(ConfigError, match="not this job's"):  # one of another job is no better
        check_shared(here, plan, "there")
    check_shared(config.model_copy(update={"output": "s3://all/see"}), plan, "there")


@pytest.mark.slow
@pytest.mark.parametrize("files", [3, 60])
def test_what_a_task_is_sent_does_not_grow_with_the_job(tmp_path: Path, files: int) -> None:
    class Measured(InProcessExecutor):
        def map(self, function: Any, items: Any) -> Iterator[Any]:
            for item in items:
                sent.append(len(pickle.dumps((function, item))))
                yield function(item)

    sent: list[int] = []
    for at in range(files):
        write_lines(tmp_path / "in" / f"{at:03}.jsonl", prompts(2, start=2 * at))
    config = job(tmp_path, output_format="openai-jsonl", shard_rows=1)
    run_batch(config, Measured(), Console(file=io.StringIO()))
    assert len(sent) == 3 * files
    assert max(sent) < 1500


def test_openai_files_are_in_the_manifest_and_parts_out_of_readers_way(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [*prompts(5), b"{"])
    config = job(tmp_path, output_format="openai-jsonl", shard_rows=5)
    run(config)
    exports = [name for part in manifest(config).parts for name in part.exports]
    assert sorted(exports) == sorted(path.name for path in (tmp_path / "out").glob("*.jsonl"))
    assert [name.split(".", 1)[1] for name in exports] == ["output.jsonl", "errors.jsonl"]
    assert all(path.parent.name == "_parts" for path in parts(config).values())


def test_a_failure_of_the_engine_is_a_servers_error_in_openais_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(1))
    config = job(tmp_path, output_format="openai-jsonl", max_attempts=1)
    run(config, engine(fail_times=1))
    assert [line["response"]["status_code"] for line in openai_lines(config, "errors")] == [500]


def test_a_rerun_that_leaves_no_errors_leaves_no_error_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(5))
    config = job(tmp_path, output_format="openai-jsonl", max_attempts=1)
    run(config, engine(fail_times=1))
    assert len(openai_lines(config, "errors")) == 5
    run(config.model_copy(update={"retry_errors": True}))
    assert list((tmp_path / "out").glob("*.errors.jsonl")) == []
    assert len(openai_lines(config, "output")) == 5


def test_any_text_survives_its_way_through_the_job(tmp_path: Path) -> None:
    chance = random.Random(0)
    texts = [
        "看 \u2028 \x00 \U0001f600 \x85",
        "a\r\nb",
        "\ufeff",
        *(chr(chance.randrange(1, 0xD7FF)) for _ in range(50)),
    ]
    write_lines(
        tmp_path / "in" / "a.jsonl", [{"id": text, "prompt": text, "note": text} for text in texts]
    )
    config = job(tmp_path, output_format="openai-jsonl")
    run(config)
    rows = answers(config)
    assert [(row["id"], row["note"]) for row in rows] == [(text, text) for text in texts]
    assert [row["text"] for row in rows] == [fake_text(text) for text in texts]
    assert [line["custom_id"] for line in openai_lines(config, "output")] == texts
