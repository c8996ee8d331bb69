"""What fits on a GPU, by arithmetic alone: weights, KV cache, concurrency, a rough speed.

Follows vLLM's own budget (its start log names the same parts):

    KV cache = total * gpu_memory_utilization - weights - activations - non-torch - CUDA graphs

Weights and KV blocks are exact: they come from the shape, and from how PyTorch's allocator rounds
(checked on an H200 with phi-4's shape: 27.39 GiB bf16 and 14.74 GiB FP8, both met to 0.01).
Activations are a formula of the shape. Two parts are numbers that somebody measured, and one of
them is fitted: see `NON_TORCH_BYTES` and `CUDA_GRAPH_BYTES`. All bytes are of one GPU.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from phi4ray.config import EngineConfig
from phi4ray.errors import ConfigError
from phi4ray.models import ModelShape, WeightScheme

GIB = 1 << 30
MIB = 1 << 20

NON_TORCH_BYTES = int(0.26 * GIB)
"""CUDA context and library workspaces: 0.26 GiB in a published start log of 4-bit phi-4."""

CUDA_GRAPH_BYTES = int(0.22 * GIB)
"""Fitted: what phi-4 left unexplained on an H200 with vLLM 0.25.1, max_num_batched_tokens=16384
and max_num_seqs=1024 (51 graphs): 0.21 GiB with bf16 weights, 0.24 GiB with FP8."""

TENSOR_PARALLEL_BYTES = int(1.79 * GIB)
"""More non-torch memory at 2 GPUs than at 1, as logged in vllm#10511 (2024). Not measured here."""

SAMPLER_BYTES_PER_LOGIT = 14
"""bf16 logits, fp32 logits, fp32 probabilities, fp32 noise: read from vLLM's sampler. Below the
forward pass in all H200 measurements, so those do not check it; matters for big vocabularies."""

_KV_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("auto", "bfloat16", "float16"), 2),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card. `total_gib` is what CUDA reports, below the name; the rest is the vendor's."""

    total_gib: float
    memory_bandwidth_tbps: float
    bf16_tflops: float
    fast_8bit: bool = True

    @property
    def total_bytes(self) -> int:
        """Memory as PyTorch sees it."""
        return int(self.total_gib * GIB)


