"""lm-eval over our replicas and endpoints: the same figures either way, and those of the model."""

import asyncio
import json
import math
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from rich.console import Console

from phi4ray.batch.executor import InProcessExecutor
from phi4ray.batch.rows import Request
from phi4ray.config import EngineConfig
from phi4ray.errors import ConfigError, EngineError
from phi4ray.fake import FakeReplica
from phi4ray.train.answering import BatchAnswerer, EndpointAnswerer
from phi4ray.train.evaluate import EvaluateConfig, Report, evaluate, read_report
from phi4ray.train.tiny import make_tiny_model
from tests.tiny_engines import tiny_engine

pytestmark = pytest.mark.slow

DOCUMENTS = 24


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files with the columns of the hub's data sets."""
    folder, numbers = tmp_path_factory.mktemp("data"), random.Random(0)
    sums = [(numbers.randint(1, 50), numbers.randint(1, 50)) for _ in range(DOCUMENTS)]
    rows: dict[str, list[dict[str, Any]]] = {
        "gsm8k": [
            {"question": f"Ann has {a} pens and buys {b}.", "answer": f"{a}+{b}\n#### {a + b}"}
            for a, b in sums
        ],
        "mmlu": [
            {
                "question": f"What is {a} + {b}?",
                "choices": [str(a), str(a + b), str(b), str(a - b)],
                "answer": 1,
                "subject": "sums",
            }
            for a, b in sums
        ],
    }
    for task, lines in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return {task: str(folder / f"{task}.jsonl") for task in rows}


def engine(model: Path) -> EngineConfig:
    return tiny_engine(model, max_num_seqs=32)


def fake(tokenizer: Path, name: str = "phi-4") -> EngineConfig:
    return EngineConfig(kind="fake", model=name, tokenizer=str(tokenizer), max_model_len=4096)


@pytest.fixture(scope="module")
def by_batches(
    tiny: Path, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Report:
    config = EvaluateConfig(
        engine=engine(tiny),
        tasks=("gsm8k", "mmlu"),
        data=data,
        num_fewshot=2,
        output=str(tmp_path_factory.mktemp("evaluation")),
    )
    report = evaluate(config)
    assert read_report(f"{config.output}/report.json") == report
    text = Path(config.output, "report.md").read_text()
    assert "|Tasks|Version|" in text
    assert "lm-eval: " in text
    return report


@pytest.mark.engine
def test_a_generating_and_a_choosing_task_are_scored_from_local_files(by_batches: Report) -> None:
    found = {(score.task, score.filter, score.metric): score for score in by_batches.base.scores}
    assert set(found) == {
        ("gsm8k", "flexible-extract", "exact_match"),
        ("gsm8k", "strict-match", "exact_match"),
        ("mmlu", "none", "acc"),
    }
    assert by_batches.base.samples == {"gsm8k": DOCUMENTS, "mmlu": DOCUMENTS}
    score = found["mmlu", "none", "acc"]
    assert score.n_shot == "2"
    assert score.value is not None
    assert 0 <= score.value <= 1


@pytest.mark.engine
def test_log_probabilities_are_the_models(tiny: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from phi4ray.train.harness import RequestModel

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = engine(tiny).model_copy(update={"dtype": "float32"})
    answer = BatchAnswerer(config, str(tmp_path), InProcessExecutor(), quiet())
    asked = RequestModel(answer, tokenizer, max_model_len=1024, seed=0)

    def of_model(context: Sequence[int], scored: Sequence[int]) -> tuple[float, bool]:
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *scored]])).logits[0]
        steps = logits[len(context) - 1 : -1].log_softmax(-1)
        total = sum(float(step[token]) for step, token in zip(steps, scored, strict=True))
        return total, all(int(s.argmax()) == t for s, t in zip(steps, scored, strict=True))

    contexts = [tokenizer.encode(text) for text in ("Once upon a time", "The capital of France")]
    with torch.no_grad():
        best = [int(model(torch.tensor([ids])).logits[0, -1].argmax()) for ids in contexts]
    pairs = [(ids, [likely]) for ids, likely in zip(contexts, best, strict=True)]
    pairs += [(contexts[0], [17]), (contexts[0], [17, 300, 5]), (contexts[1], [40, 41])]
    found = asked._loglikelihood_tokens([(None, *pair) for pair in pairs])
    for (context, scored), (total, greedy) in zip(pairs, found, strict=True):
        expected = of_model(context, scored)
        assert total == pytest.approx(expected[0], abs=0.02)
        assert greedy == expected[1]
    assert [greedy for _, greedy in found[:2]] == [True, True]


def quiet() -> Console:
    return Console(quiet=True)


