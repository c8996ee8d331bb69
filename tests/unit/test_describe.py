"""What a dry run says of memory: a plan, why there is none, or that it cannot be."""

import io
from typing import Any

import pytest
from rich.console import Console

from phi4ray.batch.describe import describe_plan, memory_lines, not_planned
from phi4ray.batch.plan import Input, Shard, Slice, make_plan
from phi4ray.config import BatchConfig, batch_config
from phi4ray.errors import ConfigError


def job(**engine: Any) -> BatchConfig:
    return batch_config({"input": ["in"], "output": "out", "engine": {"model": "phi-4"} | engine})


def described(config: BatchConfig, gpu: str | None) -> str:
    plan = make_plan(
        {}, [Input(uri="in", size=100, etag="e")],
        [Shard(index=0, slices=(Slice(file=0, row_start=0, rows=10, size=100),))],
        carried="", prompt_bytes=100, duplicate_ids=0, duplicate_example=None,
    )  # fmt: skip
    stream = io.StringIO()
    describe_plan(config, plan, Console(file=stream, width=300), gpu)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("engine", "gpu", "reason"),
    [
        ({"kind": "fake"}, "h200", "the fake engine needs none"),
        ({}, None, "the recipe names no GPU"),
        ({}, "b9000", "GPU 'b9000' is not known"),
        ({"model": "s3://bucket/checkpoint/"}, "h200", "the shape of 's3://bucket/checkpoint/'"),
        ({"quantization": "bitsandbytes"}, "h200", "quantization 'bitsandbytes'"),
        ({"engine_args": {"cpu_offload_gb": 30}}, "rtx-12", "cpu_offload_gb is set"),
    ],
)
def test_a_job_that_cannot_be_planned_is_not_refused(
    engine: dict[str, Any], gpu: str | None, reason: str
) -> None:
    assert reason in str(not_planned(job(**engine), gpu))
    said = described(job(**engine), gpu)
    assert "memory not planned: " in said
    assert reason in said
    assert "nothing was written" in said


def test_a_job_that_certainly_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it does not fit: of 10\.34 GiB a GPU"):
        described(job(), "rtx-12")
    with pytest.raises(ConfigError, match="does not divide 40 heads"):
        described(job(tensor_parallel_size=5), "h200")
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes asks for"):
        described(job(kv_cache_memory_bytes=1 << 40), "h200")


def test_a_job_that_only_estimates_rule_out_is_told_so_and_goes_on() -> None:
    lines = dict(memory_lines(job(max_num_batched_tokens=131072), "a100-40"))
    assert lines["by estimate"].startswith("it does not fit: ")
    assert "by estimate" not in dict(memory_lines(job(), "h200"))


def test_the_multimodal_model_is_planned_with_its_encoders() -> None:
    def weights(model: str) -> float:
        lines = dict(memory_lines(job(model=model), "h200"))
        return float(lines["weights (bf16)"].removesuffix(" GiB"))

    multimodal, decoder = (weights(f"microsoft/Phi-4-{n}-instruct") for n in ("multimodal", "mini"))
    assert multimodal - decoder == pytest.approx(1.68, abs=0.02)
