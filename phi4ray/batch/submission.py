"""A batch job that was submitted to a cluster: its name, its command, and how it stands. Pure."""

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

MODULE = "jobs.batch_infer"
"""What a job runs: importable wherever phi4ray is installed or uploaded."""

OUTPUT_KEY = "phi4ray_output"
"""The key of a job's metadata that holds its output."""

Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]

FINISHED_WITH_ERROR_ROWS = 3


@dataclass(frozen=True, slots=True)
class Submission:
    """One job of a cluster's. Times are Unix seconds; `output` is None where it is not known."""

    id: str
    status: Status
    entrypoint: str
    output: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    message: str = ""

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.status not in ("PENDING", "RUNNING")

    @property
    def outcome(self) -> str:
        """How it stands, in words."""
        if self.status == "FAILED" and self.exit_code == FINISHED_WITH_ERROR_ROWS:
            return "finished with error rows"
        return {
            "PENDING": "starting",
            "RUNNING": "running",
            "STOPPED": "stopped",
            "SUCCEEDED": "finished",
            "FAILED": "failed",
        }[self.status]

    @property
    def process_exit_code(self) -> int:
        """What a command that waited for the job exits with: the job's own code, or 1."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED" or self.exit_code is None or self.exit_code < 1:
            return 1  # a signal ended it
        return self.exit_code


def submission_id(output: str, now: datetime, nonce: str) -> str:
    """A name to recognize a job by: the end of its output, the time, and what makes it unique."""
    *_, last = output.rstrip("/").split("/")
    slug = re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:40] or "job"
    return f"{slug}-{now:%m%d-%H%M}-{nonce}"


def entrypoint(arguments: Sequence[str]) -> str:
    """The shell command that runs a job with these arguments."""
    return shlex.join(["python", "-m", MODULE, *arguments])


def is_ours(command: str) -> bool:
    """Whether a job's entrypoint runs a batch job, whoever submitted it."""
    return re.search(r"\bjobs[./]batch_infer\b", command) is not None


def arguments_of(command: str) -> list[str] | None:
    """The batch job's arguments in an entrypoint; None where a shell has more to do."""
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    for at, word in enumerate(words):
        if word == MODULE or word.endswith("jobs/batch_infer.py"):
            return words[at + 1 :]
    return None


def output_of(command: str) -> str | None:
    """The `--output` in an entrypoint, if it is there."""
    flags = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    flags.add_argument("--output")
    try:
        known, _ = flags.parse_known_args(arguments_of(command) or [])
    except argparse.ArgumentError:
        return None
    output: str | None = known.output
    return output
