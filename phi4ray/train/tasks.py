"""The tasks of an evaluation by name, and how a local file takes the place of the hub's data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi4ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TaskSet:
    """lm-eval's tasks that go by one name, and how they are sampled."""

    tasks: tuple[str, ...]
    temperature: float | None = None
    chat: bool = False


TASK_SETS: Mapping[str, TaskSet] = {
    "gsm8k": TaskSet(("gsm8k",)),
    "mmlu": TaskSet(("mmlu",)),
    "simple-evals": TaskSet(
        (
            "mmlu_flan_cot_zeroshot",
            "gpqa_diamond_cot_zeroshot",
            "minerva_math500",
            "humaneval_instruct",
            "mgsm_en_cot_en",
            "drop",
        ),
        temperature=0.5,
        chat=True,
    ),
}
"""Any other name is lm-eval's own.

`simple-evals` are lm-eval's editions of the benchmarks that Phi-4's report (arXiv:2412.08905, table
1) takes from OpenAI's simple-evals at temperature 0.5, MGSM in English; but SimpleQA, whose answers
another model must grade: https://github.com/openai/simple-evals.
"""

FILE_BASES: Mapping[str, str] = {
    "mmlu": "mmlu_abstract_algebra",
    "mmlu_flan_cot_zeroshot": "mmlu_flan_cot_zeroshot_abstract_algebra",
}
"""The member that stands for a group when its data are one file: it differs by its subject alone"""


def file_task(task: str, definition: Path, data: Path) -> dict[str, Any]:
    """An lm-eval task as `definition` states it, over the documents of a local file.

    The file has the columns of the hub's data set; few-shot examples are taken from it too, and
    never the one that is asked.

    Raises:
        ConfigError: the file is neither JSON lines nor Parquet.
    """
    if data.suffix not in (".jsonl", ".json", ".parquet"):
        raise ConfigError(f"{data}: data of a task are .jsonl, .json or .parquet")
    return {
        "include": str(definition),
        "task": task,
        "task_alias": task,
        "description": "",
        "dataset_path": "parquet" if data.suffix == ".parquet" else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "test",
    }


def write_file_task(folder: Path, task: str, definition: Path, data: Path) -> Path:
    """Write such a task where lm-eval reads it: JSON is YAML."""
    path = folder / f"{task}.yaml"
    path.write_text(json.dumps(file_task(task, definition, data)), encoding="utf-8")
    return path


def runs_of(names: Sequence[str]) -> dict[TaskSet, tuple[str, ...]]:
    """Which tasks are run together, by how they are sampled; names keep their order."""
    runs: dict[TaskSet, tuple[str, ...]] = {}
    for name in names:
        found = TASK_SETS.get(name, TaskSet((name,)))
        way = TaskSet((), found.temperature, found.chat)
        runs[way] = runs.get(way, ()) + found.tasks
    return runs
