"""An evaluation: tasks of lm-eval asked of one model or of two, compared sample by sample.

    tasks → requests → batch replicas or an endpoint → scores → table, paired test, verdict

Everything is written below `output`: `report.json`, `report.md`, and the batch jobs' answers, with
which an evaluation that was cut off goes on.
"""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator
from rich.console import Console

from phi4ray.batch.executor import Executor, InProcessExecutor
from phi4ray.config import Config, EngineConfig, load_yaml, validated
from phi4ray.engines import on_this_machine
from phi4ray.errors import ConfigError
from phi4ray.models import shape_of
from phi4ray.storage import join, storage_for
from phi4ray.train.answering import Answerer, BatchAnswerer, EndpointAnswerer
from phi4ray.train.results import samples_of, scores_of
from phi4ray.train.scores import Measured, Report, Score, compare_samples
from phi4ray.train.tables import render
from phi4ray.train.tasks import runs_of

REPORT_JSON, REPORT_MARKDOWN = "report.json", "report.md"


class EvaluateConfig(Config):
    """One evaluation: which tasks, of which model, and against which other."""

    engine: EngineConfig = Field(description="The base: its model, and how both are run")
    against: str | None = Field(
        None, description="The model to compare with it, as a quantized one"
    )
    against_engine: Mapping[str, Any] = Field(
        default_factory=dict, description="Engine settings of that model alone"
    )
    base_url: str | None = Field(
        None, description="An OpenAI endpoint, to /v1; None: engines of our own answer, as a batch"
    )
    against_url: str | None = Field(None, description="The other model's; None: base_url")
    tasks: tuple[str, ...] = Field(
        ("gsm8k",), min_length=1, description="gsm8k, mmlu, simple-evals, or any task of lm-eval"
    )
    data: Mapping[str, str] = Field(
        default_factory=dict, description="Task → local file that takes the place of hub data"
    )
    output: str = Field(min_length=1, description="Folder for the report and answers; s3:// too")
    limit: int | None = Field(None, ge=1, description="Only the first N documents of each task")
    num_fewshot: int | None = Field(None, ge=0, description="None: as the task states")
    apply_chat_template: bool = Field(
        False, description="Ask in chats; simple-evals does in any case"
    )
    bound_points: float = Field(0.5, gt=0, description="Largest loss that passes, in points of 100")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Of the intervals of differences")
    seed: int = 0
    concurrency: int = Field(128, ge=1, description="Requests an endpoint is sent at once")
    confirm_run_unsafe_code: bool = Field(
        False, description="Whether code that a model wrote may run here, as HumanEval does"
    )

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if self.against is None and (self.against_engine or self.against_url):
            raise ValueError("against_engine and against_url need against: the other model")
        if self.against_url is not None and self.base_url is None:
            raise ValueError("against_url needs base_url: both by endpoints, or both by engines")
        if unknown := self.data.keys() - {
            task for run in runs_of(self.tasks).values() for task in run
        }:
            raise ValueError(f"data names {min(unknown)!r}, which is not among the tasks")
        return self


def evaluate(
    config: EvaluateConfig,
    executor: Executor | None = None,
    console: Console | None = None,
    *,
    api_key: str = "none",
) -> Report:
    """Evaluate, write the report and return it.

    `executor` runs the batches: None runs an engine in this process.

    Raises:
        ConfigError: a task, its data or a model's settings cannot be had, or lm-eval is missing.
        EngineError: an engine or endpoint does not answer.
        StorageError: the report cannot be written.
    """
    console = console or Console(quiet=True)
    executor = executor or InProcessExecutor()
    sides = [(config.engine, config.base_url)]
    if config.against is not None:
        other = {"served_model_name": None, **config.against_engine, "model": config.against}
        engine = validated(EngineConfig, config.engine.model_dump(exclude_unset=True), other)
        sides.append((engine, config.against_url or config.base_url))
    measured, samples, better = [], [], {}
    for engine, url in sides:
        if url is None:
            folder = join(config.output, "batches")
            answer: Answerer = BatchAnswerer(engine, folder, executor, console)
        else:
            answer = EndpointAnswerer(
                url, engine.model_name, api_key=api_key, concurrency=config.concurrency
            )
        one, theirs, directions = _measure(config, engine, answer)
        measured.append(one)
        samples.append(theirs)
        better.update(directions)
    report = Report(
        base=measured[0],
        against=measured[1] if len(measured) > 1 else None,
        comparisons=compare_samples(
            samples[0],
            samples[1],
            better,
            bound_points=config.bound_points,
            confidence=config.confidence,
            seed=config.seed,
        )
        if len(samples) > 1
        else (),
        bound_points=config.bound_points,
        confidence=config.confidence,
        settings=_settings(config),
    )
    for name, text in (
        (REPORT_JSON, report.model_dump_json(indent=2)),
        (REPORT_MARKDOWN, render(report)),
    ):
        uri = join(config.output, name)
        storage_for(uri).write(uri, text.encode())
    return report


