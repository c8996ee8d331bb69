"""How fast one replica answers, by its roofline: arithmetic, and bytes read from memory.

A token multiplies every weight of the linear layers once, 2 operations each; a step reads all
weights once, and the keys and values of every token that its requests have in the cache:

    prefill = tokens * 2 * linear parameters / rate + attention / bf16 rate
    decode step of n requests = max(n * 2 * linear parameters / rate, weights / bandwidth)
                                + n * context * KV bytes a token / bandwidth
                                + n * 2 * vocabulary * hidden / bf16 rate

Attention over a prompt of n tokens takes 2 * layers * heads * head_dim * n^2 operations (half of
the full square, for it looks back alone). Rate and bandwidth are the card's, times the two
efficiencies below. Left out, for want of a measurement: communication between GPUs of one replica,
shared prefixes (prompts cost less), sampling with top_p on the GPU, and preemption.
"""

import math
from dataclasses import dataclass

from phi4ray.footprint import kv_bytes_per_token, weight_bytes
from phi4ray.gpus import Gpu
from phi4ray.models import WeightScheme
from phi4ray.shapes import ModelShape

# Both fitted, together, to five runs of phi-4's shape on one H200 with vLLM 0.25.1 (bf16, FP8, FP8
# with FP8 KV cache; 1000 x 1000, 512 x 256 and 128 x 16 tokens), which they meet within 9%; no
# other card, and no model of another size, has been measured.
COMPUTE_EFFICIENCY = 0.45
"""Share of the card's dense rate that vLLM's steps reach."""

BANDWIDTH_EFFICIENCY = 0.6
"""Share of the card's memory bandwidth that they reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One request's tokens: of its prompt, and of its answer (at least one)."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        """Both."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def resident_tokens(self) -> float:
        """Tokens in the KV cache while it decodes, on average: the prompt and half the answer."""
        return self.prompt_tokens + self.completion_tokens / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """One replica of a model: `tensor_parallel_size` GPUs that share its work evenly."""

    shape: ModelShape
    gpu: Gpu
    weights: WeightScheme = "bf16"
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int = 1

    @property
    def bf16_rate(self) -> float:
        """Operations a second of what stays bf16 in every scheme: attention and lm_head."""
        return self.gpu.bf16_tflops * 1e12 * self.tensor_parallel_size * COMPUTE_EFFICIENCY

    @property
    def linear_rate(self) -> float:
        """Operations a second of the linear layers; w4a16 multiplies in bf16."""
        tflops = {"fp8": self.gpu.fp8_tflops, "w8a8": self.gpu.int8_tops}.get(self.weights)
        return self.bf16_rate * (tflops or self.gpu.bf16_tflops) / self.gpu.bf16_tflops

    @property
    def bandwidth(self) -> float:
        """Bytes a second of each of its GPUs."""
        return self.gpu.memory_bandwidth_tbps * 1e12 * BANDWIDTH_EFFICIENCY

    def prefill_s(self, requests: int, prompt_tokens: int) -> float:
        """Seconds to read the prompts of so many requests."""
        shape = self.shape
        heads = shape.num_attention_heads * shape.head_dim
        attention = 2 * shape.num_hidden_layers * heads * prompt_tokens**2
        linear = 2 * shape.linear_parameters * prompt_tokens
        compute = linear / self.linear_rate + attention / self.bf16_rate
        return max(requests * compute, self._weights_s) + self._head_s(requests)

    def decode_step_s(self, requests: int, context_tokens: float) -> float:
        """Seconds to give each of so many requests its next token."""
        linear = requests * 2 * self.shape.linear_parameters / self.linear_rate
        token = kv_bytes_per_token(self.shape, self.kv_cache_dtype, self.tensor_parallel_size)
        cache = requests * context_tokens * token / self.bandwidth
        return max(linear, self._weights_s) + cache + self._head_s(requests)

    def wave_s(self, requests: int, work: Workload) -> float:
        """Seconds to answer so many requests that run side by side from beginning to end."""
        steps = work.completion_tokens - 1  # prefill gives the first token
        step = self.decode_step_s(requests, work.resident_tokens)
        return self.prefill_s(requests, work.prompt_tokens) + steps * step

    def job_s(self, rows: int, concurrency: int, work: Workload) -> float:
        """Seconds to answer all rows, `concurrency` at once, from the first to the last.

        Rows go in waves of that size, and what is left over in a last, smaller one, which reads
        the same weights for fewer answers. So a short job is slower, a token, than a long one.
        Rows of one length do run so; where lengths differ, waves blend and only the end tapers.
        """
        waves, rest = divmod(rows, concurrency)
        last = self.wave_s(rest, work) if rest else 0.0
        return waves * self.wave_s(concurrency, work) + last

    @property
    def _weights_s(self) -> float:
        size = weight_bytes(self.shape, self.weights, self.tensor_parallel_size)
        return size / self.bandwidth

    def _head_s(self, requests: int) -> float:
        return requests * 2 * self.shape.vocab_size * self.shape.hidden_size / self.bf16_rate


def concurrency(work: Workload, max_num_seqs: int, kv_cache_size_tokens: int) -> int:
    """Requests that run at once: vLLM's limit, or what the KV cache holds of them on average."""
    return max(1, min(max_num_seqs, math.floor(kv_cache_size_tokens / work.resident_tokens)))
