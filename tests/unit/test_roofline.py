"""The roofline, against measured throughput."""

import dataclasses
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.gpus import GPUS
from phi4ray.models import WeightScheme, find_model
from phi4ray.roofline import Roofline, Workload, concurrency


class Measured(NamedTuple):
    """One run of bare `LLM.generate`, vLLM 0.25.1, phi-4's shape, dummy weights, one H200."""

    prompt_tokens: int
    completion_tokens: int
    rows: int
    weights: WeightScheme
    kv_cache_dtype: str
    kv_cache_size_tokens: int
    tokens_per_s: float


MEASURED = [
    # Single runs by hand on the same kind of host; top_p 0.95 in the first two, the third greedy.
    Measured(1000, 1000, 512, "bf16", "auto", 503_360, 8_563),
    Measured(1000, 1000, 512, "fp8", "auto", 569_520, 11_047),
    Measured(512, 256, 1536, "fp8", "fp8", 1_139_056, 23_581),
    # benchmarks/RESULTS.md, "Batch overhead, one H200".
    Measured(512, 256, 2048, "fp8", "fp8", 1_139_056, 26_775),
    Measured(128, 16, 8192, "fp8", "fp8", 1_139_056, 34_814),
]


def phi4(gpu: str = "h200", weights: WeightScheme = "bf16", kv: str = "auto") -> Roofline:
    entry = find_model("phi-4")
    assert entry is not None
    return Roofline(shape=entry.shape, gpu=GPUS[gpu], weights=weights, kv_cache_dtype=kv)


@pytest.mark.parametrize("run", MEASURED, ids=lambda run: f"{run.weights}-{run.rows}")
def test_measured_jobs_are_met_within_a_quarter(run: Measured) -> None:
    work = Workload(prompt_tokens=run.prompt_tokens, completion_tokens=run.completion_tokens)
    running = concurrency(work, 1024, run.kv_cache_size_tokens)
    job_s = phi4(weights=run.weights, kv=run.kv_cache_dtype).job_s(run.rows, running, work)
    assert run.rows * work.tokens / job_s == pytest.approx(run.tokens_per_s, rel=0.25)


def test_one_request_is_bound_by_reading_the_weights() -> None:
    """14.74 GiB FP8 of an H200's 4.8 TB/s: at most 303 steps a second, and 0.6 of that here."""
    step_s = phi4(weights="fp8").decode_step_s(1, 1)
    assert 1 / step_s == pytest.approx(0.6 * 4.8e12 / (14.74 * 2**30), rel=0.02)


def test_a_long_prompt_pays_for_its_square() -> None:
    short, long = (phi4().prefill_s(1, tokens) / tokens for tokens in (4096, 16384))
    linear, square = 2 * 13.63e9, 2 * 40 * 5120
    expected = (linear + square * 16384) / (linear + square * 4096)
    assert long / short == pytest.approx(expected, rel=0.02)


def test_eight_bits_are_faster_only_where_the_card_multiplies_them() -> None:
    def prefill_s(gpu: str, weights: WeightScheme) -> float:
        return phi4(gpu, weights).prefill_s(64, 1024)

    assert prefill_s("h100-80", "fp8") < 0.6 * prefill_s("h100-80", "bf16")
    assert prefill_s("a100-80", "fp8") == prefill_s("a100-80", "bf16")
    assert prefill_s("a100-80", "w8a8") < prefill_s("a100-80", "bf16")
    assert prefill_s("h100-80", "w4a16") == prefill_s("h100-80", "bf16")


def test_two_gpus_of_a_replica_share_its_work() -> None:
    one, two = (dataclasses.replace(phi4(), tensor_parallel_size=tp) for tp in (1, 2))
    assert one.prefill_s(64, 1024) == pytest.approx(2 * two.prefill_s(64, 1024), rel=0.01)
    assert one.decode_step_s(4, 1024) == pytest.approx(2 * two.decode_step_s(4, 1024), rel=0.02)


def test_requests_at_once_are_bound_by_the_cache_and_by_the_limit() -> None:
    work = Workload(prompt_tokens=1000, completion_tokens=1000)
    assert concurrency(work, 1024, 150_000) == 100
    assert concurrency(work, 64, 150_000) == 64
    assert concurrency(work, 64, 100) == 1


def test_a_last_wave_of_few_rows_costs_more_than_its_share() -> None:
    work = Workload(prompt_tokens=512, completion_tokens=256)
    roofline = phi4(weights="fp8", kv="fp8")
    whole, over = roofline.job_s(1024, 1024, work), roofline.job_s(1025, 1024, work)
    assert over - whole > 40 * whole / 1024
    assert over == pytest.approx(whole + roofline.wave_s(1, work))


@given(
    rows=st.integers(1, 10_000), running=st.integers(1, 1024),
    prompt=st.integers(1, 4096), answer=st.integers(1, 4096),
)  # fmt: skip
def test_more_rows_never_take_less_time(rows: int, running: int, prompt: int, answer: int) -> None:
    work = Workload(prompt_tokens=prompt, completion_tokens=answer)
    roofline = phi4(weights="fp8")
    before, after = (roofline.job_s(n, running, work) for n in (rows, rows + 1))
    assert 0 < before <= after * (1 + 1e-9)
