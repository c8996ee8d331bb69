"""Two real engines come and go under real load, and no request fails for it."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from phi4ray.train.tiny import make_tiny_model
from tests.waiting import until

ROOT = Path(__file__).parents[2]
PORT = 8188
pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.timeout(600)]

# In a process of its own, because Ray Serve reads its environment when it is imported.
OPERATOR = """
import os, sys, time
from cluster.environment import SERVING
os.environ |= SERVING | {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5"}
from ray import serve
from cluster.deploying import deployed
from cluster.local import connected
from phi4ray.serve.config import serve_config

config = serve_config({
    "recipe": "tiny-cpu",
    "engine": {"model": sys.argv[2], "served_model_name": "phi-4", "max_model_len": 1024,
               "max_num_seqs": 32, "kv_cache_memory_bytes": 1 << 26},
    "autoscaling": {"min_replicas": 1, "max_replicas": 2, "target_occupancy": 0.02,
                    "downscale_delay_s": 5},
    "drain_timeout_s": 30,
})
with connected(num_cpus=4), deployed(config, "127.0.0.1", int(sys.argv[1])):
    while True:
        app = serve.status().applications["phi4"]
        count = app.deployments["replica"].replica_states.get("RUNNING", 0)
        # In one piece and on a line of its own: workers' logs come here as well, whole or not.
        sys.stdout.write(f"\\nreplicas {count}\\n")
        sys.stdout.flush()
        if sys.stdin.readline() == "":
            break
"""


class Service:
    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", OPERATOR, str(PORT), str(model)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )

    def replicas(self) -> int:
        """How many run now."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("replicas "):
                assert self._process.stdin is not None
                self._process.stdin.write("\n")
                self._process.stdin.flush()
                return int(line.split()[1])
        raise AssertionError("the service ended")

    def stop(self) -> None:
        try:
            self._process.communicate(timeout=60)  # closes its stdin, which ends it
        finally:
            self._process.kill()


async def load(stop: asyncio.Event, outcomes: list[str]) -> None:
    """Ten clients, each with one streamed answer after the other."""
    body = {
        "model": "phi-4", "prompt": "Once upon a time", "max_tokens": 100, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip

    async def client(session: aiohttp.ClientSession) -> None:
        while not stop.is_set():
            async with session.post("/v1/completions", json=body) as stream:
                last = (await stream.text()).split()[-2:]
            ended = stream.ok and last == ["data:", "[DONE]"]
            outcomes.append("ok" if ended else f"{stream.status} {last}")

    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{PORT}", timeout=timeout) as session:
        await asyncio.gather(*(client(session) for _ in range(10)))


def test_replicas_come_with_load_and_go_without_it(tmp_path: Path) -> None:
    service = Service(make_tiny_model(tmp_path / "tiny"))
    outcomes: list[str] = []

    async def under_load() -> None:
        stop = asyncio.Event()
        clients = asyncio.create_task(load(stop, outcomes))
        await asyncio.to_thread(until, lambda: service.replicas() == 2, 240)
        await asyncio.sleep(5)  # both answer
        stop.set()
        await clients

    try:
        until(lambda: service.replicas() == 1, 240)
        asyncio.run(under_load())
        until(lambda: service.replicas() == 1, 120)
    finally:
        service.stop()
    assert len(outcomes) > 40
    assert set(outcomes) == {"ok"}
