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
from phi4ray.train.tiny import make_tiny_model
from tests.cluster_service import Service, told
from tests.online_load import load
from tests.small_jobs import prompts, write_lines
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture
def service(request: pytest.FixtureRequest, s3_prefix: str) -> Iterator[Service]:
    found = Service(request.param)
    yield found
    found.stop()


def rows_of(output: str) -> list[dict[str, Any]]:
    store = storage_for(output)
    return [
        row
        for item in store.list(output)
        if item.uri.endswith(".parquet")
        for row in pq.read_table(io.BytesIO(store.read(item.uri))).to_pylist()
    ]


FAKES = {
    "engine": {
        "kind": "fake", "model": "m", "num_cpus": 0.1, "max_num_seqs": 32,
        "engine_args": {"latency_s": 0.2, "kv_cache_size_tokens": 3000},
    },
    "autoscaling": {"min_replicas": 2, "max_replicas": 2},
    "drain_timeout_s": 60,
}  # fmt: skip


@pytest.mark.crash
@pytest.mark.parametrize("service", [FAKES], indirect=True, ids=["fakes"])
def test_online_load_and_a_batch_job_while_replicas_are_killed(
    service: Service, s3_prefix: str, tmp_path: Path
) -> None:
    count = 3000
    file = write_lines(tmp_path / "a.jsonl", prompts(count))
    storage_for(s3_prefix).write(join(s3_prefix, "in/a.jsonl"), file.read_bytes())
    output = join(s3_prefix, "out/")
    outcomes: Counter[str] = Counter()
    clients = threading.Thread(
        target=asyncio.run,
        args=(load(service.url, outcomes, 3000, streams=False),),
        daemon=True,
    )
    clients.start()
    job = service.batch(
        "--input", join(s3_prefix, "in/"), "--output", output, "--shard-rows", "50"
    )  # fmt: skip
    killed = 0
    while job.poll() is None:
        time.sleep(1)
        # The last one that was killed is replaced, and gets requests.
        work = "phi4ray:admitted_requests" if clients.is_alive() else "phi4ray:batch_rows"
        if sum(count > 0 for count in told(service, work).values()) == 2:
            service.replicas()[killed % 2].kill()
            killed += 1
    assert job.returncode == 0, job.communicate()[0]
    clients.join(120)
    assert killed >= 2
    # Other replicas answer what the killed ones had not begun to; two may be dead in one moment,
    # and what Serve's own proxy held for them then fails. None but those in flight there.
    assert sum(outcomes.values()) == 3000
    assert 3000 - outcomes["ok"] <= killed * FAKES["engine"]["max_num_seqs"], outcomes
    rows = rows_of(output)
    assert sorted(row["n"] for row in rows) == list(range(count))
    assert all(row["text"] == fake_text(f"prompt {row['n']}") for row in rows)


SLOW = {**FAKES, "engine": {**FAKES["engine"], "engine_args": {"latency_s": 12}}}


@pytest.mark.parametrize("service", [SLOW], indirect=True, ids=["slow"])
def test_draining_replicas_give_batch_rows_up_and_their_successors_answer_them(
    service: Service, s3_prefix: str, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "a.jsonl", prompts(24))
    storage_for(s3_prefix).write(join(s3_prefix, "in/a.jsonl"), file.read_bytes())
    output = join(s3_prefix, "out/")
    job = service.batch(
        "--input", join(s3_prefix, "in/"), "--output", output, "--shard-rows", "4",
        "--shards-in-flight", "2",
    )  # fmt: skip
    until(lambda: sum(rows > 0 for rows in told(service, "phi4ray:batch_rows").values()) == 2, 120)
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"model": "m", "prompt": "hi"}
        answers.append(httpx.post(f"{service.url}/v1/completions", json=body, timeout=60))

    online = threading.Thread(target=ask)
    online.start()
    until(lambda: sum(told(service, "phi4ray:admitted_requests").values()) == 1, 120)
    [asked] = [port for port, count in told(service, "phi4ray:admitted_requests").items() if count]
    service.change({**SLOW, "engine": {**SLOW["engine"], "env": {"VERSION": "2"}}})
    # It stays for its online request, and has no batch row meanwhile.
    until(lambda: told(service, "phi4ray:batch_rows")[asked] == 0, 120)
    assert told(service, "phi4ray:admitted_requests")[asked] == 1
    online.join(60)
    assert [answer.status_code for answer in answers] == [200]
    assert job.wait(300) == 0, job.communicate()[0]
    assert sorted(row["n"] for row in rows_of(output)) == list(range(24))


@pytest.mark.engine
def test_a_real_engine_answers_online_requests_at_once_while_batch_fills_it(
    s3_prefix: str, tmp_path: Path
) -> None:
    config = {
        "recipe": "tiny-cpu",
        "engine": {"model": str(make_tiny_model(tmp_path / "tiny")), "max_num_seqs": 16,
                   "served_model_name": "phi-4", "kv_cache_memory_bytes": 1 << 26},
    }  # fmt: skip
    service = Service(config)
    try:
        file = write_lines(tmp_path / "a.jsonl", prompts(400))
        storage_for(s3_prefix).write(join(s3_prefix, "in/a.jsonl"), file.read_bytes())
        output = join(s3_prefix, "out/")
        job = service.batch(
            "--input", join(s3_prefix, "in/"), "--output", output, "--shard-rows", "50",
            "--set", "max_tokens=32", "temperature=0", "ignore_eos=true",
        )  # fmt: skip
        while service.metric("phi4ray:batch_rows ") < 16 and job.poll() is None:
            time.sleep(0.1)
        body = {"model": "phi-4", "prompt": "hi", "max_tokens": 16, "ignore_eos": True}
        with httpx.Client(base_url=service.url, timeout=60) as client:
            # As many as the engine has places: all are batch rows', and all are given up.
            answers: list[httpx.Response] = []
            threads = [
                threading.Thread(
                    target=lambda: answers.append(client.post("/v1/completions", json=body))
                )
                for _ in range(16)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [answer.status_code for answer in answers] == [200] * 16
        assert service.metric("phi4ray:batch_aborted_rows ") > 0
        assert service.metric("vllm:num_preemptions_total") == 0
        assert job.wait(300) == 0, job.communicate()[0]
        rows = rows_of(output)
        assert sorted(row["n"] for row in rows) == list(range(400))
        assert {row["completion_tokens"] for row in rows} == {32}
        assert {row["error_code"] for row in rows} == {None}
    finally:
        service.stop()
