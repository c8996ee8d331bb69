"""Batch jobs by the command line, on a real cluster: submitted, watched, read, and cancelled."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from jobs.cli import app
from tests.ray_cluster import ray_cluster
from tests.small_jobs import prompts, write_lines
from tests.waiting import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray cluster of this machine with phi4ray installed; gives where its dashboard is."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    options = "--num-cpus=2", f"--dashboard-port={port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token is left on this machine
        patch.setenv("RAY_API_SERVER_ADDRESS", address)
        with ray_cluster(*options, environment=os.environ):
            yield address


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


def test_a_job_is_submitted_watched_and_read(cluster: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", [*prompts(8), {"id": "none"}])
    (tmp_path / "job.yaml").write_text("shard_rows: 3\noutput: out\n")
    at = ("--address", cluster)
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


def test_a_job_is_left_found_again_and_cancelled(cluster: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(4000))
    at = ("--address", cluster)
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


def test_the_readme_tells_commands_that_work(cluster: str, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(phi4ray submit.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    write_lines(tmp_path / "prompts" / "a.jsonl", prompts(3))
    here = tmp_path / "here"
    here.mkdir()
    told: dict[str, str] = {}
    job_id = ""
    for line in block.replace("s3://bucket", "..").replace("phi4-fp8-h200", "fake").splitlines():
        _, command, *arguments = shlex.split(line.replace("ID", job_id))
        at = () if command == "results" else ("--address", cluster)
        ended = command == "cancel"
        told[line] = phi4ray(command, *arguments, *at, cwd=here, code=1 if ended else 0)
        if command == "submit":
            job_id = told[line].split()[1]
    assert job_id in told["phi4ray status"]
    assert f"{job_id} finished" in told["phi4ray status ID --follow"]
    assert "rows 3/3 (100%)" in told["phi4ray logs ID"]
    assert "r0: fake:" in told["phi4ray results ../answers/ --head 10"]
    assert f"{job_id} has ended" in told["phi4ray cancel ID"]


def test_what_is_wrong_is_said_and_has_its_exit_code(cluster: str, tmp_path: Path) -> None:
    at = ("--address", cluster)
    assert "no batch job 'none'" in phi4ray("status", "none", *at, cwd=tmp_path, code=2)
    nobody = ("--address", "127.0.0.1:9")
    assert "no Ray cluster answers at http://127.0.0.1:9" in phi4ray(
        "status", *nobody, cwd=tmp_path, code=1
    )
    assert "no job has written to" in phi4ray("results", "./out", cwd=tmp_path, code=1)
    refused = phi4ray("submit", *at, "--recipe", "fake", "--limit", "0", cwd=tmp_path, code=2)
    for field in ("input", "output", "limit"):
        assert f"  {field}: " in refused
