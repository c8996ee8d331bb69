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


# One that has nothing to do for a second sleeps; after forty it goes.
SLEEPY = {
    **CONFIG,
    "autoscaling": {
        # The second is as long as a batch job may take to its first row on a slow machine.
        **CONFIG["autoscaling"], "sleep_delay_s": 1, "downscale_to_zero_delay_s": 40,
    },
}  # fmt: skip
BUDGET = {**CONFIG, "autoscaling": {**CONFIG["autoscaling"], "batch_replicas": 1}}


@pytest.fixture(scope="module")
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    found = Service(request.param)
    yield found
    found.stop()


@pytest.mark.parametrize("service", [CONFIG], indirect=True, ids=["default"])
def test_the_first_request_waits_for_the_first_replica_and_the_last_goes_after_silence(
    service: Service,
) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    for _ in range(2):
        until(lambda: not service.replicas(), 90)
        found = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=90)
        assert found.status_code == 200, found.text
        assert found.json()["choices"][0]["message"]["content"].startswith("fake:")
        assert len(service.replicas()) == 1


def batch(service: Service, folder: Path) -> "subprocess.Popen[str]":
    file = write_lines(folder / "in" / "a.jsonl", prompts(20))
    return service.batch(
        "--input", str(file), "--output", str(folder / "out"), "--progress-interval-s", "1"
    )


@pytest.mark.parametrize("service", [CONFIG], indirect=True, ids=["default"])
def test_a_batch_job_without_a_budget_says_that_it_waits_for_an_online_request(
    service: Service, tmp_path: Path
) -> None:
    until(lambda: not service.replicas(), 90)
    job = batch(service, tmp_path)
    assert job.stdout is not None
    assert any("batch_replicas" in line for line in job.stdout)
    assert service.replicas() == []
    body = {"model": "m", "prompt": "hi"}
    assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=90).status_code == 200
    assert job.wait(120) == 0, job.communicate()[0]


@pytest.mark.parametrize("service", [BUDGET], indirect=True, ids=["budget"])
def test_a_batch_job_starts_the_first_replica_within_its_budget(
    service: Service, tmp_path: Path
) -> None:
    until(lambda: not service.replicas(), 90)
    job = batch(service, tmp_path)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0, said
    assert "no replica of 'phi4' runs: rows wait for the one that is being started" in said
    assert "rows 20/20 (100%)" in said
    until(lambda: not service.replicas(), 90)


def asleep(service: Service) -> bool:
    [found] = told(service, "phi4ray:asleep").values()
    return found == 1.0


@pytest.mark.parametrize("service", [SLEEPY], indirect=True, ids=["sleepy"])
def test_a_replica_sleeps_before_it_goes_and_both_doors_wake_it(
    service: Service, tmp_path: Path
) -> None:
    until(lambda: asleep(service), 30)
    # The fake asserts that nobody asks it while it sleeps.
    body = {"model": "m", "prompt": "hi"}
    assert httpx.post(f"{service.url}/v1/completions", json=body, timeout=90).status_code == 200
    assert not asleep(service)
    until(lambda: asleep(service), 30)
    job = batch(service, tmp_path)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0, said
    assert "rows 20/20 (100%)" in said
    until(lambda: not service.replicas(), 90)
