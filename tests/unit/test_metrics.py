"""What is counted of requests and rows, and where engines show it."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from cluster.metrics import HighWater
from phi4ray.exporter import PORTS, export_metrics
from phi4ray.fake import FakeReplica
from phi4ray.serve.app import OnlineApp
from phi4ray.serve.config import serve_config
from phi4ray.serve.tenants import digest


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
def app(tmp_path: Path) -> OnlineApp:
    """With the tenant acme."""
    tenant = {"name": "acme", "key_sha256": [digest("secret")]}
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"tenants": [tenant]}))
    config = serve_config(
        {
            "engine": {"kind": "fake", "model": "m"},
            "gate": {"keys_file": str(tmp_path / "keys.yaml")},
        }
    )
    return OnlineApp(FakeReplica(config.engine), config)


def ask(app: OnlineApp, key: str = "secret", **change: Any) -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://phi4") as client:
            return await client.post(
                "/v1/chat/completions",
                json={"model": "m", "messages": [{"role": "user", "content": "hello"}], **change},
                headers={"authorization": f"Bearer {key}"},
            )

    return asyncio.run(post())


def test_an_answers_tokens_are_counted_for_its_tenant(app: OnlineApp) -> None:
    before = {kind: sample("phi4ray:tokens_total", kind=kind, tenant="acme")
              for kind in ("prompt", "completion")}  # fmt: skip
    usage = ask(app).json()["usage"]
    for kind in ("prompt", "completion"):
        counted = sample("phi4ray:tokens_total", kind=kind, tenant="acme")
        assert counted - before[kind] == usage[f"{kind}_tokens"] > 0


def test_who_has_no_key_makes_no_label(app: OnlineApp) -> None:
    assert ask(app, key="guess").status_code == 401
    tenants = {
        one.labels["tenant"]
        for family in REGISTRY.collect()
        for one in family.samples
        if "tenant" in one.labels
    }
    assert "guess" not in str(tenants)


def test_only_of_streams_the_first_byte_is_told(app: OnlineApp) -> None:
    count = "phi4ray:time_to_first_byte_seconds_count"
    before = sample(count)
    assert ask(app).status_code == 200
    assert sample(count) == before
    assert ask(app, stream=True).status_code == 200
    assert sample(count) == before + 1


def test_the_objective_is_a_bound_of_the_histogram(app: OnlineApp) -> None:
    assert ask(app, stream=True).status_code == 200
    assert sample("phi4ray:time_to_first_byte_seconds_bucket", le="2.5") > 0


def test_engines_of_a_node_take_one_port_after_the_other() -> None:
    host = "127.0.0.2"  # where nothing else of this machine is
    first, second = export_metrics(host), export_metrics(host)
    assert first in PORTS
    assert second in PORTS
    assert first < second
    for port in (first, second):
        assert "process_start_time_seconds" in httpx.get(f"http://{host}:{port}/metrics").text


@contextmanager
def taken(host: str, port: int) -> Iterator[None]:
    with socket.socket() as listener:
        listener.bind((host, port))
        listener.listen()
        yield


def test_an_engine_without_a_port_works_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    host = "127.0.0.3"
    with ExitStack() as ports:
        for port in PORTS:
            ports.enter_context(taken(host, port))
        assert export_metrics(host) is None
    assert "Prometheus will not see this replica" in caplog.text


@given(st.lists(st.integers(0, 100)))
def test_growth_adds_up_to_the_highest_total_that_was_seen(totals: list[int]) -> None:
    water = HighWater()
    grown = [water.rise("rows", total) for total in totals]
    assert all(one >= 0 for one in grown)
    assert sum(grown) == max(totals, default=0)


def test_totals_of_different_names_are_apart() -> None:
    water = HighWater()
    assert [water.rise("a", 5), water.rise("b", 3), water.rise("a", 6)] == [5, 3, 1]
