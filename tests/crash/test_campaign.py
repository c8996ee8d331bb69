"""The fault campaign in small: nodes, workers, driver, store, disk and clocks fail in one job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak import at_length

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.crash, pytest.mark.cluster, pytest.mark.timeout(1200)]


def test_a_job_ends_whole_whatever_fails_around_it(tmp_path: Path) -> None:
    command = [
        sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--kills", "6",
        "--rows", at_length("4000", "8000"), "--nodes", at_length("2", "3"),
        "--seed", os.environ.get("PHI4RAY_CRASH_SEED", "0"), "--max-minutes", "15",
        "--logs", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    log = tmp_path / "driver.log"
    said = log.read_text()[-3000:] if log.exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr[-3000:] + said
