"""Real engines that start as fast as this machine lets them."""

from pathlib import Path
from typing import Any

from phi4ray.config import EngineConfig
from phi4ray.recipes import find_recipe


def tiny_engine(model: Path | str, **changes: Any) -> EngineConfig:
    """The engine of the recipe `tiny-cpu`, smaller, under the name phi-4."""
    small = {
        "model": str(model),
        "served_model_name": "phi-4",
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1024,
        "kv_cache_memory_bytes": 1 << 26,
    }
    return EngineConfig(**find_recipe("tiny-cpu").settings["engine"] | small | changes)
