"""What fits on a GPU, by arithmetic alone: the KV cache that weights leave, and its concurrency.

Follows vLLM's own budget (its start log names the same parts):

    KV cache = total * gpu_memory_utilization - weights - activations - non-torch - CUDA graphs

Weights and KV blocks are exact, activations a formula of the shape (`phi4ray.footprint`). Two parts
are numbers that somebody measured, and one of them is fitted: see `NON_TORCH_BYTES` and
`CUDA_GRAPH_BYTES`. All bytes are of one GPU.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from phi4ray.config import EngineConfig
from phi4ray.errors import ConfigError
from phi4ray.footprint import (
    activation_bytes,
    kv_bytes_per_token,
    padded_vocabulary,
    tensor_parallel_sizes,
    weight_bytes,
)
from phi4ray.gpus import GIB, GPUS, Gpu, find_gpu
from phi4ray.models import WeightScheme, extra_parameters_of, shape_of, weight_scheme
from phi4ray.shapes import ModelShape

NON_TORCH_BYTES = int(0.26 * GIB)
"""CUDA context and library workspaces: 0.26 GiB in a published start log of 4-bit phi-4."""

CUDA_GRAPH_BYTES = int(0.22 * GIB)
"""Fitted: what phi-4 left unexplained on an H200 with vLLM 0.25.1, max_num_batched_tokens=16384
and max_num_seqs=1024 (51 graphs): 0.21 GiB with bf16 weights, 0.24 GiB with FP8."""

TENSOR_PARALLEL_BYTES = int(1.79 * GIB)
"""More non-torch memory at 2 GPUs than at 1, as logged in vllm#10511 (2024). Not measured here."""

MIN_CONTEXT = 256
"""No shorter context than this is worth advice."""

