"""Watching a job in a terminal: its log, and its progress as one live line."""

import io
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jobs import cli
from jobs import follow as follow_module
from jobs.follow import Watch, show_live
from jobs.show import SILENT_S, again, job_facts, job_lines, job_list, result_lines, row_line
from phi4ray.batch.progress import Progress, Window, last_progress_line
from phi4ray.batch.progress_file import ProgressFile, RunProgress
from phi4ray.batch.submission import Submission
from phi4ray.cli import app
from phi4ray.errors import TransientStorageError
from phi4ray.storage.local import LocalStorage
from tests.unit.test_progress import Log, at

WINDOW = Window(at(0.0), at(10.0, 1_200, 12_340, 5_670, errors=3))
LOG = "12:00:10 rows 7/10,000 (0%) errors 0 | prompt 0 tok/s"


def watched(output: Path, started_at: float = 0.0) -> Submission:
    with ProgressFile(str(output), "0123456789ab", Console(file=io.StringIO())) as shared:
        shared.update(WINDOW)
    return Submission("out-1", "RUNNING", "python", str(output), started_at)


def shown(job: Submission, *lines: str | None) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200, color_system=None)
    show_live(iter(lines), Watch(job), console)
    return file.getvalue()


def test_progress_is_one_live_line_and_the_rest_of_the_log_stays(tmp_path: Path) -> None:
    text = shown(watched(tmp_path), "plan 0123456789ab: 10,000 rows", None, LOG, "all done")
    assert WINDOW.line() in text
    assert "plan 0123456789ab: 10,000 rows" in text
    assert "all done" in text
    assert "rows 7/10,000" not in text


def test_what_a_run_told_at_its_end_is_shown_at_the_end(tmp_path: Path) -> None:
    job = watched(tmp_path)

    def lines() -> Iterator[str | None]:
        yield None
        end = Window(WINDOW.last, at(12.0, 10_000, 20_000, 10_000))
        with ProgressFile(str(tmp_path), "0123456789ab", Console(file=io.StringIO())) as shared:
            shared.update(end)

    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200, color_system=None)
    show_live(lines(), Watch(job), console)
    assert "rows 10,000/10,000 (100%)" in file.getvalue()


