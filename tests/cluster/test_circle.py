"""The circle, cut short: every job takes what the one before it made. Accuracy is not looked at.

The quantizer's environment is what `PHI4RAY_QUANTIZE_PYTHON` names; without it this is skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi4ray.train.environment import PYTHON

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python that quantizes"),
]


def test_the_circle_closes(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "jobs.circle", "--steps", "12", "--chats", "500"),
        *("--problems", "60", "--evaluated", "40", "--port", "8017"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    table = done.stdout[done.stdout.index("the circle") :]
    for line in (
        "fine-tune, 12 steps",
        "quantize, w8a8",
        "evaluate, as trained",
        "evaluate, quantized",
        "the difference",
        "batch job, 1 parts",
        "serve over HTTP",
    ):
        assert line in table
    assert "exact match of 40" in table
    assert "exact match of 60" in table
    assert "of 5 right" in table