_NOT_PLANNED = (
    "cpu_offload_gb",
    "hf_overrides",
    "num_gpu_blocks_override",
    "pipeline_parallel_size",
    "speculative_config",
)
"""Engine arguments that change what lies on a GPU in ways that are not planned here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One model on GPUs of `gpu_bytes` each, under engine settings of vLLM's names.

    `extra_parameters` are encoders and adapters, bf16 and counted whole on each GPU (vLLM splits
    the image encoder, but not the one for speech). `request_tokens` is prompt plus answer of a
    typical request, for the recommendation alone. The four `*_bytes` at the end replace an
    estimate by a measurement.
    """

    shape: ModelShape
    gpu_bytes: int
    weights: WeightScheme = "bf16"
    extra_parameters: int = 0
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 16384
    enforce_eager: bool = False
    block_size: int = 16
    request_tokens: int = 1024
    weight_bytes: int | None = None
    activation_bytes: int | None = None
    non_torch_bytes: int | None = None
    cuda_graph_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the memory of each GPU goes, and what the KV cache then holds.

    `available_bytes` is what the other parts leave to the KV cache, below zero where they do not
    fit; `kv_cache_bytes` is that, or what `kv_cache_memory_bytes` asks for. `max_concurrency`
    counts requests of full `max_model_len`. The recommendations are for
    `Placement.request_tokens`: as many requests as the cache holds whole (at most vLLM's 1,024),
    and the largest prefill step whose activations take at most a tenth of what weights leave.
    """

    total_bytes: int
    usable_bytes: int
    weight_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    cuda_graph_bytes: int
    available_bytes: int
    kv_cache_bytes: int
    kv_bytes_per_token: int
    num_gpu_blocks: int
    kv_cache_size_tokens: int
    max_model_len: int
    max_concurrency: float
    recommended_max_num_seqs: int
    recommended_max_num_batched_tokens: int

    @property
    def fits(self) -> bool:
        """Whether the KV cache is there, and holds one request of `max_model_len`."""
        return self.kv_cache_bytes <= self.available_bytes and self.max_concurrency >= 1


def place(
    engine: EngineConfig,
    shape: ModelShape,
    gpu: Gpu,
    weights: WeightScheme = "bf16",
    extra_parameters: int = 0,
) -> Placement:
    """The placement of one engine's configuration; `weights` is `models.weight_scheme`'s answer."""
    return Placement(
        shape=shape,
        gpu_bytes=gpu.total_bytes,
        weights=weights,
        extra_parameters=extra_parameters,
        kv_cache_dtype=engine.kv_cache_dtype,
        tensor_parallel_size=engine.tensor_parallel_size,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        kv_cache_memory_bytes=engine.kv_cache_memory_bytes,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        enforce_eager=engine.enforce_eager,
    )


def place_engine(engine: EngineConfig, gpu: str) -> Placement:
    """The placement of one engine's configuration, model and card looked up.

    Raises:
        ConfigError: its memory cannot be planned, which is not to say that it does not fit; the
            message says why.
    """
    card = find_gpu(gpu)
    changed = [name for name in _NOT_PLANNED if name in engine.engine_args]
    if changed:
        raise ConfigError(f"{', '.join(changed)} is set, whose effect on memory is not known here")
    if engine.dtype in ("float32", "float"):
        raise ConfigError("dtype is float32, and only 16-bit weights are planned")
    shape = shape_of(engine.model)
    if shape is None:
        raise ConfigError(
            f"the shape of {engine.model!r} is not known here: name a model of the catalogue, or a "
            "local or s3:// folder with its config.json"
        )
    kv_bytes_per_token(shape, engine.kv_cache_dtype)  # raises where the dtype is not known
    return place(
        engine,
        shape,
        card,
        weight_scheme(engine.model, engine.quantization),
        extra_parameters_of(engine.model, bool(engine.engine_args.get("enable_lora"))),
    )


def plan_memory(placement: Placement) -> MemoryPlan:
    """Plan the memory of each GPU, and insist that it suffices.

    Raises:
        ConfigError: the model cannot be split so, its context is shorter, or it does not fit; the
            message names the changes that would fit.
    """
    plan = budget(placement)
    if not plan.fits:
        raise ConfigError(why_not(placement))
    return plan


def budget(placement: Placement) -> MemoryPlan:
    """Plan the memory of each GPU, whether it suffices (`MemoryPlan.fits`) or not.

    Raises:
        ConfigError: the model cannot be split so, or its context is shorter.
    """
    p = placement
    sizes = tensor_parallel_sizes(p.shape, max(8, p.tensor_parallel_size))
    if p.tensor_parallel_size not in sizes:
        raise ConfigError(
            f"tensor_parallel_size={p.tensor_parallel_size} does not divide "
            f"{p.shape.num_attention_heads} heads, {p.shape.num_key_value_heads} kv heads and a "
            f"vocabulary of {padded_vocabulary(p.shape)} evenly: "
            f"use one of {', '.join(map(str, sizes))}"
        )
    if p.max_model_len is not None and p.max_model_len > p.shape.max_model_len:
        raise ConfigError(
            f"max_model_len={p.max_model_len} is more than the model's {p.shape.max_model_len}"
        )
    return _budget(p)


def cannot_fit(placement: Placement) -> bool:
    """Whether weights and KV cache alone, which are exact, are too large.

    Where this is false and yet the plan does not fit, that rests on estimates.

    Raises:
        ConfigError: as `budget`.
    """
    exact = dataclasses.replace(
        placement, activation_bytes=0, non_torch_bytes=0, cuda_graph_bytes=0
    )
    return not budget(exact).fits


def why_not(placement: Placement) -> str:
    """Say where the memory of a placement that does not fit goes, and what would fit."""
    plan = _budget(placement)
    needs = (
        f"one request of max_model_len={plan.max_model_len} needs "
        f"{plan.max_model_len * plan.kv_bytes_per_token / GIB:.2f}"
    )
    if placement.kv_cache_memory_bytes is not None:
        needs = f"kv_cache_memory_bytes asks for {plan.kv_cache_bytes / GIB:.2f}, and {needs}"
    remedies = "; ".join(_remedies(placement, plan))
    advice = f"Any one of these would do: {remedies}" if remedies else "Use a smaller model"
    return (
        f"it does not fit: of {plan.usable_bytes / GIB:.2f} GiB a GPU, weights take "
        f"{plan.weight_bytes / GIB:.2f}, activations {plan.activation_bytes / GIB:.2f} and the "
        f"runtime {(plan.non_torch_bytes + plan.cuda_graph_bytes) / GIB:.2f}, which leaves "
        f"{max(0, plan.available_bytes) / GIB:.2f} for the KV cache; {needs}. {advice}"
    )


def _budget(p: Placement) -> MemoryPlan:
    tp, length = p.tensor_parallel_size, p.max_model_len or p.shape.max_model_len

    def or_else(measured: int | None, estimate: int) -> int:
        return estimate if measured is None else measured

    # vLLM ignores the fraction where the cache's size is given.
    share = 1.0 if p.kv_cache_memory_bytes else p.gpu_memory_utilization
    usable = math.ceil(p.gpu_bytes * share)
    weights = or_else(p.weight_bytes, weight_bytes(p.shape, p.weights, tp) + 2 * p.extra_parameters)
    non_torch = or_else(
        p.non_torch_bytes, NON_TORCH_BYTES + (TENSOR_PARALLEL_BYTES if tp > 1 else 0)
    )
    graphs = or_else(p.cuda_graph_bytes, 0 if p.enforce_eager else CUDA_GRAPH_BYTES)
    activations = or_else(
        p.activation_bytes,
        activation_bytes(p.shape, p.max_num_batched_tokens, p.max_num_seqs, tp),
    )
    left = usable - weights - non_torch - graphs
    available = left - activations
    kv_cache = max(0, available) if p.kv_cache_memory_bytes is None else p.kv_cache_memory_bytes
    token = kv_bytes_per_token(p.shape, p.kv_cache_dtype, tp)
    blocks = kv_cache // (token * p.block_size)
    concurrency = blocks / math.ceil(length / p.block_size)
    tokens = int(concurrency * length)
    steps = (16384, 8192, 4096)
    step = next((n for n in steps if 10 * activation_bytes(p.shape, n, 1, tp) <= left), 2048)
    return MemoryPlan(
        total_bytes=p.gpu_bytes,
        usable_bytes=usable,
        weight_bytes=weights,
        activation_bytes=activations,
        non_torch_bytes=non_torch,
        cuda_graph_bytes=graphs,
        available_bytes=available,
        kv_cache_bytes=kv_cache,
        kv_bytes_per_token=token,
        num_gpu_blocks=blocks,
        kv_cache_size_tokens=tokens,
        max_model_len=length,
        max_concurrency=concurrency,
        recommended_max_num_seqs=min(1024, max(1, tokens // p.request_tokens)),
        recommended_max_num_batched_tokens=step,
    )


def _remedies(p: Placement, plan: MemoryPlan) -> Iterator[str]:
    changes: dict[str, dict[str, Any]] = {
        "kv_cache_dtype='fp8'": {"kv_cache_dtype": "fp8"},
        "fp8 weights": {"weights": "fp8", "weight_bytes": None},
        "4-bit weights (w4a16)": {"weights": "w4a16", "weight_bytes": None},
        "gpu_memory_utilization=0.95": {"gpu_memory_utilization": 0.95},
        "max_num_batched_tokens=2048 with max_num_seqs=64": {
            "max_num_batched_tokens": 2048, "max_num_seqs": 64, "activation_bytes": None,
        },
        "no kv_cache_memory_bytes": {"kv_cache_memory_bytes": None},
    }  # fmt: skip
    small: dict[str, Any] = {"weights": "w4a16", "weight_bytes": None}
    for text, change in {"": {}, "4-bit weights (w4a16) with ": small}.items():
        shorter = _longest(dataclasses.replace(p, **change))
        if MIN_CONTEXT <= shorter < plan.max_model_len:
            changes[f"{text}max_model_len={shorter}"] = change | {"max_model_len": shorter}
    for tp in tensor_parallel_sizes(p.shape):
        if tp > p.tensor_parallel_size:
            changes[f"tensor_parallel_size={tp}"] = {
                "tensor_parallel_size": tp, "weight_bytes": None, "activation_bytes": None,
            }  # fmt: skip
    fitting = [text for text, change in changes.items() if _fits(p, change)]
    if not fitting:  # the most that settings can do without another card
        least = small | {
            "max_num_batched_tokens": 2048, "max_num_seqs": 8, "activation_bytes": None,
            "gpu_memory_utilization": 0.95, "kv_cache_memory_bytes": None,
        }  # fmt: skip
        longest = min(_longest(dataclasses.replace(p, **least)), plan.max_model_len)
        if longest >= MIN_CONTEXT:
            fitting.append(
                "4-bit weights (w4a16) with gpu_memory_utilization=0.95, max_num_batched_tokens="
                f"2048, max_num_seqs=8 and max_model_len={longest}"
            )
    larger = sorted((gpu.total_bytes, key) for key, gpu in GPUS.items())
    card = next((key for size, key in larger if _fits(p, {"gpu_bytes": size})), None)
    yield from fitting
    if card:
        yield f"a GPU of the size of {card}"


def _fits(p: Placement, change: dict[str, Any]) -> bool:
    return _budget(dataclasses.replace(p, **change)).fits


def _longest(p: Placement) -> int:
    plan = _budget(p)
    blocks = max(0, plan.available_bytes) // (plan.kv_bytes_per_token * p.block_size)
    return blocks * p.block_size
