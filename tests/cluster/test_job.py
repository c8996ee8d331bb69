"""Jobs as users run them, on a real cluster: by `ray job submit` and by phi4ray's command line."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from jobs.cli import app
from phi4ray.storage import join, storage_for
from phi4ray.train.tiny import make_tiny_model
from tests.ray_cluster import ray_cluster
from tests.small_jobs import prompts, write_lines
from tests.waiting import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Addresses:
    """Where a cluster's dashboard is, which jobs are submitted to, and what RAY_ADDRESS is."""

    dashboard: str
    ray: str


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[Addresses]:
    """A Ray cluster of this machine with phi4ray installed, and the AWS variables on it."""
    port = free_port()
    dashboard = f"http://127.0.0.1:{port}"
    options = "--num-cpus=2", f"--dashboard-port={port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token is left on this machine
        patch.setenv("RAY_API_SERVER_ADDRESS", dashboard)
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        environment = {
            **os.environ, **keys, "AWS_ENDPOINT_URL": s3_endpoint,
            "RAY_prestart_worker_first_driver": "0",
        }  # fmt: skip
        with ray_cluster(*options, environment=environment) as found:
            yield Addresses(dashboard, found.address)


# With a real engine, from S3 to S3


def without_submitting(cluster: Addresses, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The same command without a Ray job around it; what it says is in `stdout`."""
    return subprocess.run(
        [sys.executable, "jobs/batch_infer.py", *arguments],
        cwd=ROOT, env=os.environ | {"RAY_ADDRESS": cluster.ray},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.engine
def test_a_submitted_job_answers_every_row_with_a_real_engine(
    cluster: Addresses,
    s3_prefix: str,
    tmp_path: Path,
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

    command = [
        BIN / "ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--",
        sys.executable, "jobs/batch_infer.py", *arguments,
    ]  # fmt: skip
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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

    # What follows is the same without the Ray job around it.
    before = {uri: storage_for(uri).read(uri) for uri in part_uris(answers)}
    assert without_submitting(cluster, *arguments).returncode == 3
    assert {uri: storage_for(uri).read(uri) for uri in part_uris(answers)} == before

    other = without_submitting(cluster, *arguments, "--set", "max_tokens=9")
    assert other.returncode == 1
    assert "sampling.max_tokens was 8 and is now 9" in other.stdout


@pytest.mark.engine
def test_an_engine_that_cannot_start_fails_the_job_once_and_says_why(
    cluster: Addresses, s3_prefix: str, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    (model / "model.safetensors").write_bytes(b"broken")
    prompts = join(s3_prefix, "prompts.jsonl")
    storage_for(prompts).write(prompts, b'{"prompt": "hi"}\n')
    failed = without_submitting(
        cluster, "--recipe", "tiny-cpu", "--model", str(model),
        "--input", prompts, "--output", join(s3_prefix, "answers"),
    )  # fmt: skip
    assert failed.returncode == 1, failed.stdout
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


# By the command line: submitted, watched, read and cancelled


def phi4ray(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Run a command; gives what it printed, on stdout first."""
    done = invoked(arguments, cwd)
    assert done.exit_code == code, done.output
    return done.stdout + done.stderr


def known_of(job_id: str, at: tuple[str, ...], cwd: Path) -> dict[str, Any]:
    """What `status` tells programs."""
    known: dict[str, Any] = json.loads(invoked(("status", job_id, *at, "--json"), cwd).stdout)
    return known


def invoked(arguments: Sequence[str], cwd: Path) -> Result:
    # In this process: Ray takes seconds to import.
    with contextlib.chdir(cwd):
        return CliRunner().invoke(app, arguments)


def test_a_job_is_submitted_watched_and_read(cluster: Addresses, tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [*prompts(8), {"id": "none"}])
    (tmp_path / "job.yaml").write_text("shard_rows: 3\noutput: out\n")
    at = ("--address", cluster.dashboard)
    job = ("--recipe", "fake", "--input", "in/", "--config", "job.yaml")

    followed = phi4ray("submit", *job, *at, cwd=tmp_path, code=3)
    job_id = followed.split()[1]
    assert job_id.startswith("out-")
    assert "9 rows of 1 files in 3 parts" in followed
    assert "rows 9/9 (100%) errors 1" in followed
    assert f"{job_id} finished with error rows, exit code 3" in followed

    listed = phi4ray("status", *at, cwd=tmp_path)
    assert job_id in listed
    assert str(tmp_path / "out") in listed
    known = known_of(job_id, at, tmp_path)
    assert (known["status"], known["exit_code"]) == ("FAILED", 3)
    assert known["output"] == str(tmp_path / "out")

    log = phi4ray("logs", job_id, *at, cwd=tmp_path)
    assert "rows 9/9 (100%) errors 1" in log
    assert phi4ray("logs", job_id, "--follow", *at, cwd=tmp_path).split() == log.split()

    by_id = phi4ray("results", job_id, *at, "--head", "1", cwd=tmp_path, code=3)
    assert "missing_prompt" in by_id
    assert "r0: fake:" in by_id
    failed = phi4ray("results", "out/", "--errors", cwd=tmp_path, code=3)
    assert "none: [missing_prompt]" in failed
    assert "r0: " not in failed
    assert "already" in phi4ray("submit", *job, *at, "--name", job_id, cwd=tmp_path, code=1)
    assert "nothing to cancel" in phi4ray("cancel", job_id, *at, cwd=tmp_path, code=1)


def test_a_job_is_left_found_again_and_cancelled(cluster: Addresses, tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(4000))
    at = ("--address", cluster.dashboard)
    command = [
        sys.executable, "-m", "jobs.cli", "submit", *at, "--recipe", "fake", "--input",
        f"{tmp_path}/in/", "--output", f"{tmp_path}/out", "--shard-rows", "20",
        "--shards-in-flight", "1", "--engine-arg", "latency_s=1", "--progress-interval-s", "1",
    ]  # fmt: skip
    # From a checkout: it is uploaded, and runs there.
    watching = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert watching.stdout is not None
    lines = []
    for line in watching.stdout:
        lines.append(line)
        if "replicas 1 | ETA" in line:
            break
    watching.send_signal(signal.SIGINT)
    _, told = watching.communicate()
    assert watching.returncode == 130, told
    job_id = lines[0].split()[1]
    assert f"detached: {job_id} runs on" in told
    assert f"phi4ray status {job_id} --follow" in told

    while True:  # until its progress is there
        known = known_of(job_id, at, tmp_path)
        assert known["status"] == "RUNNING"
        if known["progress"] and known["progress"]["rows_per_s"]:
            break
        time.sleep(0.5)
    progress = known["progress"]
    assert 0 < progress["rows"] < progress["rows_total"] == 4000
    assert progress["replicas"] == 1
    assert progress["eta_s"] > 0
    shown = phi4ray("status", job_id, *at, cwd=tmp_path)
    for told in ("running", "rows/s", "/4,000 (", "replicas 1 | ETA"):
        assert told in shown
    unfinished = phi4ray("results", f"{tmp_path}/out", cwd=tmp_path, code=1)
    assert "the job is not finished" in unfinished
    assert "of 200 parts are written" in unfinished

    stopped = phi4ray("cancel", job_id, *at, cwd=tmp_path)
    assert f"{job_id} stopped" in stopped
    assert "finished parts stay: " in stopped
    assert "go on: phi4ray submit " in stopped
    assert "--shard-rows=20" in stopped
    assert known_of(job_id, at, tmp_path)["status"] == "STOPPED"


def test_the_readme_tells_commands_that_work(cluster: Addresses, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(phi4ray submit.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    write_lines(tmp_path / "prompts" / "a.jsonl", prompts(3))
    here = tmp_path / "here"
    here.mkdir()
    told: dict[str, str] = {}
    job_id = ""
    for line in block.replace("s3://bucket", "..").replace("phi4-fp8-h200", "fake").splitlines():
        _, command, *arguments = shlex.split(line.replace("ID", job_id))
        at = () if command == "results" else ("--address", cluster.dashboard)
        ended = command == "cancel"
        told[line] = phi4ray(command, *arguments, *at, cwd=here, code=1 if ended else 0)
        if command == "submit":
            job_id = told[line].split()[1]
    assert job_id in told["phi4ray status"]
    assert f"{job_id} finished" in told["phi4ray status ID --follow"]
    assert "rows 3/3 (100%)" in told["phi4ray logs ID"]
    assert "r0: fake:" in told["phi4ray results ../answers/ --head 10"]
    assert f"{job_id} has ended" in told["phi4ray cancel ID"]


def test_what_is_wrong_is_said_and_has_its_exit_code(cluster: Addresses, tmp_path: Path) -> None:
    at = ("--address", cluster.dashboard)
    assert "no batch job 'none'" in phi4ray("status", "none", *at, cwd=tmp_path, code=2)
    nobody = ("--address", "127.0.0.1:9")
    assert "no Ray cluster answers at http://127.0.0.1:9" in phi4ray(
        "status", *nobody, cwd=tmp_path, code=1
    )
    assert "no job has written to" in phi4ray("results", "./out", cwd=tmp_path, code=1)
    refused = phi4ray("submit", *at, "--recipe", "fake", "--limit", "0", cwd=tmp_path, code=2)
    for field in ("input", "output", "limit"):
        assert f"  {field}: " in refused
