"""A replica that cannot start ends no job that others work on, and the job's end stops replicas."""

import io
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cluster.local import connected
from cluster.worker import RayShardWorker
from phi4ray.batch.run import run_batch
from phi4ray.errors import ConfigError, EngineStartError
from phi4ray.fake import fake_text
from tests.broken_workers import (
    REASON,
    Breaking,
    BreakingLast,
    Broken,
    Counting,
    Elsewhere,
    Several,
    Stopped,
)
from tests.small_jobs import answers, job, prompts, write_lines
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


def test_replicas_are_stopped_at_the_end_and_not_killed(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(ROWS))
    console = Console(file=io.StringIO())
    run_batch(job(tmp_path), Several(Stopped, console), console)
    until((tmp_path / "stopped").exists, 60)


def test_all_replicas_that_the_cluster_has_room_for_start_together(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(ROWS))
    config = job(
        tmp_path, shard_rows=1,
        engine={"num_cpus": 0.1, "engine_args": {"start_s": 10.0, "latency_s": 0.1}},
    )  # fmt: skip
    console = Console(file=io.StringIO())
    run_batch(config, Several(Counting, console), console)
    assert {file.read_text() for file in tmp_path.glob("up-*")} == {"4"}
