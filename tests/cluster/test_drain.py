"""No request fails by our own doing: replicas leave and are replaced under 10,000 requests."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
REQUESTS = 10_000
AT_ONCE = 64
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# In a process of its own, because Ray Serve reads its environment when it is imported.
OPERATOR = """
import itertools, os, sys
from cluster.environment import SERVING
os.environ |= SERVING | {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2"}
from ray import serve
from cluster.local import connected
from cluster.serve import application
from phi4ray.serve.config import serve_config

def deploy(replicas, version):
    engine = {"kind": "fake", "model": "m", "num_cpus": 0.1, "env": {"VERSION": str(version)},
              "engine_args": {"latency_s": 0.2, "chunk_s": 0.02}}
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


async def load(url: str, outcomes: Counter[str]) -> None:
    """Chats, every second one streamed; counts `ok` and what else became of them."""
    places = asyncio.Semaphore(AT_ONCE)

    async with httpx.AsyncClient(
        base_url=url, timeout=60, limits=httpx.Limits(max_connections=AT_ONCE)
    ) as client:

        async def one(number: int) -> None:
            async with places:
                try:
                    outcomes[await ask(client, number)] += 1
                except httpx.HTTPError as error:
                    outcomes[repr(error)] += 1

        await asyncio.gather(*(one(number) for number in range(REQUESTS)))


async def ask(client: httpx.AsyncClient, number: int) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": f"{number}"}]}
    if number % 2:
        answer = await client.post("/v1/chat/completions", json=body)
        return "ok" if answer.is_success else f"{answer.status_code} {answer.text}"
    body["stream"] = True
    async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        if not stream.is_success:
            return f"{stream.status_code} {(await stream.aread()).decode()}"
        lines = [line async for line in stream.aiter_lines() if line]
    if lines[-1] != "data: [DONE]":
        return "a stream was cut off"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    text = "".join(choice["delta"]["content"] for choice in choices)
    return "ok" if text.startswith("fake:") and len(text) == 21 else f"the answer {text!r}"


def test_no_request_fails_while_replicas_leave_and_are_replaced() -> None:
    port = 8187
    outcomes: Counter[str] = Counter()
    operator = subprocess.Popen(
        [sys.executable, "-c", OPERATOR, str(port)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert operator.stdin is not None
    assert operator.stdout is not None

    def deployed() -> None:
        assert any(line.startswith("deployed") for line in operator.stdout or ())

    try:
        deployed()
        clients = threading.Thread(
            target=asyncio.run, args=(load(f"http://127.0.0.1:{port}", outcomes),), daemon=True
        )
        clients.start()
        changes = 0
        while clients.is_alive():
            # Scale in, scale out, and a new version every other time.
            replicas = (1, 3, 2, 3)[changes % 4]
            operator.stdin.write(f"{replicas} {changes // 2}\n")
            operator.stdin.flush()
            deployed()
            changes += 1
        clients.join()
        operator.stdin.close()
        assert operator.wait(120) == 0
    finally:
        operator.kill()
    assert outcomes == {"ok": REQUESTS}
    assert changes >= 6
