"""The job as users run it: by `ray job submit`, on a real vLLM engine, from S3 to S3."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi4ray.storage import join, storage_for
from phi4ray.train.tiny import make_tiny_model
from tests.ray_cluster import ray_cluster
from tests.waiting import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[str]:
    """A Ray cluster of this machine, with the AWS variables on it; gives where its dashboard is."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token is left on this machine
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        environment = {**os.environ, **keys, "AWS_ENDPOINT_URL": s3_endpoint}
        options = "--num-cpus=2", f"--dashboard-port={port}"
        with ray_cluster(*options, environment=environment):
            yield f"http://127.0.0.1:{port}"


def submit(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "ray", "job", "submit", "--address", address, "--working-dir", ".", "--"]
    job = [sys.executable, "jobs/batch_infer.py", *arguments]
    return subprocess.run([*command, *job], cwd=ROOT, capture_output=True, text=True)


def test_a_submitted_job_answers_every_row_with_a_real_engine(
    cluster: str, s3_prefix: str, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    prompts, answers = join(s3_prefix, "prompts/"), join(s3_prefix, "answers/")
    for path in (ROOT / "examples").glob("*.jsonl"):
        storage_for(prompts).write(join(prompts, path.name), path.read_bytes())
    long = {"id": "long", "prompt": "word " * 5000}
    bogus = {"id": "bogus", "prompt": "hi", "sampling": {"temprature": 1}}
    bad = [json.dumps(long), json.dumps(bogus), "{not json", '{"id": "none"}', '{"prompt": 5}']
    storage_for(prompts).write(join(prompts, "bad.jsonl"), "\n".join(bad).encode() + b"\n\xff\n")
    arguments = (
        "--recipe", "tiny-cpu", "--model", str(model), "--input", prompts, "--output", answers,
        "--set", "max_tokens=8", "--shard-rows", "4",
    )  # fmt: skip

    first = submit(cluster, *arguments)
    assert "exit code 3" in first.stdout + first.stderr, first.stdout + first.stderr
    rows = read(answers)
    assert len(rows) == 7 + 3 + 6
    errors = {row["id"].removeprefix(prompts): row["error_code"] for row in rows.values()}
    assert {id_: code for id_, code in errors.items() if code} == {
        "refused": "empty_messages",
        "long": "context_length_exceeded",
        "bogus": "unknown_parameter",
        "bad.jsonl#2": "invalid_json",
        "none": "missing_prompt",
        "bad.jsonl#4": "invalid_type",
        "bad.jsonl#5": "invalid_utf8",
    }
    assert rows["capital-en"]["language"] == "en"
    assert rows["capital-en"]["completion_tokens"] > 0
    response = json.loads(rows["continue"]["response"])
    assert response["object"] == "text_completion"
    assert response["choices"][0]["logprobs"]["tokens"]

    before = {uri: storage_for(uri).read(uri) for uri in part_uris(answers)}
    again = submit(cluster, *arguments)
    assert "exit code 3" in again.stdout + again.stderr
    assert {uri: storage_for(uri).read(uri) for uri in part_uris(answers)} == before

    other = submit(cluster, *arguments, "--set", "max_tokens=9")
    assert "exit code 1" in other.stdout + other.stderr
    assert "sampling.max_tokens was 8 and is now 9" in other.stdout


def test_an_engine_that_cannot_start_fails_the_job_once_and_says_why(
    cluster: str, s3_prefix: str, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    (model / "model.safetensors").write_bytes(b"broken")
    prompts = join(s3_prefix, "prompts.jsonl")
    storage_for(prompts).write(prompts, b'{"prompt": "hi"}\n')
    failed = submit(
        cluster, "--recipe", "tiny-cpu", "--model", str(model), "--input", prompts,
        "--output", join(s3_prefix, "answers"),
    )  # fmt: skip
    said = failed.stdout + failed.stderr
    assert "exit code 1" in said
    last = "\n".join(failed.stdout.splitlines()[-25:])
    assert "error: EngineStartError: vLLM cannot start" in last
    assert "SafetensorError" in last
    assert os.path.basename(model) in last


def read(answers: str) -> dict[str, dict[str, object]]:
    tables = [pq.read_table(io.BytesIO(storage_for(uri).read(uri))) for uri in part_uris(answers)]
    return {row["id"]: row for row in pa.concat_tables(tables).to_pylist()}


def part_uris(answers: str) -> list[str]:
    uris = (item.uri for item in storage_for(answers).list(answers))
    return [uri for uri in uris if uri.endswith(".parquet")]
