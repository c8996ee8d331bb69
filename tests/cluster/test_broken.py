"""A replica that cannot start does not end a job that others work on."""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cluster.local import connected
from cluster.worker import RayShardWorker
from phi4ray.batch.run import run_batch
from phi4ray.errors import EngineStartError
from phi4ray.fake import fake_text
from tests.broken_workers import REASON, Breaking, Broken, Several
from tests.small_jobs import answers, job, prompts, write_lines

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

ROWS = 60


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with connected(num_cpus=2, worker_logs=False):
        yield


@pytest.mark.parametrize("worker", [Broken, Breaking])
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
    began = time.monotonic()
    with pytest.raises(EngineStartError, match=REASON):
        run_batch(config, Several(Broken, console), console)
    assert time.monotonic() - began < 60


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
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_batch(config, Several(RayShardWorker, console), console)
    assert 6.0 < time.monotonic() - began < 20.0
