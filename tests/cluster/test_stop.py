"""How jobs on Ray go on and end: without some replica, without any, or before they are done."""

import io
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cluster.batch import RayExecutor
from cluster.local import connected
from cluster.worker import RayShardWorker
from phi4ray.batch.planning import obtain_plan
from phi4ray.batch.run import run_batch
from phi4ray.errors import ConfigError, EngineStartError, TooManyErrorsError
from phi4ray.fake import fake_text
from tests.broken_workers import (
    REASON,
    Breaking,
    BreakingLast,
    Broken,
    Elsewhere,
    Several,
    Telling,
)
from tests.small_jobs import answers, job, parts, prompts, write_lines
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

ROWS = 60


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with connected(num_cpus=2, worker_logs=False):
        yield


@pytest.mark.parametrize("worker", [Broken, Breaking, BreakingLast])
def test_others_answer_the_shards_of_a_replica_without_an_engine(
    tmp_path: Path, worker: type
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(ROWS))
    config = job(
        tmp_path, shard_rows=1, min_replicas=2, max_replicas=2, shards_in_flight=4,
        engine={"num_cpus": 0.1, "engine_args": {"latency_s": 0.1, "start_s": 2.0}},
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=1000)
    summary = run_batch(config, Several(worker, console), console)
    assert (summary.run.rows, summary.error_rows) == (ROWS, 0)
    texts = sorted(row["text"] for row in answers(config))
    assert texts == sorted(fake_text(f"prompt {row}") for row in range(ROWS))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count(REASON) == 1
    assert f"no engine starts on {os.uname().nodename}" in said


def test_a_job_that_no_replica_can_start_for_ends_with_the_cause(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(ROWS))
    config = job(
        tmp_path, shard_rows=1, min_replicas=2, max_replicas=2,
        engine={"num_cpus": 0.1, "engine_args": {"start_error": REASON}},
    )  # fmt: skip
    console = Console(file=io.StringIO())
    with pytest.raises(EngineStartError, match=REASON):
        run_batch(config, Several(Broken, console), console)


def test_a_node_that_does_not_share_the_output_ends_the_job_before_its_engine_starts(
    tmp_path: Path,
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(ROWS))
    config = job(tmp_path, engine={"num_cpus": 0.1, "engine_args": {"start_s": 200.0}})
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match=rf"on node {os.uname().nodename} .*s3://"):
        run_batch(config, Several(Elsewhere, console), console)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "engine", [{"num_gpus": 1}, {"engine_args": {"start_s": 600}}], ids=["waits", "starts"]
)
def test_a_job_without_a_replica_yet_ends_at_once_when_it_is_interrupted(
    tmp_path: Path, engine: dict[str, object]
) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(ROWS))
    config = job(tmp_path, shard_rows=1, engine=engine)
    console = Console(file=io.StringIO())
    interrupt = threading.Timer(6.0, os.kill, [os.getpid(), signal.SIGINT])
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):  # and not only when the test's time is up
        run_batch(config, Several(RayShardWorker, console), console)


def test_replicas_start_together_and_are_stopped_at_the_end_and_not_killed(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(ROWS))
    config = job(
        tmp_path, shard_rows=1, shards_in_flight=4,  # for longer than one is up before the other
        engine={"num_cpus": 0.1, "engine_args": {"start_s": 10.0, "latency_s": 1.0}},
    )  # fmt: skip
    console = Console(file=io.StringIO())
    run_batch(config, Several(Telling, console), console)
    assert [file.read_text() for file in tmp_path.glob("up-*")] == ["2", "2"]
    until(lambda: len(list(tmp_path.glob("stopped-*"))) == 2, 60)


def test_of_a_job_that_is_stopped_no_queued_shard_is_begun(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(ROWS))
    config = job(
        tmp_path, shard_rows=1, max_replicas=1, shards_in_flight=4,
        engine={"engine_args": {"latency_s": 0.5}},
    )  # fmt: skip
    executor = RayExecutor(Console(file=io.StringIO()))
    plan = obtain_plan(config, executor)
    running = executor.run_shards(config, plan, range(ROWS))
    assert next(receipt for receipt in running if receipt is not None)
    running.close()  # type: ignore[attr-defined]
    left = len(parts(config))
    assert 1 <= left < ROWS // 2

    summary = run_batch(config, executor, Console(file=io.StringIO()))
    assert summary.rows == ROWS
    assert summary.run.rows <= ROWS - left


def test_a_job_of_which_too_many_rows_fail_ends_with_most_shards_not_begun(tmp_path: Path) -> None:
    # Shards take the time of their only row with a prompt.
    shard = [{"prompt": "hi"}, *[{"prompt": 5}] * 9]
    write_lines(tmp_path / "in" / "a.jsonl", shard * ROWS)
    config = job(
        tmp_path, shard_rows=len(shard), max_replicas=1, shards_in_flight=4,
        max_error_fraction=0.1, engine={"engine_args": {"latency_s": 0.5}},
    )  # fmt: skip
    executor = RayExecutor(Console(file=io.StringIO()))
    with pytest.raises(TooManyErrorsError, match="invalid_type"):
        run_batch(config, executor, Console(file=io.StringIO()))
    assert len(parts(config)) < ROWS
