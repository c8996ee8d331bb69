"""Exactly once, whatever dies: real processes are SIGKILLed while a job runs S3-to-S3."""

import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi4ray.fake import fake_text
from phi4ray.storage import join, storage_for
from tests.soak import at_length

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.crash, pytest.mark.cluster, pytest.mark.timeout(900)]

ROWS = at_length(1000, 3000)
MINE = "PHI4RAY_TEST_KILLS"  # in the environment of what is started here
# One fatal kill after every few of workers: the job is then started again. Of two workers, the
# second is the first's replacement, which dies while it starts.
FATAL = ("driver", "raylet", "gcs_server")
WORKERS = at_length((2, 1, 1), (6, 5, 7))


@pytest.fixture
def job(s3_prefix: str) -> tuple[list[str], dict[str, str], str]:
    """A job whose command outlasts the kills: its arguments, environment, output."""
    prompts, answers = join(s3_prefix, "prompts/"), join(s3_prefix, "answers/")
    for file in range(3):
        lines = [
            json.dumps({"id": f"row-{row}", "prompt": f"prompt {row}"}).encode() + b"\n"
            for row in range(file, ROWS, 3)
        ]
        storage_for(prompts).write(join(prompts, f"{file}.jsonl"), b"".join(lines))
    # A hundred rows a second: slow enough to be killed often before the end.
    engine_args = ["latency_s=0.3", "max_num_seqs=16"]
    command = [
        sys.executable, str(ROOT / "jobs" / "batch_infer.py"), "--recipe", "fake",
        "--input", prompts, "--output", answers, "--shard-rows", "50",
        "--engine-arg", *engine_args, "--progress-interval-s", "2",
    ]  # fmt: skip
    # A killed GCS is noticed in seconds, not in a minute.
    return (
        command,
        {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "3", MINE: "1"},
        answers,
    )


def test_every_row_has_one_answer_and_no_part_changes(
    job: tuple[list[str], dict[str, str], str], tmp_path: Path
) -> None:
    command, environment, answers = job
    random_ = random.Random(int(os.environ.get("PHI4RAY_CRASH_SEED", "0")))
    seen: dict[str, bytes] = {}
    killed: dict[str, int] = {}
    log = tmp_path / "log"
    for workers, fatal in zip(WORKERS, FATAL, strict=True):
        with running(command, environment, log) as driver:
            for victim in ["worker"] * workers + [fatal]:
                wait_for_new_part(answers, seen, driver, log)
                time.sleep(random_.uniform(0, 0.7))
                kill(driver, victim, log)
                killed[victim] = killed.get(victim, 0) + 1
            driver.wait(120)
    last = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stdout[-3000:] + last.stderr[-3000:]

    assert killed == {"worker": sum(WORKERS), **dict.fromkeys(FATAL, 1)}
    for uri, data in seen.items():
        assert storage_for(uri).read(uri) == data, f"{uri} was finished, and written again"
    table = pa.concat_tables(pq.read_table(io.BytesIO(data)) for data in parts(answers).values())
    rows = table.select(["id", "source_row", "text", "error_code"]).to_pylist()
    assert len(rows) == ROWS
    assert {row["id"]: row["text"] for row in rows} == {
        f"row-{row}": fake_text(f"prompt {row}") for row in range(ROWS)
    }
    assert storage_for(answers).read(join(answers, "_SUCCESS")) == b""


class running:  # noqa: N801
    """The driver, started; nothing of it is left afterwards."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log.open("wb")
        self._process = psutil.Popen(
            command, env=environment, cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT
        )
        self._children: set[psutil.Process] = set()

    def __enter__(self) -> psutil.Popen:
        return self._process

    def __exit__(self, *_: object) -> None:
        assert self._process.poll() is not None, "the job outlives the death of its cluster"
        self._log.close()
        deadline = time.monotonic() + 60
        while left := ray_processes():
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.2)


def ray_processes() -> list[str]:
    """What a dead job must not leave behind: workers, and the watchers of their engines."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command = " ".join(process.info["cmdline"] or ())
        ours = MINE in (process.info["environ"] or ())
        if ours and ("RayShardWorker" in command or "orphans.py" in command):
            found.append(command)
    return found


def kill(driver: psutil.Popen, victim: str, log: Path) -> None:
    """SIGKILL the driver or a process below it."""
    if victim == "driver":
        driver.kill()
        return
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert driver.poll() is None, log.read_text()[-3000:]
        for process in driver.children(recursive=True):
            try:
                name, command = process.name(), " ".join(process.cmdline())
                if name == victim or (victim == "worker" and "RayShardWorker" in command):
                    process.kill()
                    return
            except psutil.Error:
                continue
        time.sleep(0.1)
    raise AssertionError(f"there is no {victim} to kill")


def parts(answers: str) -> dict[str, bytes]:
    storage = storage_for(answers)
    uris = [item.uri for item in storage.list(answers) if item.uri.endswith(".parquet")]
    return {uri: storage.read(uri) for uri in uris}


def wait_for_new_part(
    answers: str, seen: dict[str, bytes], driver: psutil.Popen, log: Path
) -> None:
    """Wait until the job has made progress since the last kill, and note what is finished."""
    deadline = time.monotonic() + 120
    storage = storage_for(answers)
    while time.monotonic() < deadline:
        assert driver.poll() is None, log.read_text()[-3000:]
        uris = {item.uri for item in storage.list(answers) if item.uri.endswith(".parquet")}
        if new := uris - seen.keys():
            seen.update({uri: storage.read(uri) for uri in new})
            return
        time.sleep(0.2)
    raise AssertionError(f"no progress: {log.read_text()[-3000:]}")
