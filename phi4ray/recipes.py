"""Complete configurations for Phi-4 on common hardware, by name.

A recipe is the lowest layer of a job's configuration: a config file and flags win over any part.
`tests/unit/test_recipes.py` holds that each fits its card by `phi4ray.memory`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import Field

from phi4ray.config import Config
from phi4ray.errors import ConfigError


class Recipe(Config):
    """Settings in the layout of `phi4ray.config.BatchConfig`; `gpu` is a key of `memory.GPUS`."""

    name: str
    description: str
    gpu: str | None
    settings: Mapping[str, Any]
    autoscaling: Mapping[str, Any] = Field(default_factory=dict)
    """What is known of its speed, for `phi4ray.serve.autoscaling.AutoscalingPolicyConfig`."""
    harvest: Mapping[str, Any] = Field(default_factory=dict)
    """And of its steps, for `phi4ray.serve.slack.HarvestConfig`."""


# Phi-4's own advice for reasoning-free use is to sample little; its answers to exams were taken at
# 0.5 (simple-evals). Jobs that want them the same each time ask for 0.
_PHI4_SAMPLING = {"temperature": 0.0, "max_tokens": 1024}

# On the CPU vLLM runs its model in one more process, which takes as long to import vLLM as all the
# others. One model on one thread needs none: it starts a third sooner, and leaves no shared memory
# behind. More threads than one wait for each other where the cores have other work to do.
_ONE_PROCESS = {"distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"}

# With vLLM's own graphs (up to 512 tokens, those with prompts in pieces) a step with one prompt
# beside 224 sequences takes 39 ms, with these 27 (benchmarks/RESULTS.md): the CPU starts kernels
# slower than the card ends them.
_GRAPHS_OF_WHOLE_STEPS = {
    "cudagraph_mode": "FULL",
    "cudagraph_capture_sizes": [
        1, 2, 4, 8, *range(16, 512, 16), *range(512, 1024, 32), *range(1024, 2048, 64),
        *range(2048, 4097, 128),
    ],
}  # fmt: skip

_RECIPES = (
    Recipe(
        name="phi4-fp8-h200",
        description="Phi-4 on one H200 each, FP8 weights (quantized while loading) and FP8 KV "
        "cache: 1.1 million tokens of KV, the most throughput. Full 16K context.",
        gpu="h200",
        settings={
            "engine": {
                "model": "microsoft/phi-4",
                "dtype": "bfloat16",
                "quantization": "fp8",
                "kv_cache_dtype": "fp8",
                "max_model_len": 16384,
                "gpu_memory_utilization": 0.9,
                "max_num_seqs": 1024,
                # As many tokens a second as with 16,384, and a request that comes to a replica
                # full of batch rows waits for steps a quarter as long (benchmarks/RESULTS.md).
                "max_num_batched_tokens": 4096,
                "compilation_config": _GRAPHS_OF_WHOLE_STEPS,
            },
            "sampling": _PHI4_SAMPLING,
        },
        # Measured (benchmarks/RESULTS.md), for prompts of 500 tokens with answers of 250: a token
        # takes 5 ms alone, and 41 ms when eight times slower; a replica starts in 100 s.
        autoscaling={
            "half_speed_tokens": 34_000.0,
            "target_slowdown": 8.0,
            "lookahead_s": 100.0,
            "downscale_delay_s": 90.0,
        },
        # What online requests have at p99 where they alone fill the card is 48 ms. By simulation:
        # with 50 ms and 3,072, as measured, first tokens came late (benchmarks/RESULTS.md).
        harvest={"target_tpot_ms": 46.0, "prefill_tokens": 2560},
    ),
    Recipe(
        name="phi4-bf16-h200",
        description="Phi-4 on one H200 each, as published: bf16 weights and KV cache, for when "
        "every digit counts. Full 16K context.",
        gpu="h200",
        settings={
            "engine": {
                "model": "microsoft/phi-4",
                "dtype": "bfloat16",
                "max_model_len": 16384,
                "gpu_memory_utilization": 0.9,
                "max_num_seqs": 1024,
                "max_num_batched_tokens": 16384,
            },
            "sampling": _PHI4_SAMPLING,
        },
    ),
    Recipe(
        name="phi4-fp8-h100",
        description="Phi-4 on one H100 80 GB each, FP8 weights and FP8 KV cache. Full 16K context.",
        gpu="h100-80",
        settings={
            "engine": {
                "model": "microsoft/phi-4",
                "dtype": "bfloat16",
                "quantization": "fp8",
                "kv_cache_dtype": "fp8",
                "max_model_len": 16384,
                "gpu_memory_utilization": 0.9,
                "max_num_seqs": 512,
                "max_num_batched_tokens": 16384,
            },
            "sampling": _PHI4_SAMPLING,
        },
    ),
    Recipe(
        name="phi4-bf16-tp2",
        description="Phi-4 in bf16 split over two 40 to 48 GB cards of one node (A100-40, L40S), "
        "tensor parallel 2. Full 16K context.",
        gpu="a100-40",
        settings={
            "engine": {
                "model": "microsoft/phi-4",
                "dtype": "bfloat16",
                "tensor_parallel_size": 2,
                "max_model_len": 16384,
                "gpu_memory_utilization": 0.9,
                "max_num_seqs": 128,
                "max_num_batched_tokens": 8192,
            },
            "sampling": _PHI4_SAMPLING,
        },
    ),
    Recipe(
        name="phi4-gptq4-24gb",
        description="Phi-4 in 4-bit GPTQ on one 24 GB card each (RTX 3090/4090, L4), 16K context.",
        gpu="l4-24",
        settings={
            "engine": {
                "model": "RedHatAI/phi-4-quantized.w4a16",
                "dtype": "bfloat16",
                "max_model_len": 16384,
                "gpu_memory_utilization": 0.9,
                "max_num_seqs": 64,
                "max_num_batched_tokens": 4096,
            },
            "sampling": _PHI4_SAMPLING,
        },
    ),
    Recipe(
        name="phi4-gptq4-12gb",
        description="Phi-4 in 4-bit GPTQ on one 12 GB card each (RTX 3060/4070), 2K context.",
        gpu="rtx-12",
        settings={
            "engine": {
                "model": "RedHatAI/phi-4-quantized.w4a16",
                "dtype": "bfloat16",
                "max_model_len": 2048,
                "gpu_memory_utilization": 0.95,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 2048,
            },
            "sampling": _PHI4_SAMPLING | {"max_tokens": 512},
        },
    ),
    Recipe(
        name="phi4-mini-bf16-24gb",
        description="Phi-4-mini-instruct in bf16 on one 24 GB card each (RTX 3090/4090, L4), 16K "
        "of its 128K context.",
        gpu="l4-24",
        settings={
            "engine": {
                "model": "microsoft/Phi-4-mini-instruct",
                "dtype": "bfloat16",
                "max_model_len": 16384,
                "gpu_memory_utilization": 0.9,
                "max_num_seqs": 128,
                "max_num_batched_tokens": 8192,
            },
            "sampling": _PHI4_SAMPLING,
        },
    ),
    Recipe(
        name="tiny-cpu",
        description="A tiny model of Phi-4's architecture on the CPU, to see everything work: "
        "give --model the folder that `python -m phi4ray.train.tiny FOLDER` made.",
        gpu=None,
        settings={
            "engine": {
                "dtype": "bfloat16",
                "max_model_len": 2048,
                "kv_cache_memory_bytes": 1 << 28,
                "max_num_seqs": 128,
                "max_num_batched_tokens": 2048,
                "enforce_eager": True,
                "num_gpus": 0.0,
                "engine_args": _ONE_PROCESS,
                "env": {"OMP_NUM_THREADS": "1"},
            },
            "sampling": {"temperature": 0.0, "max_tokens": 64},
            "max_replicas": 1,
        },
    ),
    Recipe(
        name="fake",
        description="No model: answers are digests of the prompts. Tries a job's buckets, "
        "credentials and formats on any machine.",
        gpu=None,
        settings={
            "engine": {"kind": "fake", "model": "fake", "num_gpus": 0.0},
            "max_replicas": 1,
        },
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})


def find_recipe(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        ConfigError: there is none of that name.
    """
    if not isinstance(name, str) or name not in RECIPES:  # a config file may hold anything
        raise ConfigError(f"there is no recipe {name!r}: known are {', '.join(RECIPES)}")
    return RECIPES[name]
