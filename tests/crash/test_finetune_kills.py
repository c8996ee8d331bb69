"""A fine-tune whose driver is SIGKILLed goes on from its last checkpoint, to the same weights."""

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load

from jobs.finetune import configuration, parser
from phi4ray.storage import join, storage_for
from phi4ray.train.checkpoints import last_checkpoint
from phi4ray.train.curve import Point, decode_history
from phi4ray.train.finetune import finetune
from phi4ray.train.host import InProcessHost
from tests.chat_models import SUMS, small_model
from tests.processes import kill_family
from tests.soak import at_length

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.crash, pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS = at_length(36, 60)
KILLED_AFTER = at_length(6, 12)
"""The kill comes when a checkpoint of this step or a later one is there."""


def arguments(chats: str, output: str, model: Path) -> list[str]:
    return [
        "--input", chats, "--output", output,
        "--model", str(model), "--max-steps", str(STEPS), "--per-device-batch-size", "4",
        "--gradient-accumulation-steps", "2", "--checkpoint-every-steps", "3",
        "--logging-steps", "1", "--gpus-per-worker", "0", "--dropout", "0.1",
    ]  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """As a worker of Ray computes: with more threads, sums are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def test_a_kill_costs_no_step_and_changes_no_weight(s3_prefix: str, tmp_path: Path) -> None:
    chats, model = join(s3_prefix, "chats.jsonl"), small_model(tmp_path / "model")
    lines = "".join(json.dumps(row) + "\n" for row in SUMS)
    storage_for(chats).write(chats, lines.encode())
    killed, whole = join(s3_prefix, "killed"), join(s3_prefix, "whole")

    command = [sys.executable, str(ROOT / "jobs" / "finetune.py")]
    command += arguments(chats, killed, model)
    log = tmp_path / "log"
    with log.open("wb") as stream:
        driver = psutil.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
    wait_for_checkpoint(killed, driver, log)
    kill_family(driver)
    reached = last_checkpoint(killed)
    assert reached is not None
    assert KILLED_AFTER <= reached.step < STEPS

    last = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stdout[-3000:] + last.stderr[-3000:]
    shown = [int(step) for step in re.findall(r" step (\d+)/\d+ ", last.stdout)]
    assert shown
    assert min(shown) > reached.step

    once = configuration(parser().parse_args(arguments(chats, whole, model)))
    with one_thread():
        finetune(once, InProcessHost(), Console(file=io.StringIO()))
    assert [point.step for point in curve(killed)] == list(range(1, STEPS + 1))
    assert curve(killed) == curve(whole)
    made, expected = weights(killed), weights(whole)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)


def weights(output: str) -> dict[str, torch.Tensor]:
    uri = join(output, "model/model.safetensors")
    return load(storage_for(uri).read(uri))


def curve(output: str) -> list[Point]:
    uri = join(output, "_history.json")
    return decode_history(storage_for(uri).read(uri))


def wait_for_checkpoint(output: str, driver: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert driver.poll() is None, log.read_text()[-3000:]
        found = last_checkpoint(output)
        if found is not None and found.step >= KILLED_AFTER:
            return
        time.sleep(0.1)
    raise AssertionError(f"no checkpoint: {log.read_text()[-3000:]}")
