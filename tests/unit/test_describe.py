"""What a dry run says of memory, hours and cost, or why it cannot say it."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phi4ray.batch.describe import describe_plan, fit_on, job_lines, memory_lines
from phi4ray.batch.plan import Input, Plan, Shard, Slice, make_plan
from phi4ray.config import BatchConfig, batch_config
from phi4ray.errors import ConfigError
from phi4ray.storage import join, storage_for
from phi4ray.train.tiny import make_dummy_model


def job(settings: dict[str, Any] | None = None, **engine: Any) -> BatchConfig:
    layer = {"input": ["in"], "output": "out", "engine": {"model": "phi-4"} | engine}
    return batch_config(layer, settings or {})


def planned(rows: int = 10, row_bytes: int = 10) -> Plan:
    piece = Slice(file=0, row_start=0, rows=rows, size=rows * row_bytes)
    return make_plan(
        {}, [Input(uri="in", size=piece.size, etag="e")], [Shard(index=0, slices=(piece,))],
        carried="", prompt_bytes=piece.size, duplicate_ids=0, duplicate_example=None,
    )  # fmt: skip


def memory(config: BatchConfig, card: str = "h200") -> dict[str, str]:
    return dict(memory_lines(fit_on(config.engine, card)))


def estimate(config: BatchConfig, plan: Plan, card: str = "h200") -> dict[str, str]:
    return dict(job_lines(config, plan, fit_on(config.engine, card)))


def described(config: BatchConfig, *cards: str) -> str:
    stream = io.StringIO()
    describe_plan(config, planned(), Console(file=stream, width=300), cards)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("engine", "card", "reason"),
    [
        ({"kind": "fake"}, "h200", "the fake engine needs none"),
        ({"num_gpus": 0}, "h200", "its replicas take no GPU"),
        ({}, None, "no GPU is known: name one with --gpu"),
        ({}, "b9000", "GPU 'b9000' is not known"),
        ({"model": "someone/a-model"}, "h200", "the shape of 'someone/a-model' is not known"),
        ({"quantization": "bitsandbytes"}, "h200", "quantization 'bitsandbytes'"),
        ({"engine_args": {"cpu_offload_gb": 30}}, "rtx-12", "cpu_offload_gb is set"),
    ],
)
def test_a_job_that_cannot_be_planned_is_told_why(
    engine: dict[str, Any], card: str | None, reason: str
) -> None:
    said = described(job(**engine), *([card] if card else []))
    assert "memory not planned: " in said
    assert reason in said
    assert "nothing was written" in said


@pytest.mark.slow
def test_a_model_in_the_object_store_is_planned_by_its_own_config(
    s3_prefix: str, tmp_path: Path
) -> None:
    make_dummy_model(tmp_path / "model", "microsoft/phi-4")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    uri = join(s3_prefix, "config.json")
    with pytest.raises(ConfigError, match="is not known here"):
        memory(job(model=s3_prefix))
    storage_for(uri).write(uri, json.dumps(config).encode())
    assert memory(job(model=s3_prefix)) == memory(job())


def test_memory_is_shown_for_every_kind_of_card() -> None:
    said = described(job(), "h200", "l4-24")
    assert "memory of one GPU (h200)" in said
    assert "memory of one GPU (l4-24)" in said
    assert "by estimate" in said  # on the smaller one
    assert re.search(r"weights \(bf16\) +│ 27\.\d\d GiB", said)


def test_a_lack_that_rests_on_estimates_is_told() -> None:
    lines = memory(job(max_num_batched_tokens=131072), "a100-40")
    assert lines["by estimate"].startswith("it does not fit: ")
    assert "by estimate" not in memory(job())


def test_the_multimodal_model_is_planned_with_its_encoders() -> None:
    def weights(model: str) -> float:
        lines = memory(job(model=model))
        return float(lines["weights (bf16)"].removesuffix(" GiB"))

    multimodal, decoder = (weights(f"microsoft/Phi-4-{n}-instruct") for n in ("multimodal", "mini"))
    assert multimodal - decoder == pytest.approx(1.68, abs=0.02)


def hours(config: BatchConfig, plan: Plan, name: str = "hours") -> list[float]:
    said = estimate(config, plan)[name]
    return [float(figure.replace(",", "")) for figure in re.findall(r"[\d,.]+\d", said)]


def test_hours_reach_from_short_answers_to_the_longest_that_the_job_allows() -> None:
    plan = planned(rows=1_000_000, row_bytes=2000)
    least, most = hours(job({"sampling": {"max_tokens": 250}}), plan)
    assert 0 < least < most
    # 500 and 250 tokens a row, at the 26,700 tok/s that were measured (benchmarks/RESULTS.md)
    fp8 = job({"sampling": {"max_tokens": 250}}, quantization="fp8", kv_cache_dtype="fp8")
    assert hours(fp8, plan)[1] == pytest.approx(750e6 / 26_700 / 3600, rel=0.1)


def test_without_a_limit_only_the_least_is_known() -> None:
    lines = estimate(job(), planned())
    assert lines["hours"].endswith(" and more")
    assert "set max_tokens" in lines["tokens of an answer"]


def test_more_replicas_take_less_time_and_a_price_makes_a_cost() -> None:
    plan = planned(rows=1_000_000, row_bytes=2000)
    settings = {"sampling": {"max_tokens": 100}}
    one = hours(job(settings), plan)[1]
    config = job({**settings, "max_replicas": 4, "gpu_hour_price": 2.5})
    assert hours(config, plan)[1] == pytest.approx(one / 4, rel=0.02)
    gpu_hours, cost = hours(config, plan, "GPU hours")[1], hours(config, plan, "cost")[1]
    assert cost == pytest.approx(2.5 * gpu_hours, rel=0.01)
    assert "cost" not in estimate(job(settings), plan)


def test_answers_are_never_longer_than_the_context_leaves_room_for() -> None:
    config = job({"sampling": {"max_tokens": 9000}}, max_model_len=1000)
    lines = estimate(config, planned(row_bytes=2400))
    assert lines["tokens of an answer"] == "1 to 400"


def test_no_rows_and_no_room_have_no_estimate() -> None:
    assert estimate(job(), planned(rows=0)) == {"not estimated": "there are no rows"}
    assert estimate(job(), planned(), "l4-24") == {"not estimated": "it does not fit"}
