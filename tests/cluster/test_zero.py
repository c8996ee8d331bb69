"""To zero and back: without requests no replica runs, and the first one is held, not failed."""

import time
from collections.abc import Iterator

import httpx
import pytest

from tests.cluster_service import Service

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

CONFIG = {
    "engine": {
        "kind": "fake", "model": "m", "num_cpus": 0.1, "engine_args": {"start_s": 3.0},
    },
    "autoscaling": {
        "min_replicas": 0, "max_replicas": 2, "downscale_delay_s": 1,
        "downscale_to_zero_delay_s": 2, "trend_s": 1,
    },
    "drain_timeout_s": 10,
}  # fmt: skip


@pytest.fixture
def service() -> Iterator[Service]:
    found = Service(CONFIG)
    yield found
    found.stop()


def wait_for(service: Service, replicas: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while len(service.replicas()) != replicas:
        assert time.monotonic() < deadline, f"there are {len(service.replicas())} replicas"
        time.sleep(0.5)


def test_the_first_request_waits_for_the_first_replica_and_the_last_goes_after_silence(
    service: Service,
) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    for _ in range(2):
        wait_for(service, 0, 90)
        found = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=90)
        assert found.status_code == 200, found.text
        assert found.json()["choices"][0]["message"]["content"].startswith("fake:")
        assert len(service.replicas()) == 1
