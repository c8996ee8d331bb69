"""The memory plan, against what was published and what was measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.errors import ConfigError
from phi4ray.memory import (
    GIB,
    GPUS,
    Placement,
    activation_bytes,
    kv_bytes_per_token,
    plan_memory,
    tensor_parallel_sizes,
    weight_bytes,
)
from phi4ray.models import ModelShape, find_model


def shape(name: str = "phi-4") -> ModelShape:
    entry = find_model(name)
    assert entry is not None
    return entry.shape


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
    plan = plan_memory(
        Placement(
            shape=shape(),
            gpu_bytes=GPUS["h200"].total_bytes,
            weights=scheme,  # type: ignore[arg-type]
            kv_cache_dtype=kv_cache_dtype,
        )
    )
    assert plan.kv_cache_size_tokens == pytest.approx(measured_tokens, rel=0.01)
    assert plan.weight_bytes / GIB == pytest.approx(measured_gib, rel=0.01)


def test_a_token_of_phi_4_takes_200_kib() -> None:
    assert kv_bytes_per_token(shape()) == 2 * 40 * 10 * 128 * 2 == 204_800
    assert kv_bytes_per_token(shape(), "fp8") == 102_400
    assert kv_bytes_per_token(shape("Phi-4-mini-instruct")) == 2 * 32 * 8 * 128 * 2


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(ConfigError, match=r"it does not fit: .*4-bit weights") as refused:
        plan_memory(Placement(shape=shape(), gpu_bytes=GPUS["rtx-24"].total_bytes))
    assert "tensor_parallel_size=2" in str(refused.value)


def test_what_the_model_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide 40 heads"):
        plan_memory(
            Placement(shape=shape(), gpu_bytes=GPUS["h200"].total_bytes, tensor_parallel_size=3)
        )
    with pytest.raises(ConfigError, match="more than the model's 16384"):
        plan_memory(
            Placement(shape=shape(), gpu_bytes=GPUS["h200"].total_bytes, max_model_len=32768)
        )
    with pytest.raises(ConfigError, match="kv_cache_dtype 'int3'"):
        kv_bytes_per_token(shape(), "int3")


def test_phi_4_splits_over_what_divides_its_heads() -> None:
    assert tensor_parallel_sizes(shape()) == (1, 2, 5)


utilizations = st.floats(0.5, 1.0)


@given(low=utilizations, high=utilizations)
def test_more_memory_never_holds_fewer_tokens(low: float, high: float) -> None:
    low, high = sorted((low, high))

    def tokens(share: float) -> int:
        placement = Placement(
            shape=shape(), gpu_bytes=GPUS["h200"].total_bytes, gpu_memory_utilization=share
        )
        return plan_memory(placement).kv_cache_size_tokens

    assert tokens(low) <= tokens(high)


@given(tokens=st.integers(1, 65536), seqs=st.integers(1, 4096))
def test_activations_grow_with_the_step(tokens: int, seqs: int) -> None:
    assert activation_bytes(shape(), tokens, seqs) <= activation_bytes(shape(), tokens + 1, seqs)
    assert activation_bytes(shape(), tokens, seqs, 2) <= activation_bytes(shape(), tokens, seqs)


def test_schemes_order_as_their_bits() -> None:
    bf16, fp8, four = (weight_bytes(shape(), scheme) for scheme in ("bf16", "fp8", "w4a16"))
    assert bf16 > fp8 > four
    assert weight_bytes(shape(), "bf16", 2) == pytest.approx(bf16 / 2, rel=0.02)
