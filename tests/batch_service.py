"""The Batch API by real HTTP, with a runner and the fake engine, in this process."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import uvicorn
import yaml
from openai.types import Batch

from phi4ray.batch.executor import InProcessExecutor
from phi4ray.batches.runner import Runner
from phi4ray.fake import FakeReplica, fake_text
from phi4ray.serve.app import OnlineApp
from phi4ray.serve.config import ServeConfig, serve_config
from phi4ray.serve.tenants import digest

CHAT = "/v1/chat/completions"
ENDED = ("failed", "completed", "expired", "cancelled")


def service(store: str, knobs: dict[str, Any] | None = None, **settings: Any) -> ServeConfig:
    batches = {"store": store, "poll_interval_s": 0.05, "retry_interval_s": 0.05}
    fake = {"kind": "fake", "model": "m", "engine_args": knobs or {}}
    return serve_config({"engine": fake, "batches": batches}, settings)


def runner_of(config: ServeConfig, clock: Callable[[], float] = time.time) -> Runner:
    assert config.batches is not None
    return Runner(
        config.batches,
        config.engine,
        lambda stopped: InProcessExecutor(stopped=stopped),
        clock,
    )


class Clock:
    """The time, and what it is to be put forward by."""

    forward_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.forward_s


@contextmanager
def listening(config: ServeConfig, clock: Callable[[], float] = time.time) -> Iterator[str]:
    """The service's HTTP server; gives its address."""
    app: Any = OnlineApp(FakeReplica(config.engine), config, clock)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def running(config: ServeConfig, clock: Callable[[], float] = time.time) -> Iterator[Runner]:
    """The service's runner, at work inside the block."""
    with at_work(runner_of(config, clock)) as runner:
        yield runner


@contextmanager
def at_work(runner: Runner) -> Iterator[Runner]:
    """This runner, inside the block."""
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        yield runner
    finally:
        runner.close()
        thread.join()


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def line(number: int, **changes: Any) -> dict[str, Any]:
    """A request that the fake engine answers with `fake_text("prompt <number>")`."""
    messages = [{"role": "user", "content": f"prompt {number}"}]
    body = {"model": "m", "messages": messages}
    return {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body, **changes}


def jsonl(*rows: object) -> bytes:
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    return b"".join(row + b"\n" for row in lines)


def upload(client: openai.OpenAI, *rows: object) -> str:
    """Upload a batch's file; gives its id."""
    return client.files.create(file=("in.jsonl", jsonl(*rows)), purpose="batch").id


def create(client: openai.OpenAI, file_id: str, **options: Any) -> Batch:
    return client.batches.create(
        input_file_id=file_id, endpoint=CHAT, completion_window="24h", **options
    )


def wait(client: openai.OpenAI, batch_id: str, until: Callable[[Batch], bool]) -> Batch:
    deadline = time.monotonic() + 60
    while not until(batch := client.batches.retrieve(batch_id)):
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
    return batch


def ended(client: openai.OpenAI, batch_id: str) -> Batch:
    return wait(client, batch_id, lambda batch: batch.status in ENDED)


def rows_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of an output or error file; none where there is no file."""
    if file_id is None:
        return []
    return [json.loads(row) for row in client.files.content(file_id).text.splitlines()]


def texts_of(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The answers of an output file's rows, by custom id."""
    return {
        row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"]
        for row in rows
    }


def expected(*numbers: int) -> dict[str, str]:
    return {f"r{number}": fake_text(f"prompt {number}") for number in numbers}


def counts(batch: Batch) -> tuple[int, int, int]:
    """Its requests: in total, completed, failed."""
    found = batch.request_counts
    assert found is not None
    return found.total, found.completed, found.failed


def keys(folder: Path) -> dict[str, Any]:
    """A gate of three tenants: whose keys are one and two may use the model, whose is four not."""
    tenants = [
        {"name": "a/b", "key_sha256": [digest("one")], "models": ["m"]},
        {"name": "..", "key_sha256": [digest("two")]},
        {"name": "c", "key_sha256": [digest("four")], "models": ["other"]},
    ]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"tenants": tenants}))
    return {"keys_file": f"{folder}/keys.yaml"}