# total_gib: as PyTorch's out-of-memory messages give it; the lowest of what is commonly seen, for
# it differs by up to 0.3 GiB with driver and ECC (H200: 139.72 to 139.81, most often 139.80).
# Bandwidth and dense bf16 rate: NVIDIA's datasheets of H100, H200 (SXM), A100 (SXM), L4, L40S;
# the Ada architecture whitepaper for GeForce (RTX 4070, 4080, 4090, fp32 accumulate).
GPUS: Mapping[str, Gpu] = {
    "h200": Gpu(total_gib=139.80, memory_bandwidth_tbps=4.8, bf16_tflops=989),
    "h100-80": Gpu(total_gib=79.11, memory_bandwidth_tbps=3.35, bf16_tflops=989),
    "a100-80": Gpu(total_gib=79.15, memory_bandwidth_tbps=2.039, bf16_tflops=312, fast_8bit=False),
    "a100-40": Gpu(total_gib=39.39, memory_bandwidth_tbps=1.555, bf16_tflops=312, fast_8bit=False),
    "l40s-48": Gpu(total_gib=44.34, memory_bandwidth_tbps=0.864, bf16_tflops=362),
    "l4-24": Gpu(total_gib=22.03, memory_bandwidth_tbps=0.3, bf16_tflops=121),
    "rtx-24": Gpu(total_gib=23.52, memory_bandwidth_tbps=1.008, bf16_tflops=165),
    "rtx-16": Gpu(total_gib=15.46, memory_bandwidth_tbps=0.717, bf16_tflops=97),
    "rtx-12": Gpu(total_gib=11.49, memory_bandwidth_tbps=0.504, bf16_tflops=58),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One model on GPUs of `gpu_bytes` each, under engine settings of vLLM's names.

    `request_tokens` is prompt plus answer of a typical request, for the recommendation alone.
    The four `*_bytes` at the end replace an estimate by a measurement.
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

    `max_concurrency` counts requests of full `max_model_len`. The recommendations are for
    `Placement.request_tokens`: as many requests as the cache holds whole (at most vLLM's 1,024),
    and the largest prefill step whose activations take at most a tenth of what weights leave.
    """

    total_bytes: int
    usable_bytes: int
    weight_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    cuda_graph_bytes: int
    kv_cache_bytes: int
    kv_bytes_per_token: int
    num_gpu_blocks: int
    kv_cache_size_tokens: int
    max_model_len: int
    max_concurrency: float
    recommended_max_num_seqs: int
    recommended_max_num_batched_tokens: int


def weight_bytes(shape: ModelShape, scheme: WeightScheme = "bf16", tp: int = 1) -> int:
    """Bytes of one GPU's share of the weights, as PyTorch's allocator counts them.

    A linear layer takes 2 bytes a weight (bf16); 1, and an fp32 scale for each output (fp8, w8a8);
    or half a byte, and for each group of 128 inputs a 2-byte scale and a 4-bit zero point (w4a16;
    symmetric checkpoints lack the zero points and are 0.6% smaller). Embedding and untied lm_head,
    padded to 64 rows a GPU, norms and one rotary table are bf16.
    """
    hidden, width = shape.hidden_size, shape.head_dim
    queries = shape.num_attention_heads // tp * width
    keys = _kv_heads(shape, tp) * width
    ffn = shape.intermediate_size // tp
    linears = ((queries + 2 * keys, hidden), (hidden, queries), (2 * ffn, hidden), (hidden, ffn))
    layer = sum(_allocated(n) for rows, cols in linears for n in _tensors(rows, cols, scheme))
    norms = (2 * shape.num_hidden_layers + 1) * hidden * 2
    vocabulary = math.ceil(shape.vocab_size / (64 * tp)) * 64
    tables = (1 if shape.tie_word_embeddings else 2) * _allocated(2 * vocabulary * hidden)
    rotary = int(2 * shape.max_model_len * width * shape.partial_rotary_factor)
    return shape.num_hidden_layers * layer + norms + tables + rotary


def kv_bytes_per_token(shape: ModelShape, kv_cache_dtype: str = "auto", tp: int = 1) -> int:
    """2 (key and value) * layers * this GPU's kv heads * head_dim * bytes of the dtype.

    Raises:
        ConfigError: the dtype is not known.
    """
    if kv_cache_dtype not in _KV_BYTES:
        raise ConfigError(f"kv_cache_dtype {kv_cache_dtype!r}: known are {', '.join(_KV_BYTES)}")
    heads = _kv_heads(shape, tp)
    return 2 * shape.num_hidden_layers * heads * shape.head_dim * _KV_BYTES[kv_cache_dtype]


def activation_bytes(
    shape: ModelShape, max_num_batched_tokens: int, max_num_seqs: int, tp: int = 1
) -> int:
    """Peak of vLLM's profiling run: the larger of the MLP and the sampler, in bytes.

    The MLP holds, for each token and in bf16, gate_up's output (2 * intermediate / tp), its
    activation (intermediate / tp), and hidden state and residual (2 * hidden). The sampler holds
    `SAMPLER_BYTES_PER_LOGIT` for each of max_num_seqs * vocab logits.
    """
    mlp = 2 * max_num_batched_tokens * (3 * shape.intermediate_size // tp + 2 * shape.hidden_size)
    rows = min(max_num_seqs, max_num_batched_tokens)
    return max(mlp, SAMPLER_BYTES_PER_LOGIT * rows * shape.vocab_size)


def tensor_parallel_sizes(shape: ModelShape, most: int = 8) -> tuple[int, ...]:
    """The GPU counts that vLLM can split this model over: heads must divide evenly."""
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    return tuple(
        tp
        for tp in range(1, most + 1)
        if heads % tp == 0
        and shape.intermediate_size % tp == 0
        and (kv_heads % tp == 0 or tp % kv_heads == 0)
    )


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


def plan_memory(placement: Placement) -> MemoryPlan:
    """Plan the memory of each GPU.

    Raises:
        ConfigError: the model cannot be split so, its context is shorter, or it does not fit; the
            message names the changes that would fit.
    """
    p = placement
    sizes = tensor_parallel_sizes(p.shape, max(8, p.tensor_parallel_size))
    if p.tensor_parallel_size not in sizes:
        raise ConfigError(
            f"tensor_parallel_size={p.tensor_parallel_size} does not divide "
            f"{p.shape.num_attention_heads} heads and {p.shape.num_key_value_heads} kv heads: "
            f"use one of {', '.join(map(str, sizes))}"
        )
    if p.max_model_len is not None and p.max_model_len > p.shape.max_model_len:
        raise ConfigError(
            f"max_model_len={p.max_model_len} is more than the model's {p.shape.max_model_len}"
        )
    plan = _budget(p)
    if plan.max_concurrency >= 1:
        return plan
    remedies = "; ".join(_remedies(p, plan)) or "none of the usual changes: use a larger GPU"
    raise ConfigError(
        f"it does not fit: of {plan.usable_bytes / GIB:.2f} GiB a GPU, weights take "
        f"{plan.weight_bytes / GIB:.2f}, activations {plan.activation_bytes / GIB:.2f} and the "
        f"runtime {(plan.non_torch_bytes + plan.cuda_graph_bytes) / GIB:.2f}, which leaves "
        f"{plan.kv_cache_bytes / GIB:.2f} for the KV cache, and one request of max_model_len="
        f"{plan.max_model_len} needs {plan.max_model_len * plan.kv_bytes_per_token / GIB:.2f}. "
        f"Any one of these would do: {remedies}"
    )


def _budget(p: Placement) -> MemoryPlan:
    tp, length = p.tensor_parallel_size, p.max_model_len or p.shape.max_model_len

    def or_else(measured: int | None, estimate: int) -> int:
        return estimate if measured is None else measured

    # vLLM ignores the fraction where the cache's size is given.
    share = 1.0 if p.kv_cache_memory_bytes else p.gpu_memory_utilization
    usable = math.ceil(p.gpu_bytes * share)
    extra = 2 * p.extra_parameters // tp
    weights = or_else(p.weight_bytes, weight_bytes(p.shape, p.weights, tp) + extra)
    non_torch = or_else(
        p.non_torch_bytes, NON_TORCH_BYTES + (TENSOR_PARALLEL_BYTES if tp > 1 else 0)
    )
    graphs = or_else(p.cuda_graph_bytes, 0 if p.enforce_eager else CUDA_GRAPH_BYTES)
    activations = or_else(
        p.activation_bytes,
        activation_bytes(p.shape, p.max_num_batched_tokens, p.max_num_seqs, tp),
    )
    left = usable - weights - non_torch - graphs
    kv_cache = left - activations
    if p.kv_cache_memory_bytes is not None:
        kv_cache = min(kv_cache, p.kv_cache_memory_bytes)
    token = kv_bytes_per_token(p.shape, p.kv_cache_dtype, tp)
    blocks = max(0, kv_cache) // (token * p.block_size)
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
        kv_cache_bytes=max(0, kv_cache),
        kv_bytes_per_token=token,
        num_gpu_blocks=blocks,
        kv_cache_size_tokens=tokens,
        max_model_len=length,
        max_concurrency=concurrency,
        recommended_max_num_seqs=min(1024, max(1, tokens // p.request_tokens)),
        recommended_max_num_batched_tokens=step,
    )


def _remedies(p: Placement, plan: MemoryPlan) -> Iterator[str]:
    shorter = plan.num_gpu_blocks * p.block_size
    if shorter >= 256:
        yield f"max_model_len={shorter}"
    larger = (t for t in tensor_parallel_sizes(p.shape) if t > p.tensor_parallel_size)
    changes = {
        "kv_cache_dtype='fp8'": dataclasses.replace(p, kv_cache_dtype="fp8"),
        "fp8 weights": dataclasses.replace(p, weights="fp8", weight_bytes=None),
        "4-bit weights (w4a16)": dataclasses.replace(p, weights="w4a16", weight_bytes=None),
        "gpu_memory_utilization=0.95": dataclasses.replace(p, gpu_memory_utilization=0.95),
        "max_num_batched_tokens=2048 with max_num_seqs=64": dataclasses.replace(
            p, max_num_batched_tokens=2048, max_num_seqs=64, activation_bytes=None
        ),
    } | {
        f"tensor_parallel_size={t}": dataclasses.replace(
            p, tensor_parallel_size=t, weight_bytes=None, activation_bytes=None
        )
        for t in larger
    }
    yield from (text for text, changed in changes.items() if _budget(changed).max_concurrency >= 1)


def _kv_heads(shape: ModelShape, tp: int) -> int:
    # With more GPUs than kv heads, vLLM keeps copies.
    return max(1, shape.num_key_value_heads // tp)


def _tensors(rows: int, cols: int, scheme: WeightScheme) -> tuple[int, ...]:
    weights = rows * cols
    if scheme == "bf16":
        return (2 * weights,)
    if scheme == "w4a16":
        groups = rows * math.ceil(cols / 128)
        return (weights // 2, 2 * groups, groups // 2)
    return (weights, 4 * rows)


def _allocated(size: int) -> int:
    # PyTorch takes memory for tensors of 10 MiB and more in pieces of 2 MiB, and gives what is
    # left of the last piece to nobody else if it is 1 MiB or less.
    left = -size % (2 * MIB)
    return size + left if size >= 10 * MIB and left <= MIB else size