@contextmanager
def serving(config: EngineConfig) -> Iterator[str]:
    """A fake's OpenAI application behind a real HTTP server; its base_url."""
    replica = FakeReplica(config)
    asyncio.run(replica.start())
    server = uvicorn.Server(uvicorn.Config(replica.app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture
def endpoint(tiny: Path) -> Iterator[str]:
    with serving(fake(tiny)) as url:
        yield url


def test_an_endpoint_that_fails_is_asked_again(tiny: Path) -> None:
    requests = [Request("/v1/completions", {"prompt": str(i), "max_tokens": 8}) for i in range(5)]
    flaky = fake(tiny).model_copy(update={"engine_args": {"fail_times": 1}})
    with serving(flaky) as url:
        answer = EndpointAnswerer(url, "phi-4", concurrency=2)
        found = answer(requests, lambda at, body: (at, body["choices"][0]["text"]))
    assert [at for at, _ in found] == [0, 1, 2, 3, 4]
    assert len({text for _, text in found}) == 5


def test_a_request_that_an_endpoint_or_a_batch_refuses_ends_the_evaluation(
    tiny: Path, endpoint: str, tmp_path: Path
) -> None:
    requests = [Request("/v1/completions", {"prompt": "a", "max_tokens": n}) for n in (1, -1)]
    answerers = (
        EndpointAnswerer(endpoint, "phi-4"),
        BatchAnswerer(fake(tiny), str(tmp_path), InProcessExecutor(), quiet()),
    )
    for answer in answerers:
        with pytest.raises(EngineError, match="max_tokens must be a positive integer"):
            answer(requests, lambda _, body: body)


def gsm8k(tiny: Path, files: dict[str, str], output: Path, **changed: Any) -> EvaluateConfig:
    values = {
        "engine": fake(tiny),
        "tasks": ("gsm8k",),
        "data": {"gsm8k": files["gsm8k"]},
        "num_fewshot": 1,
        "output": str(output),
    }
    return EvaluateConfig(**values | changed)


def test_an_endpoint_gives_what_batches_give(
    tiny: Path, data: dict[str, str], endpoint: str, tmp_path: Path
) -> None:
    online = evaluate(gsm8k(tiny, data, tmp_path / "online", base_url=endpoint))
    batch = evaluate(gsm8k(tiny, data, tmp_path / "batch"))
    assert online.base.scores == batch.base.scores
    assert online.base.samples == {"gsm8k": DOCUMENTS}
    assert online.settings["answered by"] == "an endpoint"
    assert online.settings["gsm8k"] == "asked without a chat template, temperature the task's"
    assert online.settings["data"] == "gsm8k from gsm8k.jsonl"
    assert online.against is None
    assert online.verdict is None


def test_only_the_first_documents_are_asked_with_a_limit(
    tiny: Path, data: dict[str, str], tmp_path: Path
) -> None:
    report = evaluate(gsm8k(tiny, data, tmp_path, limit=5, against="other"))
    assert report.base.samples == {"gsm8k": 5}
    assert {comparison.samples for comparison in report.comparisons} == {5}
    assert report.against is not None
    assert report.against.model == "other"


def test_a_second_run_takes_the_answers_of_the_first(
    tiny: Path, data: dict[str, str], tmp_path: Path
) -> None:
    first = evaluate(gsm8k(tiny, data, tmp_path))
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("part-*")}
    assert parts
    again = evaluate(gsm8k(tiny, data, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("part-*")} == parts
    assert again.base.scores == first.base.scores


def test_a_model_does_not_differ_from_itself_and_so_few_samples_prove_nothing(
    tiny: Path, data: dict[str, str], tmp_path: Path
) -> None:
    report = evaluate(gsm8k(tiny, data, tmp_path, against="phi-4"))
    for comparison in report.comparisons:
        assert comparison.samples == DOCUMENTS
        assert comparison.p_value > 0.05
        assert comparison.low < 0 < comparison.high
    assert report.verdict == "undecided"


def test_intervals_are_finite(tiny: Path, data: dict[str, str], tmp_path: Path) -> None:
    report = evaluate(gsm8k(tiny, data, tmp_path, against="other"))
    assert all(map(math.isfinite, (c for one in report.comparisons for c in (one.low, one.high))))


def test_every_named_task_is_one_of_lm_evals() -> None:
    from phi4ray.train.harness import task_manager
    from phi4ray.train.tasks import FILE_BASES, TASK_SETS

    known = task_manager().task_index
    for found in TASK_SETS.values():
        assert set(found.tasks) <= known.keys()
    for task, member in FILE_BASES.items():
        assert task in known
        assert known[member].yaml_path is not None


def test_a_task_that_lm_eval_lacks_and_data_for_a_program_are_refused(
    tiny: Path, data: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="lm-eval has no task 'gsm9k'"):
        evaluate(gsm8k(tiny, data, tmp_path, tasks=("gsm9k",), data={}))
    tags = {"tasks": ("mgsm_direct",), "data": {"mgsm_direct": data["gsm8k"]}}
    with pytest.raises(ConfigError, match="is no single task"):
        evaluate(gsm8k(tiny, data, tmp_path, **tags))
