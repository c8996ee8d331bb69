"""A service with a real engine and a job, watched while they run.

Every expression of rules and dashboards finds what it is about, and a second engine comes and goes
with the load.
"""

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.util import get_node_ip_address

from phi4ray.serve.tenants import new_key
from phi4ray.train.tiny import make_tiny_model
from tests.processes import kill_family, metrics_ports
from tests.promql import FOLDER, Selector, expressions, panels, rules, selectors
from tests.ray_cluster import ray_cluster
from tests.waiting import free_port, reached, until, until_ready

HOST = get_node_ip_address()  # where the cluster's processes listen
ROOT = Path(__file__).parents[2]
prometheus = shutil.which("prometheus")
pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.timeout(600)]

# What these say depends on what went wrong, and nothing goes wrong here in every way there is.
OUTCOMES = ("status", "code")


@dataclass(frozen=True)
class Page:
    """A page of metrics, and the label `job` that its series get."""

    job: str
    address: str

    def series(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        """Names and labels, with those that Prometheus adds."""
        target = {"job": self.job, "instance": self.address, "namespace": "local"}
        for family in text_string_to_metric_families(self.text()):
            for sample in family.samples:
                yield sample.name, {**sample.labels, **target}

    def text(self) -> str:
        return httpx.get(f"http://{self.address}/metrics", timeout=30).text


@dataclass(frozen=True)
class Running:
    """A service and a job: where they tell how they are, and how to ask the service."""

    pages: list[Page]
    url: str
    keys: Mapping[str, str]
    cluster: psutil.Popen

    def ask(self, tenant: str, **change: Any) -> int:
        """A completion for the owner of a key; gives the HTTP status."""
        body = {"model": "phi-4", "prompt": "Once upon a time", "max_tokens": 8, **change}
        key = {"Authorization": f"Bearer {self.keys.get(tenant, 'wrong')}"}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, headers=key, timeout=60)
        return answer.status_code


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service with a real engine that was asked, and a job in its middle."""
    from cluster.environment import SERVING

    folder = tmp_path_factory.mktemp("monitoring")
    ray, proxy, http = free_port(), free_port(), free_port()
    environment = {
        **os.environ, **SERVING,
        "RAY_AUTH_MODE": "disabled",  # no token is left on this machine
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(proxy),
    }  # fmt: skip
    options = "--num-cpus=4", "--include-dashboard=false", f"--metrics-export-port={ray}"
    keys = {"good": new_key(), "limited": new_key()}
    started: list[psutil.Popen] = []
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(ray_cluster(*options, environment=environment))
        environment["RAY_ADDRESS"] = cluster.address
        with (folder / "log").open("wb") as log:
            for command in (
                serving(folder, http, {n: one[1] for n, one in keys.items()}),
                job(folder),
            ):
                process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
                stack.callback(kill_family, process)
                started.append(process)
            url = f"http://127.0.0.1:{http}"
            until_ready(url, started[0], folder / "log", 240)
            rays = Page("phi4ray-ray", f"127.0.0.1:{ray}")
            # Ray tells what its processes measure only now and then.
            for name in ("batch_rows_total", "desired_replicas", "replicas_bound"):
                until(functools.partial(has, rays, f"ray_phi4ray_{name}"), 90, every_s=0.5)
            until(lambda: has(rays, "ray_serve_deployment_replica_healthy"), 90, every_s=0.5)
            replicas = replica_pages(cluster.process)
            proxies = Page("phi4ray-proxy", f"127.0.0.1:{proxy}")
            found = Running(
                [rays, proxies, *replicas],
                url,
                {name: one[0] for name, one in keys.items()},
                cluster.process,
            )
            assert (
                found.ask("good", stream=True) == found.ask("good") == found.ask("limited") == 200
            )
            assert found.ask("good", max_tokens=10_000) == 400
            assert found.ask("limited") == 429
            assert found.ask("nobody") == 401
            yield found
            for process in reversed(started):
                process.send_signal(signal.SIGINT)
                process.wait(60)


def serving(folder: Path, port: int, digests: Mapping[str, str]) -> list[str]:
    limits = {"good": {}, "limited": {"requests_per_minute": 1}}
    tenants = [
        {"name": name, "key_sha256": [digest], **limits[name]} for name, digest in digests.items()
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"tenants": tenants}))
    config = {
        "gate": {"keys_file": str(folder / "keys.yaml")},
        "engine": {"kv_cache_memory_bytes": 1 << 26},
        # A few answers at a time are more than one replica should have.
        "autoscaling": {
            "min_replicas": 1, "max_replicas": 2, "target_occupancy": 0.002, "lookahead_s": 0,
            "downscale_delay_s": 5,
        },
        "drain_timeout_s": 30,
    }  # fmt: skip
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    model = make_tiny_model(folder / "tiny")
    return [
        sys.executable, "jobs/serve.py", "--recipe", "tiny-cpu", "--config",
        str(folder / "serve.yaml"), "--model", str(model), "--served-model-name", "phi-4",
        "--port", str(port), "--max-model-len", "1024",
    ]  # fmt: skip


def job(folder: Path) -> list[str]:
    """One that goes on for as long as it is looked at: the fake engine takes its time."""
    rows = [json.dumps({"id": str(n), "prompt": f"row {n}"}) for n in range(200_000)]
    (folder / "rows.jsonl").write_text("\n".join(["{not json", *rows]))
    return [
        sys.executable, "jobs/batch_infer.py", "--recipe", "fake", "--input",
        str(folder / "rows.jsonl"), "--output", f"{folder}/out/", "--engine-arg", "latency_s=5",
    ]  # fmt: skip


def has(page: Page, name: str) -> bool:
    return f"\n{name}{{" in page.text()


def replica_pages(cluster: psutil.Popen) -> list[Page]:
    family = cluster.children(recursive=True)
    ports = sorted({port for process in family for port in metrics_ports(process)})
    return [Page("phi4ray-replica", f"{HOST}:{port}") for port in ports]


def test_every_metric_is_there_with_the_labels_that_expressions_use(running: Running) -> None:
    assert [page.job for page in running.pages] == ["phi4ray-ray", "phi4ray-proxy"] + [
        "phi4ray-replica"
    ] * 2
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {one for text in expressions() for one in selectors(text) if one.name not in recorded}
    assert len(used) > 40

    def missing() -> set[Selector]:
        series: dict[str, list[Mapping[str, str]]] = {}
        for page in running.pages:
            for name, labels in page.series():
                series.setdefault(name, []).append(labels)
        return {
            one for one in used
            if not any(one.selects(labels, OUTCOMES) for labels in series.get(one.name, ()))
        }  # fmt: skip

    # Ray tells what its processes measure only now and then.
    deadline = time.monotonic() + 60
    while lacking := missing():
        assert time.monotonic() < deadline, lacking
        time.sleep(1)


@pytest.mark.skipif(prometheus is None, reason="prometheus is not here")
def test_prometheus_evaluates_every_expression(running: Running, tmp_path: Path) -> None:
    port = free_port()
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(FOLDER / "rules.yaml")]
    for scrape in config["scrape_configs"]:
        [targets] = scrape["static_configs"]
        targets["targets"] = [
            page.address for page in running.pages if page.job == scrape["job_name"]
        ]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    server = subprocess.Popen(
        [
            str(prometheus), f"--config.file={tmp_path}/prometheus.yaml",
            f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def query(text: str) -> list[Any]:
        answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": text}).json()
        assert answer["status"] == "success", (text, answer)
        return list(answer["data"]["result"])

    recorded = [rule["record"] for rule in rules() if "record" in rule]
    try:
        until(lambda: reached(f"http://127.0.0.1:{port}/-/ready"), 30)
        until(lambda: len(query("up == 1")) == len(running.pages), 60)

        def shares() -> bool:
            assert running.ask("good", stream=True) == 200
            return all(query(f"{name} >= 0") for name in recorded)

        until(shares, 60, every_s=1)
        for rule in rules():
            query(rule["expr"])
        # Nothing failed at the server, and nobody was turned away for want of room.
        shown = [text for text in panels() if 'status=~"5..' not in text]
        empty = [text for text in shown if not query(text)]
        assert not empty, empty
        loaded = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
        health = {rule["health"] for group in loaded for rule in group["rules"]}
        assert health == {"ok"}
    finally:
        server.terminate()
        server.wait(30)


def answered(running: Running) -> list[float]:
    """How many answers each engine has given that runs; the job has none."""
    found = []
    for page in replica_pages(running.cluster):
        with contextlib.suppress(httpx.TransportError):  # it comes or goes
            given = [
                float(line.split()[-1])
                for line in page.text().splitlines()
                if line.startswith("vllm:request_success_total{")
            ]
            found += [sum(given)] if given else []
    return found


async def load(running: Running, stop: asyncio.Event, outcomes: list[str]) -> None:
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
            await asyncio.sleep(2)  # a replica that starts needs the cores too

    timeout = aiohttp.ClientTimeout(total=120)
    key = {"Authorization": f"Bearer {running.keys['good']}"}
    async with aiohttp.ClientSession(running.url, timeout=timeout, headers=key) as session:
        await asyncio.gather(*(client(session) for _ in range(10)))


def test_replicas_come_with_load_and_go_without_it_and_no_request_fails(running: Running) -> None:
    assert len(answered(running)) == 1
    outcomes: list[str] = []

    def both_answer() -> bool:
        given = answered(running)
        return len(given) == 2 and all(given)

    async def under_load() -> None:
        stop = asyncio.Event()
        clients = asyncio.create_task(load(running, stop, outcomes))
        await asyncio.to_thread(until, both_answer, 240, every_s=1)
        stop.set()
        await clients

    asyncio.run(under_load())
    until(lambda: len(answered(running)) == 1, 120, every_s=1)
    assert len(outcomes) > 40
    assert set(outcomes) == {"ok"}
