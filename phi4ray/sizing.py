"""From a model and a card to settings, replicas, hours and cost: what `phi4ray plan` prints."""

import dataclasses
import math
from dataclasses import dataclass
from typing import get_args

from pydantic import Field

from phi4ray.config import Config, EngineConfig
from phi4ray.errors import ConfigError
from phi4ray.footprint import tensor_parallel_sizes
from phi4ray.gpus import find_gpu
from phi4ray.memory import MemoryPlan, Placement, budget, place_engine, why_not
from phi4ray.models import WeightScheme, scheme_of, weight_scheme
from phi4ray.roofline import Roofline, Workload, concurrency

ENGINE_START_S = 126.0
"""Until an engine answers, weights on local disk: the longest first start measured on an H200."""

_STEPS = ((16384, 1024), (8192, 512), (4096, 256), (2048, 64), (2048, 8))
"""max_num_batched_tokens and max_num_seqs to choose from, the best for throughput first."""


class SizingRequest(Config):
    """What to plan for; names are `EngineConfig`'s. None means: choose, or leave out."""

    model: str = Field(description="Name in the catalogue, or a folder with a config.json")
    gpu: str = Field(description="Key or alias of `phi4ray.gpus.GPUS`")
    quantization: str | None = Field(None, description="vLLM's word, or a scheme as 'w4a16'")
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = Field(None, ge=1)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    tensor_parallel_size: int | None = Field(None, ge=1)
    prompt_tokens: int = Field(512, ge=1)
    completion_tokens: int = Field(256, ge=1)
    rows: int | None = Field(None, ge=1)
    tokens_per_s: float | None = Field(None, gt=0, description="Prompt and answer tokens")
    gpu_hour_price: float | None = Field(None, ge=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """A replica's speed by its roofline, in tokens a second.

    `prefill` and `decode` are each alone: prompts only, and answers with all requests running.
    `total` counts prompt and answer tokens of a long job, `completion` its answer tokens;
    `decode_one` is what a single request sees on an idle replica.
    """

    concurrency: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_one_tokens_per_s: float
    total_tokens_per_s: float
    completion_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEstimate:
    """A batch job, engines' start included. `cost` is in the price's currency."""

    rows: int
    hours: float
    gpu_hours: float
    tokens_per_s: float
    cost: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Settings for one replica, what it then holds and does, and what the work takes.

    `problem` says why the model does not fit and what would; then there are no figures of speed.
    """

    model: str
    gpu: str
    weights: WeightScheme
    kv_cache_dtype: str
    tensor_parallel_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    memory: MemoryPlan
    problem: str | None
    throughput: Throughput | None
    replicas: int | None
    job: JobEstimate | None


def size(request: SizingRequest) -> Sizing:
    """Plan one replica, and the replicas and the job that the request asks for.

    Without `tensor_parallel_size` the fewest GPUs that fit are taken. `max_num_seqs` is what the
    KV cache holds whole of requests of the given lengths, at most 1,024. Replicas are as many as
    `tokens_per_s` needs in a long job, one without it.

    Raises:
        ConfigError: an argument is wrong or cannot be planned for; not: that it does not fit.
    """
    work = Workload(
        prompt_tokens=request.prompt_tokens, completion_tokens=request.completion_tokens
    )
    first = _place(request, work)
    sizes: tuple[int, ...] = (first.tensor_parallel_size,)
    if request.tensor_parallel_size is None:
        sizes = tensor_parallel_sizes(first.shape)
    plans = (_settle(dataclasses.replace(first, tensor_parallel_size=tp)) for tp in sizes)
    placement = next((p for p in plans if budget(p).fits), _settle(first))
    memory = budget(placement)
    if work.tokens > memory.max_model_len:
        raise ConfigError(
            f"{work.prompt_tokens} prompt and {work.completion_tokens} completion tokens are more "
            f"than the context of {memory.max_model_len}: raise it, or shorten them"
        )
    roofline = roofline_of(placement, request.gpu)
    speed = replicas = job = None
    if memory.fits:
        running = concurrency(work, placement.max_num_seqs, memory.kv_cache_size_tokens)
        speed = _throughput(roofline, running, work)
        replicas = math.ceil((request.tokens_per_s or 1) / speed.total_tokens_per_s)
        if request.rows is not None:
            job = estimate_job(
                roofline, work, placement.max_num_seqs, memory.kv_cache_size_tokens,
                rows=request.rows, replicas=replicas, gpu_hour_price=request.gpu_hour_price,
            )  # fmt: skip
    return Sizing(
        model=request.model,
        gpu=roofline.gpu.title,
        weights=placement.weights,
        kv_cache_dtype=placement.kv_cache_dtype,
        tensor_parallel_size=placement.tensor_parallel_size,
        max_num_seqs=placement.max_num_seqs,
        max_num_batched_tokens=placement.max_num_batched_tokens,
        gpu_memory_utilization=placement.gpu_memory_utilization,
        memory=memory,
        problem=None if memory.fits else why_not(placement),
        throughput=speed,
        replicas=replicas,
        job=job,
    )


def _place(request: SizingRequest, work: Workload) -> Placement:
    engine = EngineConfig(
        model=request.model,
        kv_cache_dtype=request.kv_cache_dtype,
        max_model_len=request.max_model_len,
        gpu_memory_utilization=request.gpu_memory_utilization,
        tensor_parallel_size=request.tensor_parallel_size or 1,
    )
    placement = place_engine(engine, request.gpu)
    return dataclasses.replace(placement, weights=_weights(request), request_tokens=work.tokens)


def _weights(request: SizingRequest) -> WeightScheme:
    stored = weight_scheme(request.model)
    if request.quantization is None:
        return stored
    # A scheme's own name asks what such a checkpoint would take, which vLLM could not make itself.
    named = next((s for s in get_args(WeightScheme) if s == request.quantization), None)
    asked: WeightScheme = named or scheme_of(request.quantization, {})
    if stored not in ("bf16", asked):
        raise ConfigError(
            f"{request.model} holds {stored} weights already: leave quantization out, or name the "
            "original model"
        )
    return asked


def _settle(placement: Placement) -> Placement:
    # The largest step whose activations are a tenth of what is left; then as many requests as fit.
    for tokens, seqs in _STEPS:
        tried = dataclasses.replace(
            placement, max_num_batched_tokens=tokens, max_num_seqs=seqs, activation_bytes=None
        )
        plan = budget(tried)
        if plan.fits and 10 * plan.activation_bytes <= plan.available_bytes:
            break
    return dataclasses.replace(tried, max_num_seqs=min(seqs, plan.recommended_max_num_seqs))


def _throughput(roofline: Roofline, running: int, work: Workload) -> Throughput:
    wave_s = roofline.wave_s(running, work)
    prefill_s = roofline.prefill_s(running, work.prompt_tokens)
    return Throughput(
        concurrency=running,
        prefill_tokens_per_s=running * work.prompt_tokens / prefill_s,
        decode_tokens_per_s=running / roofline.decode_step_s(running, work.resident_tokens),
        decode_one_tokens_per_s=1 / roofline.decode_step_s(1, work.resident_tokens),
        total_tokens_per_s=running * work.tokens / wave_s,
        completion_tokens_per_s=running * work.completion_tokens / wave_s,
    )


def roofline_of(placement: Placement, gpu: str) -> Roofline:
    """The roofline of a replica that is placed on such cards.

    Raises:
        ConfigError: the catalogue has no such card.
    """
    return Roofline(
        shape=placement.shape,
        gpu=find_gpu(gpu),
        weights=placement.weights,
        kv_cache_dtype=placement.kv_cache_dtype,
        tensor_parallel_size=placement.tensor_parallel_size,
    )


def estimate_job(
    roofline: Roofline,
    work: Workload,
    max_num_seqs: int,
    kv_cache_size_tokens: int,
    *,
    rows: int,
    replicas: int,
    gpu_hour_price: float | None,
) -> JobEstimate:
    """A batch job of equal rows, spread over replicas that each hold this KV cache."""
    running = concurrency(work, max_num_seqs, kv_cache_size_tokens)
    work_s = roofline.job_s(math.ceil(rows / replicas), running, work)
    hours = (ENGINE_START_S + work_s) / 3600
    gpu_hours = hours * replicas * roofline.tensor_parallel_size
    return JobEstimate(
        rows=rows,
        hours=hours,
        gpu_hours=gpu_hours,
        tokens_per_s=rows * work.tokens / work_s,
        cost=None if gpu_hour_price is None else gpu_hours * gpu_hour_price,
    )
