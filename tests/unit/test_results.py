"""Results: what a job wrote, from its output alone, while it runs and after."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from jobs.cli import app
from phi4ray.batch.results import read_results, rows_of
from phi4ray.errors import InputError
from tests.small_jobs import job, parts, prompts, run, write_lines


def finished(folder: Path, **changes: object) -> str:
    write_lines(folder / "in" / "a.jsonl", [*prompts(8), {"id": "none"}])
    run(job(folder, shard_rows=3, **changes))
    return f"{folder}/out"


def test_a_finished_job_is_read_from_its_manifest(tmp_path: Path) -> None:
    found = read_results(finished(tmp_path))
    figures = found.figures()
    assert found.finished
    assert (figures["rows"], figures["rows_total"]) == (9, 9)
    assert (figures["parts"], figures["parts_total"]) == (3, 3)
    assert figures["errors"] == {"missing_prompt": 1}
    assert figures["prompt_tokens"] > 0
    assert figures["completion_tokens"] > 0
    assert figures["duration_s"] >= 0
    for place in ("report", "manifest"):
        assert Path(figures[place]).is_file()


def test_an_unfinished_job_is_added_up_from_the_parts_that_are_there(tmp_path: Path) -> None:
    output = finished(tmp_path)
    whole = read_results(output)
    (tmp_path / "out" / "_SUCCESS").unlink()
    assert read_results(output).figures() == {
        **whole.figures(), "finished": False, "report": None, "manifest": None,
    }  # fmt: skip
    last = sorted(parts(job(tmp_path)).values())[-1]
    last.unlink()
    left = read_results(output)
    figures = left.figures()
    assert not left.finished
    assert (figures["rows"], figures["parts"], figures["error_rows"]) == (6, 2, 0)
    assert [row["id"] for row in rows_of(left)] == [f"r{n}" for n in range(6)]


def test_a_job_that_has_written_no_part_has_no_times(tmp_path: Path) -> None:
    output = finished(tmp_path)
    (tmp_path / "out" / "_SUCCESS").unlink()
    for path in parts(job(tmp_path)).values():
        path.unlink()
    assert read_results(output).figures()["duration_s"] is None


def test_the_manifest_of_an_earlier_job_is_not_taken(tmp_path: Path) -> None:
    output = finished(tmp_path)
    manifest = tmp_path / "out" / "_manifest.json"
    plan_id = read_results(output).plan.plan_id
    manifest.write_text(manifest.read_text().replace(plan_id, "0" * 12))
    assert not read_results(output).finished


def test_rows_come_in_the_order_of_the_input(tmp_path: Path) -> None:
    found = read_results(finished(tmp_path))
    rows = list(rows_of(found))
    assert [row["id"] for row in rows] == [*(f"r{n}" for n in range(8)), "none"]
    assert rows[0]["text"].startswith("fake:")


def test_only_parts_with_errors_are_read_for_errors(tmp_path: Path) -> None:
    found = read_results(finished(tmp_path))
    for path in sorted(parts(job(tmp_path)).values())[:2]:
        path.unlink()
    (row,) = rows_of(found, errors_only=True)
    assert (row["id"], row["error_code"]) == ("none", "missing_prompt")


def test_parts_that_lie_apart_are_found(tmp_path: Path) -> None:
    output = finished(tmp_path, output_format="openai-jsonl")
    assert len(list(rows_of(read_results(output)))) == 9


def test_where_no_job_has_written_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"_plan\.json is not there"):
        read_results(f"{tmp_path}/out")


# phi4ray results


def asked(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["results", *arguments])


def test_a_job_without_errors_exits_0_and_shows_its_first_rows(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", prompts(8))
    run(job(tmp_path))
    told = asked(f"{tmp_path}/out", "--head", "2")
    assert told.exit_code == 0
    assert "r1: fake:" in told.stdout
    assert "r2: " not in told.stdout
    assert f"manifest: {tmp_path}/out/_manifest.json" in told.stdout


def test_error_rows_exit_3_and_are_shown_alone(tmp_path: Path) -> None:
    told = asked(finished(tmp_path), "--errors")
    assert told.exit_code == 3
    assert "none: [missing_prompt]" in told.stdout
    assert "fake:" not in told.stdout


def test_an_unfinished_job_exits_1_with_what_there_is(tmp_path: Path) -> None:
    output = finished(tmp_path)
    sorted(parts(job(tmp_path)).values())[0].unlink()
    (tmp_path / "out" / "_SUCCESS").unlink()
    told = asked(output)
    assert told.exit_code == 1
    assert "2 of 3 parts are written" in told.stderr
    assert "r3: fake:" in told.stdout


def test_programs_get_figures_and_whole_rows(tmp_path: Path) -> None:
    output = finished(tmp_path)
    told = asked(output, "--json", "--head", "9")
    found = json.loads(told.stdout)
    rows = found.pop("rows_shown")
    assert found == read_results(output).figures()
    assert len(rows) == 9
    assert json.loads(rows[0]["response"])["object"] == "chat.completion"
