"""Tasks by name, local files in place of the hub's data, and the evaluation's command line."""

import json
import sys
from pathlib import Path

import pytest

import phi4ray.train
from jobs.evaluate import FLAGS, configuration, main, parser
from phi4ray.config import validated
from phi4ray.errors import ConfigError
from phi4ray.train.evaluate import EvaluateConfig
from phi4ray.train.results import samples_of, scores_of
from phi4ray.train.tasks import TASK_SETS, TaskSet, file_task, runs_of, write_file_task

CHOSEN = TaskSet(())


def test_simple_evals_are_asked_in_chats_at_temperature_a_half() -> None:
    (way,) = runs_of(["simple-evals"])
    assert (way.temperature, way.chat) == (0.5, True)
    assert runs_of(["simple-evals"])[way] == TASK_SETS["simple-evals"].tasks


def test_tasks_that_are_sampled_alike_run_together() -> None:
    runs = runs_of(["gsm8k", "simple-evals", "arc_easy", "mmlu"])
    assert runs[CHOSEN] == ("gsm8k", "arc_easy", "mmlu")
    assert len(runs) == 2


@pytest.mark.parametrize(("name", "kind"), [("a.jsonl", "json"), ("a.parquet", "parquet")])
def test_a_local_file_takes_the_place_of_the_hubs_data_and_nothing_else(
    name: str, kind: str, tmp_path: Path
) -> None:
    path = write_file_task(tmp_path, "gsm8k", Path("/lm/gsm8k.yaml"), tmp_path / name)
    task = json.loads(path.read_text())
    assert task["include"] == "/lm/gsm8k.yaml"
    assert (task["task"], task["dataset_path"], task["dataset_name"]) == ("gsm8k", kind, None)
    assert task["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / name)}}
    assert task["test_split"] == task["fewshot_split"]  # where lm-eval leaves the asked one out
    for kept in ("doc_to_text", "metric_list", "num_fewshot", "generation_kwargs", "metadata"):
        assert kept not in task


def test_data_of_an_unknown_format_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"are \.jsonl, \.json or \.parquet"):
        file_task("gsm8k", Path("gsm8k.yaml"), Path("data.csv"))


RESULTS = {
    "results": {
        "mmlu": {"alias": "mmlu", "acc,none": 0.75, "acc_stderr,none": 0.02},
        "mmlu_law": {"alias": "law", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        "mmlu_art": {"alias": "art", "acc,none": 1.0, "acc_stderr,none": 0.0, "sample_len": 2},
    },
    "versions": {"mmlu": 2, "mmlu_law": 1.0},
    "n-shot": {"mmlu_law": 5},
    "higher_is_better": {"mmlu": {"acc": True}, "mmlu_law": {"acc": True}, "mmlu_art": {}},
    "group_subtasks": {"mmlu": ["mmlu_law", "mmlu_art"], "mmlu_law": [], "mmlu_art": []},
    "samples": {
        task: [
            {"doc_id": i, "filter": "none", "metrics": ["acc", "pair"], "acc": s, "pair": (1, 2)}
            for i, s in enumerate(scores)
        ]
        for task, scores in {"mmlu_law": (1.0, 0.0), "mmlu_art": (1.0, 1.0)}.items()
    },
}


def test_results_are_the_lines_of_lm_evals_table() -> None:
    law = {score.task: score for score in scores_of(RESULTS)}["law"]
    assert (law.version, law.n_shot, law.metric, law.filter) == ("1.0", "5", "acc", "none")
    assert (law.value, law.stderr, law.higher_is_better) == (0.5, None, True)
    assert len(scores_of(RESULTS)) == 3


def test_a_groups_samples_are_those_of_its_tasks() -> None:
    samples, better = samples_of(RESULTS, "mmlu")
    assert samples == {
        "mmlu,acc,none": {"mmlu_law#0": 1, "mmlu_law#1": 0, "mmlu_art#0": 1, "mmlu_art#1": 1}
    }
    assert better == {"mmlu,acc,none": True}
    assert samples_of(RESULTS, "mmlu_law")[0].keys() == {"mmlu_law,acc,none"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"against_url": "http://b/v1", "against": "b"}, "needs base_url"),
        ({"against_engine": {"seed": 1}}, "need against"),
        ({"data": {"mmlu": "a.jsonl"}}, "'mmlu', which is not among the tasks"),
        ({"bound_points": 0}, "bound_points"),
        ({"tasks": []}, "tasks"),
    ],
)
def test_settings_that_contradict_are_refused(changed: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validated(EvaluateConfig, {"engine": {"model": "m"}, "output": "o"}, changed)


def test_an_interrupt_ends_in_a_line_that_says_what_is_kept_and_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.evaluate.evaluate", interrupted)
    asked = ["--model", "m", "--output", "o", "--base-url", "http://localhost:1/v1"]
    assert main(asked) == 130
    assert capsys.readouterr().err == (
        "interrupted: run again, batches go on from their finished parts\n"
    )


def test_recipe_file_and_flags_make_one_configuration(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("{tasks: [mmlu], limit: 5, engine: {max_num_seqs: 7}, output: out}")
    line = ["--recipe", "phi4-fp8-h200", "--config", str(path), "--limit", "9", "--against", "b"]
    line += ["--against-engine", "kv_cache_dtype=fp8", "--data", "mmlu=a.parquet"]
    made = configuration(parser().parse_args(line))
    assert (made.tasks, made.limit, made.output) == (("mmlu",), 9, "out")
    assert (made.engine.max_num_seqs, made.engine.quantization) == (7, "fp8")
    assert made.against_engine == {"kv_cache_dtype": "fp8"}
    assert made.data == {"mmlu": "a.parquet"}


def test_folders_are_named_in_full_for_workers_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "small").mkdir()
    line = ["--model", "base", "--against", "small", "--output", "o"]
    made = configuration(parser().parse_args(line))
    assert (made.engine.model, made.against) == (str(tmp_path / "base"), str(tmp_path / "small"))


def test_bad_arguments_end_with_2_and_name_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--limit", "0", "--data", "gsm8k"]) == 2
    assert "--data gsm8k: write KEY=VALUE" in capsys.readouterr().err
    assert main(["--limit", "0"]) == 2
    told = capsys.readouterr().err
    for field in ("engine.model", "output", "limit"):
        assert f"  {field}: " in told


def test_without_lm_eval_it_ends_with_2_and_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "phi4ray.train.harness", raising=False)
    monkeypatch.delattr(phi4ray.train, "harness", raising=False)
    asked = ("--base-url", "http://127.0.0.1:9/v1", "--model", "phi-4", "--output", str(tmp_path))
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert "lm_eval is not installed here" in told
    assert "pip install '.[evaluate]'" in told


def test_help_tells_of_every_flag_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    told = capsys.readouterr().out
    assert "3 the loss is above the bound" in told
    for name in (*FLAGS, "tasks", "data", "against_engine", "confirm_run_unsafe_code"):
        assert f"--{name.replace('_', '-')} " in told or f"--{name.replace('_', '-')}\n" in told
