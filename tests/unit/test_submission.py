"""A submitted job: a name to recognize it by, and what its command says of it."""

import re
import shlex
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.batch_infer import parser
from jobs.flags import to_arguments
from phi4ray.batch.submission import (
    Status,
    Submission,
    arguments_of,
    entrypoint,
    is_ours,
    output_of,
    submission_id,
)

NOON = datetime(2026, 1, 31, 12, 5, tzinfo=UTC)

# What a shell, YAML or argparse might take for something else.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


def test_a_name_tells_the_output_and_the_time() -> None:
    assert submission_id("s3://bucket/Answers of May/", NOON, "9f3a") == (
        "answers-of-may-0131-1205-9f3a"
    )


@given(TEXT, TEXT)
def test_a_name_can_stand_in_an_address_and_a_file_name(folder: str, name: str) -> None:
    made = submission_id(f"{folder}/{name}", NOON, "9f3a")
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,60}", made)


@given(st.lists(TEXT))
def test_arguments_survive_the_shell(arguments: list[str]) -> None:
    command = entrypoint(arguments)
    assert is_ours(command)
    assert arguments_of(command) == arguments
    assert shlex.split(command)[:3] == ["python", "-m", "jobs.batch_infer"]


@given(
    st.lists(TEXT, min_size=1, max_size=3),
    TEXT,
    st.lists(TEXT, max_size=2),
    st.integers(),
    st.booleans(),
)
def test_arguments_are_rebuilt_from_what_was_parsed(
    inputs: list[str], text: str, pairs: list[str], limit: int, retry_errors: bool
) -> None:
    given_arguments = [
        *(f"--input={uri}" for uri in inputs),
        f"--output={text}",
        f"--system-prompt={text}",
        f"--limit={limit}",
        "--recipe=fake",
        *(f"--set={pair}" for pair in pairs),
        *(["--retry-errors"] if retry_errors else []),
    ]
    parsed = parser().parse_args(given_arguments)
    assert parser().parse_args(to_arguments(parsed)) == parsed


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("python -m jobs.batch_infer --output=s3://b/out --input=x", "s3://b/out"),
        ("python jobs/batch_infer.py --output-format parquet --output 's3://b/a b'", "s3://b/a b"),
        ("python -m jobs.batch_infer --config job.yaml", None),
        ("python -m jobs.batch_infer --output", None),
        ("bash -c 'python -m jobs.batch_infer --output out || test $? -eq 3'", None),
        ("python -m jobs.batch_infer 'unbalanced", None),
    ],
)  # fmt: skip
def test_the_output_of_a_job_that_others_submitted_is_found(
    command: str, output: str | None
) -> None:
    assert is_ours(command)
    assert output_of(command) == output


@pytest.mark.parametrize("command", ["python train.py --output x", "python -m myjobs_batch_infer"])
def test_other_jobs_are_not_ours(command: str) -> None:
    assert not is_ours(command)


@pytest.mark.parametrize(
    ("status", "exit_code", "outcome", "process_exit_code"),
    [
        ("SUCCEEDED", 0, "finished", 0),
        ("FAILED", 3, "finished with error rows", 3),
        ("FAILED", 2, "failed", 2),
        ("FAILED", None, "failed", 1),
        ("STOPPED", None, "stopped", 1),
        ("STOPPED", -15, "stopped", 1),
        ("FAILED", -9, "failed", 1),
    ],
)
def test_an_end_has_the_exit_code_of_the_job(
    status: Status, exit_code: int | None, outcome: str, process_exit_code: int
) -> None:
    job = Submission("id", status, "python", exit_code=exit_code)
    assert job.ended
    assert (job.outcome, job.process_exit_code) == (outcome, process_exit_code)
