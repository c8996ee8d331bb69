"""Progress for other processes: there while a run goes on, gone when it is finished."""

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from phi4ray.batch.plan import PROGRESS_NAME
from phi4ray.batch.progress import Window
from phi4ray.batch.progress_file import ProgressFile, read_progress
from phi4ray.errors import EngineStartError
from phi4ray.storage import join, storage_for
from tests.small_jobs import engine, job, prompts, run, write_lines
from tests.unit.test_progress import at

WINDOW = Window(at(0.0), at(10.0, 1_200, 12_340, 5_670, errors=3))


def test_another_process_reads_the_line_that_the_run_shows(prefix: str) -> None:
    console = Console(file=io.StringIO())
    with ProgressFile(prefix, "0123456789ab", console) as shared:
        shared.update(WINDOW)
    found = read_progress(prefix)
    assert found is not None
    assert found.window == WINDOW
    assert found.window.line() == WINDOW.line()
    assert found.plan_id == "0123456789ab"


def test_there_is_none_before_a_run(prefix: str) -> None:
    assert read_progress(prefix) is None


def test_what_another_version_wrote_is_no_progress(prefix: str) -> None:
    uri = join(prefix, PROGRESS_NAME)
    storage_for(uri).write(uri, b'{"rows": 5}')
    assert read_progress(prefix) is None


def test_a_finished_job_leaves_its_last_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(5))
    run(job(tmp_path))
    found = read_progress(f"{tmp_path}/out")
    assert found is not None
    assert "rows 5/5 (100%)" in found.window.line()


def test_a_failed_job_leaves_how_far_it_came(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(5))
    with pytest.raises(EngineStartError):
        run(job(tmp_path), engine(start_error="planned"))
    found = read_progress(f"{tmp_path}/out")
    assert found is not None
    assert (found.window.last.rows_done, found.window.last.rows_total) == (0, 5)


def test_a_store_that_refuses_it_is_told_of_once_and_stops_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "out"
    blocked.write_bytes(b"a file where a folder should be")
    console = Console(file=io.StringIO(), width=500)
    with ProgressFile(str(blocked), "0123456789ab", console) as shared:
        shared.update(WINDOW)
        shared._write()
        shared.update(WINDOW)
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    assert told.count("the job goes on") == 1
    assert os.path.basename(blocked) in told