def read_report(uri: str) -> Report:
    """Read a `report.json`.

    Raises:
        ConfigError: it is none.
        StorageError: it cannot be read.
    """
    return validated(Report, load_yaml(storage_for(uri).read(uri).decode(), uri))


def _measure(
    config: EvaluateConfig, engine: EngineConfig, answer: Answerer
) -> tuple[Measured, dict[str, dict[str, float]], dict[str, bool]]:
    """One model's scores; those of each sample; and whether higher is better."""
    try:
        from phi4ray.train import harness
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed here: evaluating needs the extra `evaluate` "
            "(pip install '.[evaluate]')"
        ) from error

    began = time.monotonic()
    model = harness.RequestModel(
        answer, _tokenizer(engine), max_model_len=_context(engine), seed=config.seed
    )
    scores: list[Score] = []
    samples: dict[str, dict[str, float]] = {}
    better: dict[str, bool] = {}
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="phi4ray-data-") as folder:
        data = {task: _local(uri, Path(folder)) for task, uri in config.data.items()}
        for way, tasks in runs_of(config.tasks).items():
            results = harness.run_tasks(
                model,
                tasks,
                way,
                data={task: data[task] for task in tasks if task in data},
                limit=config.limit,
                num_fewshot=config.num_fewshot,
                chat=config.apply_chat_template,
                seed=config.seed,
                run_code=config.confirm_run_unsafe_code,
            )
            scores += scores_of(results)
            for task in tasks:
                found, directions = samples_of(results, task)
                samples |= found
                better |= directions
                counts[task] = max(map(len, found.values()), default=0)
    one = Measured(
        model=engine.model_name,
        scores=tuple(scores),
        samples=counts,
        seconds=time.monotonic() - began,
    )
    return one, samples, better


def _tokenizer(engine: EngineConfig) -> Any:
    from transformers import AutoTokenizer

    name = engine.tokenizer or engine.model
    try:
        return AutoTokenizer.from_pretrained(
            on_this_machine(name, weights=False), revision=engine.revision
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"there is no tokenizer of {name!r}: set the engine's tokenizer to a folder or a hub "
            f"name that has it ({error})"
        ) from error


def _context(engine: EngineConfig) -> int:
    shape = shape_of(on_this_machine(engine.model, weights=False))
    if engine.max_model_len is None and shape is None:
        raise ConfigError(f"the context of {engine.model!r} is not known: set max_model_len")
    return engine.max_model_len or (shape.max_model_len if shape else 0)


def _local(uri: str, folder: Path) -> Path:
    """A file that lm-eval can open; its name tells its format."""
    if not uri.startswith("s3://"):
        return Path(uri).resolve()
    path = folder / uri.rpartition("/")[2]
    path.write_bytes(storage_for(uri).read(uri))
    return path


def _settings(config: EvaluateConfig) -> dict[str, str]:
    """What decides the figures; names of files without their places: cards are public."""
    from phi4ray.train import harness

    told = {
        "lm-eval": harness.VERSION,
        "data": ", ".join(
            f"{task} from {uri.rpartition('/')[2]}" for task, uri in config.data.items()
        )
        or "hub",
        "documents": f"first {config.limit} of each task" if config.limit else "all",
        "few-shot": "as the tasks state" if config.num_fewshot is None else str(config.num_fewshot),
        "seed": str(config.seed),
        "answered by": "an endpoint" if config.base_url else "batch engines",
    }
    for way, tasks in runs_of(config.tasks).items():
        asked = "in chats" if way.chat or config.apply_chat_template else "without a chat template"
        heat = "the task's" if way.temperature is None else str(way.temperature)
        told[", ".join(tasks)] = f"asked {asked}, temperature {heat}"
    return told
