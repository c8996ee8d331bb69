"""One fleet, two doors: a batch job and online clients on the same replicas, which are killed."""

import asyncio
import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from phi4ray.fake import fake_text
from phi4ray.storage import join, storage_for
from tests.cluster_service import Service, told
from tests.online_load import load
from tests.small_jobs import prompts, write_lines
from tests.soak import at_length
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


FAKES = {
    "engine": {
        "kind": "fake", "model": "m", "num_cpus": 0.1, "max_num_seqs": 48,
        "engine_args": {"latency_s": 1.0, "kv_cache_size_tokens": 3000},
    },
    "autoscaling": {"min_replicas": 2, "max_replicas": 2},
    "drain_timeout_s": 60,
}  # fmt: skip
SLOW = {**FAKES, "engine": {**FAKES["engine"], "engine_args": {"latency_s": 12}}}


@pytest.fixture(scope="module")
def fleet(s3_endpoint: str) -> Iterator[Service]:
    """A service whose replicas are slow at first; they reach what any test has in S3."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        found = Service(SLOW)
    yield found
    found.stop()


def changed(service: Service, config: dict[str, Any]) -> None:
    """Have all replicas be others, with this configuration."""
    before = {replica.pid for replica in service.replicas()}

    def others() -> bool:
        found = {replica.pid for replica in service.replicas()}
        return not found & before and len(told(service, "phi4ray:admitted_requests")) == 2

    service.change(config)
    until(others, 180)


def rows_of(output: str) -> list[dict[str, Any]]:
    store = storage_for(output)
    return [
        row
        for item in store.list(output)
        if item.uri.endswith(".parquet")
        for row in pq.read_table(io.BytesIO(store.read(item.uri))).to_pylist()
    ]


def test_draining_replicas_give_batch_rows_up_and_their_successors_answer_them(
    fleet: Service, s3_prefix: str, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "a.jsonl", prompts(24))
    storage_for(s3_prefix).write(join(s3_prefix, "in/a.jsonl"), file.read_bytes())
    output = join(s3_prefix, "out/")
    job = fleet.batch(
        "--input", join(s3_prefix, "in/"), "--output", output, "--shard-rows", "4",
        "--shards-in-flight", "2",
    )  # fmt: skip
    until(lambda: sum(rows > 0 for rows in told(fleet, "phi4ray:batch_rows").values()) == 2, 120)
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"model": "m", "prompt": "hi"}
        answers.append(httpx.post(f"{fleet.url}/v1/completions", json=body, timeout=60))

    online = threading.Thread(target=ask)
    online.start()
    until(lambda: sum(told(fleet, "phi4ray:admitted_requests").values()) == 1, 120)
    [asked] = [port for port, count in told(fleet, "phi4ray:admitted_requests").items() if count]
    fleet.change({**SLOW, "engine": {**SLOW["engine"], "env": {"VERSION": "2"}}})
    # It stays for its online request, and has no batch row meanwhile.
    until(lambda: told(fleet, "phi4ray:batch_rows")[asked] == 0, 120)
    assert told(fleet, "phi4ray:admitted_requests")[asked] == 1
    online.join(60)
    assert [answer.status_code for answer in answers] == [200]
    assert job.wait(300) == 0, job.communicate()[0]
    assert sorted(row["n"] for row in rows_of(output)) == list(range(24))


@pytest.mark.crash
def test_online_load_and_a_batch_job_while_replicas_are_killed(
    fleet: Service, s3_prefix: str, tmp_path: Path
) -> None:
    count, asked, kills = at_length((1000, 300, 3), (3000, 3000, 100))
    changed(fleet, FAKES)
    file = write_lines(tmp_path / "a.jsonl", prompts(count))
    storage_for(s3_prefix).write(join(s3_prefix, "in/a.jsonl"), file.read_bytes())
    output = join(s3_prefix, "out/")
    outcomes: Counter[str] = Counter()
    clients = threading.Thread(
        target=asyncio.run,
        args=(load(fleet.url, outcomes, asked, streams=False, more=lambda: killed < 2),),
        daemon=True,
    )
    killed = 0
    job = fleet.batch(
        "--input", join(s3_prefix, "in/"), "--output", output, "--shard-rows", "50"
    )  # fmt: skip
    until(lambda: sum(rows > 0 for rows in told(fleet, "phi4ray:batch_rows").values()) == 2, 120)
    clients.start()
    while job.poll() is None:
        time.sleep(1)
        if killed == kills:
            continue
        # The last one that was killed is replaced, and gets requests.
        work = "phi4ray:admitted_requests" if clients.is_alive() else "phi4ray:batch_rows"
        if sum(count > 0 for count in told(fleet, work).values()) == 2:
            fleet.replicas()[killed % 2].kill()
            killed += 1
    assert job.returncode == 0, job.communicate()[0]
    clients.join(120)
    assert killed >= 2
    # Other replicas answer what the killed ones had not begun to; two may be dead in one moment,
    # and what Serve's own proxy held for them then fails. None but those in flight there.
    assert (answered := sum(outcomes.values())) >= asked
    assert answered - outcomes["ok"] <= killed * FAKES["engine"]["max_num_seqs"], outcomes
    rows = rows_of(output)
    assert sorted(row["n"] for row in rows) == list(range(count))
    assert all(row["text"] == fake_text(f"prompt {row['n']}") for row in rows)
