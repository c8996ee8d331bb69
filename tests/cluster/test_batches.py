"""The Batch API of a deployed application, through the unmodified openai client over HTTP."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from openai.types import Batch

from phi4ray.batches.store import Key, Store
from tests.batch_service import (
    client_of,
    counts,
    create,
    ended,
    expected,
    line,
    rows_of,
    texts_of,
    upload,
    wait,
)
from tests.processes import kill_family
from tests.soak import at_length
from tests.waiting import free_port, until_ready

ROOT = Path(__file__).parents[2]
ROWS = at_length(240, 600)
pytestmark = [pytest.mark.cluster, pytest.mark.crash, pytest.mark.timeout(400)]


@pytest.fixture
def command(tmp_path: Path, s3_prefix: str) -> list[str]:
    """The service: a fake engine, files in S3."""
    settings = {
        "batches": {"poll_interval_s": 0.3, "retry_interval_s": 0.5, "shard_rows": 20},
        "engine": {
            "kind": "fake", "model": "m", "max_num_seqs": 8, "num_cpus": 0,
        },
    }  # fmt: skip
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(settings))
    return [
        sys.executable, "jobs/serve.py", "--config", f"{tmp_path}/serve.yaml",
        "--batches", s3_prefix,
    ]  # fmt: skip


@contextmanager
def started(command: list[str], log: Path, latency_s: float) -> Iterator[tuple[str, psutil.Popen]]:
    """The application; when the block ends, everything of it is killed at once."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as stream:
        server = psutil.Popen(
            [*command, "--port", str(port), "--engine-arg", f"latency_s={latency_s}"],
            cwd=ROOT, stdout=stream, stderr=stream,
            # Of routers one will do where nothing is deployed anew.
            env=os.environ | {"RAY_SERVE_INGRESS_ROUTER_REPLICAS_PER_NODE": "1"},
        )  # fmt: skip
        try:
            until_ready(url, server, log, 120)
            yield url, server
        finally:
            kill_family(server)


def test_a_batch_survives_the_death_of_its_runner_and_of_the_whole_application(
    command: list[str], tmp_path: Path, s3_prefix: str
) -> None:
    # A file that no proxy on the way takes for a small body.
    rows = [line(number, padding="x" * 10_000) for number in range(ROWS)]
    # Four rows a second: it is not to be done before it is seen to be half done.
    with started(command, tmp_path / "first.log", 2) as (url, server):
        client = client_of(url)
        batch_id = create(client, upload(client, *rows)).id
        wait(client, batch_id, lambda batch: done(batch) >= 20)
        runner(server).kill()
        before = done(client.batches.retrieve(batch_id))
        wait(client, batch_id, lambda batch: done(batch) >= before + 20)
    # Asked of the store: a second application is at work before it takes a request.
    assert Store(s3_prefix).state(Key("everyone", batch_id)).status == "in_progress"
    with started(command, tmp_path / "second.log", 0.05) as (url, _):
        client = client_of(url)
        batch = ended(client, batch_id)
        assert (batch.status, counts(batch)) == ("completed", (ROWS, ROWS, 0))
        answers = rows_of(client, batch.output_file_id)
        assert len(answers) == ROWS
        assert texts_of(answers) == expected(*range(ROWS))
        assert [one.id for one in client.batches.list()] == [batch_id]


def done(batch: Batch) -> int:
    return counts(batch)[1]


def runner(server: psutil.Popen) -> psutil.Process:
    (found,) = (
        process
        for process in server.children(recursive=True)
        if "ServeReplica:phi4:batches" in " ".join(process.cmdline())
    )
    return found
