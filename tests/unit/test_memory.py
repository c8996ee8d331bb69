"""The memory plan, against what was published and what was measured."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.config import EngineConfig
from phi4ray.errors import ConfigError
from phi4ray.footprint import (
    activation_bytes,
    kv_bytes_per_token,
    padded_vocabulary,
    tensor_parallel_sizes,
    weight_bytes,
)
from phi4ray.gpus import GIB, GPUS, find_gpu
from phi4ray.memory import Placement, budget, cannot_fit, place_engine, plan_memory, why_not
from phi4ray.models import find_model
from phi4ray.shapes import ModelShape


def shape(name: str = "phi-4") -> ModelShape:
    entry = find_model(name)
    assert entry is not None
    return entry.shape


def on(gpu: str, **settings: Any) -> Placement:
    return Placement(shape=shape(), gpu_bytes=GPUS[gpu].total_bytes, **settings)


# Figures


def test_a_published_start_log_is_reproduced() -> None:
    """79.25 GiB at 0.15: weights 8.51, non-torch 0.26, activations 0.94 → 715 blocks, 5.59x."""
    plan = plan_memory(
        Placement(
            shape=shape(),
            gpu_bytes=int(79.25 * GIB),
            gpu_memory_utilization=0.15,
            max_model_len=2048,
            weight_bytes=int(8.51 * GIB),
            non_torch_bytes=int(0.26 * GIB),
            activation_bytes=int(0.94 * GIB),
            cuda_graph_bytes=0,
        )
    )
    assert plan.num_gpu_blocks == pytest.approx(715, rel=0.01)
    assert plan.max_concurrency == pytest.approx(5.59, rel=0.01)


@pytest.mark.parametrize(
    ("scheme", "kv_cache_dtype", "measured_tokens", "measured_gib"),
    [
        ("bf16", "auto", 503_360, 27.39),
        ("fp8", "auto", 569_520, 14.74),
        ("fp8", "fp8", 1_139_056, 14.74),
    ],
)
def test_an_h200_is_predicted_within_a_percent(
    scheme: str, kv_cache_dtype: str, measured_tokens: int, measured_gib: float
) -> None:
    plan = plan_memory(on("h200", weights=scheme, kv_cache_dtype=kv_cache_dtype))
    assert plan.kv_cache_size_tokens == pytest.approx(measured_tokens, rel=0.01)
    assert plan.weight_bytes / GIB == pytest.approx(measured_gib, rel=0.01)


@pytest.mark.parametrize(
    ("batched_tokens", "measured_tokens"), [(8192, 1_145_616), (4096, 1_146_640)]
)
def test_shorter_steps_leave_more_to_the_cache_as_measured(
    batched_tokens: int, measured_tokens: int
) -> None:
    placement = on(
        "h200", weights="fp8", kv_cache_dtype="fp8", max_num_batched_tokens=batched_tokens
    )
    assert plan_memory(placement).kv_cache_size_tokens == pytest.approx(measured_tokens, rel=0.002)


def test_a_token_of_phi_4_takes_200_kib() -> None:
    assert kv_bytes_per_token(shape()) == 2 * 40 * 10 * 128 * 2 == 204_800
    assert kv_bytes_per_token(shape(), "fp8") == 102_400
    assert kv_bytes_per_token(shape("Phi-4-mini-instruct")) == 2 * 32 * 8 * 128 * 2


utilizations = st.floats(0.5, 1.0)


@given(low=utilizations, high=utilizations)
def test_more_memory_never_holds_fewer_tokens(low: float, high: float) -> None:
    low, high = sorted((low, high))

    def tokens(share: float) -> int:
        return plan_memory(on("h200", gpu_memory_utilization=share)).kv_cache_size_tokens

    assert tokens(low) <= tokens(high)


@given(tokens=st.integers(1, 65536), seqs=st.integers(1, 4096))
def test_activations_grow_with_the_step(tokens: int, seqs: int) -> None:
    assert activation_bytes(shape(), tokens, seqs) <= activation_bytes(shape(), tokens + 1, seqs)
    assert activation_bytes(shape(), tokens, seqs, 2) <= activation_bytes(shape(), tokens, seqs)


def test_schemes_order_as_their_bits() -> None:
    bf16, fp8, four = (weight_bytes(shape(), scheme) for scheme in ("bf16", "fp8", "w4a16"))
    assert bf16 > fp8 > four
    assert weight_bytes(shape(), "bf16", 2) == pytest.approx(bf16 / 2, rel=0.02)


# Several GPUs


def test_a_model_splits_over_what_divides_heads_kv_heads_and_padded_vocabulary() -> None:
    assert tensor_parallel_sizes(shape()) == (1, 2)
    assert tensor_parallel_sizes(shape("Phi-4-mini-instruct")) == (1, 2, 4, 8)


def test_five_gpus_divide_the_heads_of_phi_4_and_not_its_vocabulary() -> None:
    assert (40 % 5, 10 % 5, 17920 % 5) == (0, 0, 0)
    assert padded_vocabulary(shape()) % 5 == 2
    assert 5 in tensor_parallel_sizes(dataclasses.replace(shape(), vocab_size=100_480))


def test_more_gpus_than_kv_heads_keep_copies_of_them() -> None:
    mini = dataclasses.replace(shape("Phi-4-mini-instruct"), num_attention_heads=32)
    assert 16 in tensor_parallel_sizes(mini, most=16)
    assert kv_bytes_per_token(mini, tp=16) == kv_bytes_per_token(mini, tp=8)


# What cannot be


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(ConfigError, match=r"it does not fit: .*4-bit weights") as refused:
        plan_memory(on("rtx-24"))
    assert "tensor_parallel_size=2" in str(refused.value)
    assert "a GPU of the size of a100-40" in str(refused.value)


def test_every_advice_fits() -> None:
    placement = on("rtx-12", gpu_memory_utilization=0.9, max_num_batched_tokens=2048)
    placement = dataclasses.replace(placement, max_num_seqs=8)
    advised = why_not(placement).partition("Any one of these would do: ")[2]
    context = int(advised.partition("4-bit weights (w4a16) with max_model_len=")[2].split(";")[0])
    smaller = dataclasses.replace(placement, weights="w4a16", max_model_len=context)
    assert budget(smaller).fits
    assert not budget(dataclasses.replace(smaller, max_model_len=context + 16)).fits


def test_a_kv_cache_larger_than_what_is_left_does_not_fit() -> None:
    too_large = on("h200", kv_cache_memory_bytes=120 * GIB)
    assert not budget(too_large).fits
    with pytest.raises(ConfigError, match=r"kv_cache_memory_bytes asks for 120\.00") as refused:
        plan_memory(too_large)
    assert "no kv_cache_memory_bytes" in str(refused.value)
    assert plan_memory(on("h200", kv_cache_memory_bytes=64 * GIB)).kv_cache_bytes == 64 * GIB


def test_only_weights_and_cache_are_certain() -> None:
    assert cannot_fit(on("rtx-24"))
    # 39.39 * 0.9 - 27.39 leaves 8.06: enough for 16K of cache, and not beside these activations.
    near = on("a100-40", max_num_batched_tokens=131072)
    assert not budget(near).fits
    assert not cannot_fit(near)


def test_what_the_model_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide 40 heads, 10 kv heads and a vocabulary"):
        plan_memory(on("h200", tensor_parallel_size=5))
    with pytest.raises(ConfigError, match="more than the model's 16384"):
        plan_memory(on("h200", max_model_len=32768))
    with pytest.raises(ConfigError, match="kv_cache_dtype 'int3'"):
        kv_bytes_per_token(shape(), "int3")


# From an engine's configuration


def test_the_encoders_of_the_multimodal_model_count_and_its_adapters_where_they_are_loaded() -> (
    None
):
    def weights(**settings: Any) -> float:
        placement = place_engine(EngineConfig(**settings), "h200")
        return budget(placement).weight_bytes / GIB

    mini = weights(model="microsoft/Phi-4-mini-instruct")
    multimodal = weights(model="microsoft/Phi-4-multimodal-instruct")
    adapted = weights(
        model="microsoft/Phi-4-multimodal-instruct", engine_args={"enable_lora": True}
    )
    assert multimodal - mini == pytest.approx(2 * 0.90e9 / GIB, rel=0.01)
    # 738 and 923 MB on the hub.
    assert adapted - multimodal == pytest.approx((0.738e9 + 0.923e9) / GIB, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": "someone/a-model"}, "shape of 'someone/a-model' is not known"),
        ({"model": "phi-4", "quantization": "bitsandbytes"}, "quantization 'bitsandbytes'"),
        ({"model": "phi-4", "kv_cache_dtype": "int3"}, "kv_cache_dtype 'int3': known are auto"),
        ({"model": "phi-4", "dtype": "float32"}, "only 16-bit weights"),
        ({"model": "phi-4", "engine_args": {"cpu_offload_gb": 8}}, "cpu_offload_gb is set"),
    ],
)
def test_what_cannot_be_planned_says_why(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        place_engine(EngineConfig(**settings), "h200")


def test_gpus_are_found_by_common_names() -> None:
    assert find_gpu("H100") is find_gpu("h100-sxm") is GPUS["h100-80"]
    assert find_gpu("RTX 4090") is GPUS["rtx-24"]
    with pytest.raises(ConfigError, match="GPU 'b9000' is not known: use one of h200"):
        find_gpu("b9000")
