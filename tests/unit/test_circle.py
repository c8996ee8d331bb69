"""The circle, where it cannot close."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_what_stops_the_circle_is_said_on_stderr() -> None:
    command = [sys.executable, "jobs/circle.py", "--chats", "1", "--trained", "no-such-folder"]
    stopped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode != 0
    assert "error: " in stopped.stderr
    assert "jobs/quantize.py" in stopped.stderr.splitlines()[-1]
    assert "error: " not in stopped.stdout
