"""No request fails by our own doing: replicas leave and are replaced under thousands of requests.

10,000 of them and more changes at full length, see tests/soak.py.
"""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.online_load import AT_ONCE, load
from tests.processes import replicas_below
from tests.soak import at_length
from tests.waiting import until

ROOT = Path(__file__).parents[2]
REQUESTS = at_length(2_000, 10_000)
# Replicas and version, from three of version 0 on: scale in, scale out with a new version, and in
# the end a new version of all.
CHANGES = at_length(
    ((1, 0), (2, 1), (2, 2)),
    ((1, 0), (3, 1), (2, 1), (3, 2), (1, 2), (3, 3), (3, 4)),
)
KILLS = at_length(1, 2)
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

# In a process of its own, because Ray Serve reads its environment when it is imported.
OPERATOR = """
import itertools, os, sys
from cluster.environment import SERVING
# Less than Serve's 30 s, but longer than a busy machine's HAProxy takes to hear of a change.
os.environ |= SERVING | {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5"}
from ray import serve
from cluster.local import connected
from cluster.serve import application
from phi4ray.serve.config import serve_config

def deploy(replicas, version):
    engine = {"kind": "fake", "model": "m", "num_cpus": 0.1, "env": {"VERSION": str(version)},
              "engine_args": {"latency_s": 1.0, "chunk_s": 0.05}}
    scaling = {"min_replicas": replicas, "max_replicas": max(2, replicas)}
    config = {"engine": engine, "autoscaling": scaling, "drain_timeout_s": 60}
    serve.run(application(serve_config(config)), name="phi4", route_prefix="/")

with connected(num_cpus=4):
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    for line in itertools.chain(["3 0"], sys.stdin):
        deploy(*map(int, line.split()))
        print("deployed", line.strip(), flush=True)
    serve.shutdown()
"""


class Service:
    """Three fake replicas and more or fewer, as told, and clients that ask them."""

    def __init__(self) -> None:
        self.port = 8187
        self.process = subprocess.Popen(
            [sys.executable, "-c", OPERATOR, str(self.port)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )

    def deployed(self) -> None:
        assert any(line.startswith("deployed") for line in self.process.stdout or ())

    def deploy(self, replicas: int, version: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{replicas} {version}\n")
        self.process.stdin.flush()
        self.deployed()

    def three_replicas(self) -> list[psutil.Process]:
        """Those that run; waits until there are as many."""

        def three() -> list[psutil.Process]:
            found = replicas_below(psutil.Process(self.process.pid))
            return found if len(found) == 3 else []

        found: list[psutil.Process] = until(three, 120)
        return found

    def clients(
        self, requests: int, *, streams: bool, more: Callable[[], bool]
    ) -> tuple[threading.Thread, Counter[str]]:
        outcomes: Counter[str] = Counter()
        asked = load(f"http://127.0.0.1:{self.port}", outcomes, requests, streams, more)
        clients = threading.Thread(target=asyncio.run, args=(asked,), daemon=True)
        clients.start()
        return clients, outcomes


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    found = Service()
    try:
        found.deployed()
        yield found
        found.process.communicate(timeout=120)  # closes its stdin, which ends it
        assert found.process.returncode == 0
    finally:
        found.process.kill()


def test_what_a_killed_replica_has_not_answered_another_one_does(service: Service) -> None:
    replaced = threading.Event()
    requests = at_length(1000, 3000)
    clients, outcomes = service.clients(requests, streams=False, more=lambda: not replaced.is_set())
    until(lambda: outcomes.total() >= AT_ONCE, 60)
    for number in range(KILLS):
        killed = service.three_replicas()[number]
        killed.kill()
        until(lambda killed=killed: killed not in service.three_replicas(), 60)
    replaced.set()
    clients.join()
    # Each one was answering a third of the clients. HAProxy asks others for them; but what had come
    # by way of Serve's own proxy, or to the only one that an old HAProxy knows, gets an error.
    assert outcomes.total() >= requests
    assert outcomes.total() - outcomes["ok"] <= KILLS * AT_ONCE // 9, outcomes


@pytest.fixture
def paused(service: Service) -> Iterator[httpx.Client]:
    """A client that has asked, and asks again on the connection that it has."""
    with httpx.Client(
        base_url=f"http://127.0.0.1:{service.port}",
        timeout=60,
        limits=httpx.Limits(keepalive_expiry=600),
    ) as client:
        yield client


def test_no_request_fails_while_replicas_leave_and_are_replaced(
    service: Service, paused: httpx.Client
) -> None:
    changed = threading.Event()
    clients, outcomes = service.clients(REQUESTS, streams=True, more=lambda: not changed.is_set())
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    # As many changes on every machine: each starts processes, which take the cores from those that
    # answer.
    for number, (replicas, version) in enumerate(CHANGES):
        begin = REQUESTS * (number + 0.5) / (len(CHANGES) + 1)
        until(lambda begin=begin: outcomes.total() >= begin, 300)
        assert clients.is_alive()
        paused.post("/v1/chat/completions", json=body).raise_for_status()
        service.deploy(replicas, version)
    changed.set()
    clients.join()
    assert outcomes.total() >= REQUESTS
    assert set(outcomes) == {"ok"}, outcomes
    # The last change was of all replicas. Those who were told to leave have left by then, but for
    # what may still be asked of them.
    time.sleep(8)
    paused.post("/v1/chat/completions", json=body).raise_for_status()