def test_the_lines_of_the_log_stay_where_the_output_cannot_be_read() -> None:
    job = Submission("out-1", "RUNNING", "python", "gs://bucket/answers", 0.0)
    text = shown(job, None, LOG)
    assert "progress comes from the log" in text
    assert LOG in text


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that takes every request and answers none, and little patience."""
    answer = threading.Event()
    monkeypatch.setattr(LocalStorage, "head", lambda *_: answer.wait(5))
    monkeypatch.setattr(LocalStorage, "read", lambda *_: answer.wait(5))
    monkeypatch.setattr(follow_module, "PATIENCE_S", 0.01)
    yield
    answer.set()


@pytest.mark.usefixtures("silent")
def test_the_results_of_a_store_that_does_not_answer_are_not_waited_for(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["results", str(tmp_path)])
    assert told.exit_code == 1
    assert f"{tmp_path} does not answer within" in told.stderr


@pytest.mark.usefixtures("silent")
def test_what_stays_of_a_cancelled_job_is_not_waited_for(tmp_path: Path) -> None:
    job = Submission("out-1", "STOPPED", "python", str(tmp_path), 0.0)
    assert f"cannot be counted here: {tmp_path} does not answer" in cli._what_stays(job)


def test_a_store_that_does_not_answer_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def stuck(output: str) -> None:
        asked.set()
        answer.wait()

    monkeypatch.setattr(follow_module, "read_progress", stuck)
    monkeypatch.setattr(follow_module, "WAIT_S", 0.001)
    watch = Watch(watched(tmp_path))
    began = time.monotonic()
    assert watch.look_when_due() is None
    assert watch.look_when_due() is None
    assert asked.wait(1)
    assert time.monotonic() - began < 1
    monkeypatch.setattr(follow_module, "PATIENCE_S", 0.01)
    with pytest.raises(TransientStorageError, match="does not answer within"):
        watch.look()
    assert "progress comes from the log" in (text := shown(watched(tmp_path), None, None, LOG))
    assert LOG in text
    answer.set()


def test_the_lines_of_the_log_stay_where_the_output_is_not_known() -> None:
    assert LOG in shown(Submission("out-1", "RUNNING", "python"), None, LOG)


def test_what_an_earlier_job_left_is_not_shown(tmp_path: Path) -> None:
    job = watched(tmp_path, started_at=time.time() + 60)
    assert Watch(job).look() is None
    assert LOG in shown(job, None, LOG)


def test_the_lines_that_a_run_prints_are_known_for_progress() -> None:
    log = Log()
    with Progress(log.console, interval_s=10) as progress:
        progress.update(at(0.0, replicas=0))
        progress.update(at(10.0, 1_200, 12_340, 5_670))
    job = Submission("out-1", "RUNNING", "python")
    assert all(line in shown(job, None, line) for line in log.lines)


def test_a_job_is_told_with_its_speed_and_errors() -> None:
    job = Submission("out-1", "RUNNING", "python -m x", "/out", started_at=100.0)
    found = RunProgress(plan_id="0123456789ab", updated_at=110.0, window=WINDOW)
    lines = dict(job_lines(job, found, now=165.0))
    assert lines["status"] == "running"
    assert lines["started"] == "1970-01-01 00:01:40 UTC"
    assert lines["for"] == "0:01:05"
    assert lines["progress"] == WINDOW.line()
    assert lines["rows/s"] == "120.0"
    assert lines["  invalid_json"] == "3"
    assert lines["told"] == "0:00:55 ago"
    fresh = found.model_copy(update={"updated_at": 165.0 - SILENT_S})
    assert "told" not in dict(job_lines(job, fresh, now=165.0))
    ended = replace(job, status="SUCCEEDED", ended_at=112.0)
    assert "told" not in dict(job_lines(ended, found, now=165.0))


def test_an_ended_job_is_told_with_its_exit_code_and_length() -> None:
    job = Submission("out-1", "FAILED", "python", None, 100.0, 160.0, exit_code=3)
    lines = dict(job_lines(job, None, now=1e6))
    assert lines["status"] == "finished with error rows, exit code 3"
    assert (lines["for"], lines["output"]) == ("0:01:00", "?")


def test_where_the_output_tells_nothing_the_log_does() -> None:
    job = Submission("out-1", "RUNNING", "python", None, 100.0)
    log = f"plan 0123456789ab: 10,000 rows\n{LOG.replace('7/', '6/')}\n{LOG}\na warning\n"
    line = last_progress_line(log)
    assert line == LOG
    assert last_progress_line("plan\n") is None
    assert dict(job_lines(job, None, 165.0, line))["progress"] == LOG
    assert job_facts(job, None, line)["progress_line"] == LOG
    found = RunProgress(plan_id="0123456789ab", updated_at=110.0, window=WINDOW)
    assert job_facts(job, found, line)["progress_line"] == WINDOW.line()


def test_the_same_is_told_to_programs() -> None:
    job = Submission("out-1", "RUNNING", "python", "/out", 100.0)
    assert job_facts(job, None)["progress"] is None
    found = RunProgress(plan_id="0123456789ab", updated_at=110.0, window=WINDOW)
    told = job_facts(job, found)["progress"]
    assert (told["rows"], told["rows_total"], told["rows_per_s"]) == (1_200, 10_000, 120.0)
    assert (told["eta_s"], told["errors"], told["replicas"]) == (73.0, {"invalid_json": 3}, 1)
    still = replace(found.window, first=found.window.last)
    assert job_facts(job, found.model_copy(update={"window": still}))["progress"]["eta_s"] is None


def test_jobs_are_listed_a_line_each_and_names_stay_whole() -> None:
    running = Submission("out-1", "RUNNING", "python", "s3://bucket/" + "long/" * 50, 100.0)
    found = RunProgress(plan_id="0123456789ab", updated_at=110.0, window=WINDOW)
    ended = Submission("answers-of-may-2", "FAILED", "python", None, 100.0, 160.0, exit_code=1)
    head, *lines = job_list([(running, found), (ended, None)], now=190.0)
    assert head.split() == ["ID", "STATUS", "STARTED", "(UTC)", "FOR", "PROGRESS", "OUTPUT"]
    assert lines == [
        "out-1             running  1970-01-01 00:01:40  0:01:30  "
        f"rows 1,200/10,000 (12%) errors 3  {running.output}",
        f"answers-of-may-2  failed   1970-01-01 00:01:40  0:01:00  {' ' * 34}?",
    ]
    assert "phi4ray submit" in job_list([], now=0.0)[0]


def test_what_is_missing_is_told_with_what_there_is() -> None:
    figures = {
        "rows": 6_000, "rows_total": 9_000, "parts": 3, "parts_total": 3, "error_rows": 1,
        "errors": {"timeout": 1}, "prompt_tokens": 70_000, "completion_tokens": 80,
        "duration_s": None,
    }  # fmt: skip
    assert result_lines(figures) == [
        ("rows", "6,000 of 9,000"),
        ("parts", "3"),
        ("error rows", "1"),
        ("  timeout", "1"),
        ("prompt tokens", "70,000"),
        ("completion tokens", "80"),
    ]


def test_a_row_is_one_line() -> None:
    row = {"id": "r", "text": "a\nb", "response": "{}", "error_code": None, "error_message": None}
    assert row_line(row) == "r: a b"
    assert row_line({**row, "text": None}) == "r: {}"
    assert row_line({**row, "text": "x" * 200}) == f"r: {'x' * 99}…"
    failed = {**row, "error_code": "timeout", "error_message": "no answer"}
    assert row_line(failed) == "r: [timeout] no answer"


def test_the_command_that_goes_on_is_told() -> None:
    job = Submission("out-1", "STOPPED", "python -m jobs.batch_infer '--output=s3://b/a b'")
    assert again(job) == "phi4ray submit '--output=s3://b/a b'"
    shell = "bash -c 'python -m jobs.batch_infer --config job.yaml || test $? -eq 3'"
    assert again(Submission("out-1", "STOPPED", shell)) == shell
