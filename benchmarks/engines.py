"""The engine arguments that every benchmark uses, on each kind of machine."""

from pathlib import Path
from typing import Any

from phi4ray.amx import WORKER_EXTENSION
from phi4ray.recipes import find_recipe

_CPU = {
    "max_model_len": 2048,
    "kv_cache_memory_bytes": 1 << 30,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 4096,
}
_H200 = dict(find_recipe("phi4-fp8-h200").settings["engine"]) | {"load_format": "dummy"}
del _H200["model"]
ENGINES: dict[str, dict[str, Any]] = {
    # The tiny model: its engine is so fast that all around it counts several times.
    "cpu": _CPU,
    # A cache of 64 MiB, 65,536 tokens of the tiny model: too few for many prefixes beside requests.
    "cpu-tight": _CPU | {"kv_cache_memory_bytes": 1 << 26},
    # One of 170 million parameters, whose steps take long enough to be what a service waits for.
    "cpu-170m": _CPU,
    # Phi-4-mini at full size: what a service on a CPU would really have.
    "cpu-mini": _CPU | {"load_format": "dummy", "max_num_seqs": 16},
    "h200": _H200,
    # As on a card of 32 GB: a cache of some 120,000 tokens.
    "h200-tight": _H200 | {"gpu_memory_utilization": 0.21},
    "h200-tp2": _H200 | {"tensor_parallel_size": 2},
}


def make_model(engine: str, folder: Path) -> str:
    """A small model, or the shape of a full one, whose weights vLLM makes up."""
    from phi4ray.train.tiny import make_dummy_model, make_tiny_model

    if on_gpus(engine):
        make_dummy_model(folder, "microsoft/phi-4")
    elif engine == "cpu-mini":
        make_dummy_model(folder, "microsoft/Phi-4-mini-instruct")
    elif engine == "cpu-170m":
        make_tiny_model(folder, hidden_size=1024, num_hidden_layers=12)
    else:
        make_tiny_model(folder)
    return str(folder)


def on_gpus(engine: str) -> bool:
    """Whether an engine runs on GPUs, of which Ray is then asked for as many as it takes."""
    return engine.startswith("h200")


def on_ray(engine: str) -> dict[str, Any]:
    """An engine's arguments, and that Ray is to reserve no GPU where it needs none."""
    return ENGINES[engine] | ({} if on_gpus(engine) else {"num_gpus": 0})


def as_in_recipes(engine: str) -> dict[str, Any]:
    """An engine's settings on Ray, with what the recipes for its machine add.

    On CPUs one thread computes, in the engine's own process. vLLM's default is one more process for
    it, beside which the engine's spins while it waits: of two cores none is left for what serves.
    """
    if on_gpus(engine):
        return on_ray(engine)
    recipe = find_recipe("tiny-cpu").settings["engine"]
    return on_ray(engine) | {"engine_args": recipe["engine_args"], "env": recipe["env"]}


def bare_arguments(engine: str) -> dict[str, Any]:
    """An engine's arguments where vLLM is asked directly, with what replicas add by themselves."""
    added = {} if on_gpus(engine) else {"worker_extension_cls": WORKER_EXTENSION}
    return ENGINES[engine] | added
