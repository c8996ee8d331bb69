"""What a model takes of each GPU, in bytes: formulas of its shape.

Weights and KV cache are exact: they come from the shape, and from how PyTorch's allocator rounds
(checked on an H200 with phi-4's shape: 27.39 GiB bf16 and 14.74 GiB FP8, both met to 0.01).
"""

import math
from collections.abc import Mapping

from phi4ray.errors import ConfigError
from phi4ray.models import WeightScheme
from phi4ray.shapes import ModelShape

MIB = 1 << 20

SAMPLER_BYTES_PER_LOGIT = 14
"""bf16 logits, fp32 logits, fp32 probabilities, fp32 noise: read from vLLM's sampler. Below the
forward pass in all H200 measurements, so those do not check it; matters for big vocabularies."""

VOCABULARY_PADDING = 64
"""vLLM pads the vocabulary to this many rows, and then divides it by the GPUs without a rest."""

_KV_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("auto", "bfloat16", "float16"), 2),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), 1),
}


def weight_bytes(shape: ModelShape, scheme: WeightScheme = "bf16", tp: int = 1) -> int:
    """Bytes of one GPU's share of the weights, as PyTorch's allocator counts them.

    A linear layer takes 2 bytes a weight (bf16); 1, and an fp32 scale for each output (fp8, w8a8);
    or half a byte, and for each group of 128 inputs a 2-byte scale and a 4-bit zero point (w4a16;
    symmetric checkpoints lack the zero points and are 0.6% smaller). Embedding and untied lm_head
    (rows padded to 64), norms and one rotary table are bf16.
    """
    hidden, width = shape.hidden_size, shape.head_dim
    queries = shape.num_attention_heads // tp * width
    keys = _kv_heads(shape, tp) * width
    ffn = shape.intermediate_size // tp
    linears = ((queries + 2 * keys, hidden), (hidden, queries), (2 * ffn, hidden), (hidden, ffn))
    layer = sum(_allocated(n) for rows, cols in linears for n in _tensors(rows, cols, scheme))
    norms = (2 * shape.num_hidden_layers + 1) * hidden * 2
    rows = padded_vocabulary(shape) // tp
    tables = (1 if shape.tie_word_embeddings else 2) * _allocated(2 * rows * hidden)
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


def padded_vocabulary(shape: ModelShape) -> int:
    """Rows of the embedding on all GPUs together."""
    return math.ceil(shape.vocab_size / VOCABULARY_PADDING) * VOCABULARY_PADDING


def tensor_parallel_sizes(shape: ModelShape, most: int = 8) -> tuple[int, ...]:
    """The GPU counts that vLLM can split this model over.

    Heads, the MLP's width and the padded vocabulary must divide evenly; kv heads too, or the GPUs
    by them where those are more, for then vLLM keeps copies (its `LlamaAttention` and
    `VocabParallelEmbedding` assert so). phi-4's vocabulary rules out 5, which its heads allow.
    """
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    return tuple(
        tp
        for tp in range(1, most + 1)
        if heads % tp == 0
        and shape.intermediate_size % tp == 0
        and padded_vocabulary(shape) % tp == 0
        and (kv_heads % tp == 0 or tp % kv_heads == 0)
    )


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
