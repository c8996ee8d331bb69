"""A cluster's dashboard that falls silent: asked and listened to for a bounded time, then told."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import ray
from aiohttp import web

from cluster import dashboard as dashboard_module
from cluster.dashboard import TRIES
from cluster.jobs import Jobs
from phi4ray.errors import ClusterError

JOB = {
    "type": "SUBMISSION", "submission_id": "out-1", "status": "RUNNING",
    "entrypoint": "python -m jobs.batch_infer --output=/out",
}  # fmt: skip


class Dashboard:
    """Answers like a head; a test says how its log goes, and whether it answers at all."""

    def __init__(self) -> None:
        self.silent = False
        self.asked: list[str] = []
        self.logs: list[Callable[[web.WebSocketResponse], Awaitable[None]]] = []
        self._ended = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        if request.path.endswith("/tail"):
            socket = web.WebSocketResponse(autoping=False)  # no answer to a heartbeat
            await socket.prepare(request)
            await self.logs.pop(0)(socket)
            return socket
        if self.silent:
            await self._ended.wait()
        if request.path == "/api/version":
            version = {"version": "4", "ray_version": ray.__version__, "ray_commit": ""}
            return web.json_response(version)
        return web.Response(text=json.dumps([JOB]), content_type="application/json")

    async def serve(self, ready: Callable[[int], None], stop: asyncio.Event) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ready(runner.addresses[0][1])
        await stop.wait()
        self._ended.set()
        await runner.cleanup()


@pytest.fixture
def dashboard() -> Dashboard:
    return Dashboard()


@pytest.fixture
def jobs(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    monkeypatch.setattr(dashboard_module, "RETRY_S", 0.01)
    monkeypatch.setattr(dashboard_module, "HEARTBEAT_S", 0.05)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    loop, stop, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    found: list[int] = []

    def start(port: int) -> None:
        found.append(port)
        ready.set()

    thread = threading.Thread(
        target=lambda: loop.run_until_complete(dashboard.serve(start, stop)), daemon=True
    )
    thread.start()
    ready.wait()
    yield Jobs(f"127.0.0.1:{found[0]}")
    loop.call_soon_threadsafe(stop.set)
    thread.join(5)


def sends(text: str, then: Callable[[Any], Awaitable[object]]) -> Any:
    async def log(socket: web.WebSocketResponse) -> None:
        await socket.send_str(text)
        await then(socket)

    return log


async def end(socket: web.WebSocketResponse) -> None:
    await socket.close()


async def cut(socket: web.WebSocketResponse) -> None:
    assert socket._req is not None
    assert socket._req.transport is not None
    socket._req.transport.abort()


async def silence(socket: web.WebSocketResponse) -> None:
    await asyncio.sleep(0.2)


def lines(jobs: Jobs) -> list[str]:
    return [line for line in jobs.log_lines("out-1") if line is not None]


@pytest.fixture
def silent(dashboard: Dashboard, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> Dashboard:
    assert [job.id for job in jobs.all()] == ["out-1"]
    for name in ("TIMEOUT_S", "CHANGE_TIMEOUT_S"):
        monkeypatch.setattr(dashboard_module, name, (0.1, 0.1))
    dashboard.silent = True
    dashboard.asked.clear()
    return dashboard


def test_a_cluster_that_does_not_answer_is_asked_a_few_times(jobs: Jobs, silent: Dashboard) -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"does not answer .* jobs may go on"):
        jobs.all()
    assert silent.asked == ["/api/jobs/"] * TRIES
    assert time.monotonic() - began < 2


def test_what_was_begun_is_not_begun_again(jobs: Jobs, silent: Dashboard) -> None:
    with pytest.raises(ClusterError, match="does not answer"):
        jobs.submit("out-1", ["--output=/out"], "/out", None)
    assert silent.asked == ["/api/jobs/"]


def test_a_log_is_followed_to_its_end(jobs: Jobs, dashboard: Dashboard) -> None:
    dashboard.logs = [sends("a\nb\nc", end)]
    assert lines(jobs) == ["a", "b", "c"]


def test_a_log_whose_connection_is_cut_goes_on_where_it_was(
    jobs: Jobs, dashboard: Dashboard
) -> None:
    dashboard.logs = [
        sends("a\nb", cut),
        sends("a\nb and b\n", silence),
        sends("a\nb and b\nc", end),
    ]
    assert lines(jobs) == ["a", "b and b", "c"]


def test_a_head_that_falls_silent_while_its_log_is_followed_is_given_up(
    jobs: Jobs, dashboard: Dashboard
) -> None:
    dashboard.logs = [sends("a\n", silence)] * (TRIES + 1)
    followed = jobs.log_lines("out-1")
    assert next(line for line in followed if line is not None) == "a"
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"any more .* `phi4ray status out-1"):
        assert not any(followed)  # what was told is not told again
    assert time.monotonic() - began < 5
