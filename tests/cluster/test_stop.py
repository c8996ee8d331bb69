"""A job on Ray that is interrupted, by its caller or by its own rules, does not go on."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster.batch import RayExecutor
from cluster.local import connected
from phi4ray.batch.planning import obtain_plan
from phi4ray.batch.run import run_batch
from phi4ray.errors import TooManyErrorsError
from tests.small_jobs import job, parts, prompts, write_lines

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SHARDS = 300


def test_of_a_job_that_is_stopped_no_queued_shard_is_begun(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(SHARDS))
    config = job(tmp_path, shard_rows=1, max_replicas=1, shards_in_flight=4)
    with connected(num_cpus=2, worker_logs=False):
        executor = RayExecutor(Console(file=io.StringIO()))
        plan = obtain_plan(config, executor)
        running = executor.run_shards(config, plan, range(SHARDS))
        assert next(receipt for receipt in running if receipt is not None)
        running.close()  # type: ignore[attr-defined]
        left = len(parts(config))
        assert 1 <= left < SHARDS // 2

        summary = run_batch(config, executor, Console(file=io.StringIO()))
        assert summary.rows == SHARDS
        assert summary.run.rows <= SHARDS - left


def test_a_job_of_which_too_many_rows_fail_ends_with_most_shards_not_begun(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [{"prompt": 5}] * SHARDS)
    config = job(tmp_path, shard_rows=1, max_replicas=1, shards_in_flight=4, max_error_fraction=0.1)
    with connected(num_cpus=2, worker_logs=False):
        executor = RayExecutor(Console(file=io.StringIO()))
        with pytest.raises(TooManyErrorsError, match="invalid_type"):
            run_batch(config, executor, Console(file=io.StringIO()))
        assert len(parts(config)) < SHARDS
