"""To zero and back: without requests no replica runs, and the first one is held, not failed."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster_service import Service, told
from tests.small_jobs import prompts, write_lines
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CONFIG: dict[str, Any] = {
    "engine": {
        "kind": "fake", "model": "m", "num_cpus": 0.1, "engine_args": {"start_s": 3.0},
    },
    "autoscaling": {
        "min_replicas": 0, "max_replicas": 2, "downscale_delay_s": 1,
        "downscale_to_zero_delay_s": 2, "trend_s": 1,
    },
    "drain_timeout_s": 10,
}  # fmt: skip
# A batch job may start the first replica. One that has nothing to do for a second sleeps; after
# twenty it goes.
SLEEPY = {
    **CONFIG,
    "autoscaling": {
        **CONFIG["autoscaling"], "max_replicas": 1, "batch_replicas": 1,
        # The first is shorter than a batch job takes to its first row, the second longer, on any
        # machine.
        "sleep_delay_s": 1, "downscale_to_zero_delay_s": 20,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    found = Service(CONFIG)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def sleepy(service: Service) -> Service:
    """The same one with the other configuration, with which it begins again."""
    until(lambda: not service.replicas(), 90)
    service.change(SLEEPY)
    service.until_changed()
    return service


def batch(service: Service, folder: Path) -> "subprocess.Popen[str]":
    file = write_lines(folder / "in" / "a.jsonl", prompts(20))
    return service.batch(
        "--input", str(file), "--output", str(folder / "out"), "--progress-interval-s", "1"
    )


def test_without_a_replica_a_request_is_held_and_a_batch_job_without_a_budget_waits_for_one(
    service: Service, tmp_path: Path
) -> None:
    until(lambda: not service.replicas(), 90)
    job = batch(service, tmp_path)
    assert job.stdout is not None
    assert any("batch_replicas" in line for line in job.stdout)
    assert service.replicas() == []
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    found = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=90)
    assert found.status_code == 200, found.text
    assert found.json()["choices"][0]["message"]["content"].startswith("fake:")
    assert len(service.replicas()) == 1
    assert job.wait(120) == 0, job.communicate()[0]
    # After silence the last one goes.
    until(lambda: not service.replicas(), 90)


def asleep(service: Service) -> bool:
    [found] = told(service, "phi4ray:asleep").values()
    return found == 1.0


def test_a_replica_sleeps_before_it_goes_and_both_doors_wake_it(
    sleepy: Service, tmp_path: Path
) -> None:
    until(lambda: asleep(sleepy), 30)
    # The fake asserts that nobody asks it while it sleeps.
    body = {"model": "m", "prompt": "hi"}
    assert httpx.post(f"{sleepy.url}/v1/completions", json=body, timeout=90).status_code == 200
    assert not asleep(sleepy)
    until(lambda: asleep(sleepy), 30)
    [woken] = sleepy.replicas()
    job = batch(sleepy, tmp_path)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0, said
    assert "rows 20/20 (100%)" in said
    assert sleepy.replicas() == [woken]
    until(lambda: not sleepy.replicas(), 90)


def test_a_batch_job_starts_the_first_replica_within_its_budget(
    sleepy: Service, tmp_path: Path
) -> None:
    until(lambda: not sleepy.replicas(), 90)
    job = batch(sleepy, tmp_path)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0, said
    assert "no replica of 'phi4' runs: rows wait for the one that is being started" in said
    assert "rows 20/20 (100%)" in said
