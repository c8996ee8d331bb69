"""What routing by prefix saves: the prefix-cache hit rate of two replicas under shared prompts.

    python benchmarks/prefix_routing.py

Requests of `--groups` system prompts come mixed. Each replica's KV cache holds about half of the
system prompts: where every replica sees all of them they push each other out, and where each
sees its half they stay. Compared are our router and the same router without its sense of
prefixes (the emptiest replica goes first, which is round robin under an even load).
"""

import argparse
import asyncio
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from cluster.environment import SERVING

PORT = 8124


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=64, help="system prompts [64]")
    parser.add_argument("--requests", type=int, default=600, help="[600]")
    parser.add_argument("--concurrency", type=int, default=8, help="[8]")
    arguments = parser.parse_args()
    os.environ |= SERVING  # read when Ray Serve is imported
    from phi4ray.train.tiny import make_tiny_model

    results = {}
    with tempfile.TemporaryDirectory(prefix="phi4ray-") as name:
        model = make_tiny_model(Path(name) / "model")
        for side, aware in (("emptiest first", False), ("by prefix", True)):
            results[side] = measure(str(model), arguments, aware)
            print(side, results[side], flush=True)
    table = Table("routing", "prefix-cache hit rate", "requests/s", "median TTFT ms")
    for side, found in results.items():
        table.add_row(
            side,
            f"{found['hit_rate']:.1%}",
            f"{found['requests_per_s']:.1f}",
            f"{found['ttft_ms']:.1f}",
        )
    Console(width=100).print(table)


def measure(model: str, arguments: argparse.Namespace, aware: bool) -> dict[str, float]:
    from cluster.deploying import deployed
    from cluster.local import connected
    from phi4ray.serve.config import serve_config

    config = serve_config(
        {
            "recipe": "tiny-cpu",
            "engine": {
                "model": model, "served_model_name": "phi-4", "max_model_len": 2048,
                "max_num_seqs": 64, "engine_args": {"num_gpu_blocks_override": 200},
            },
            "autoscaling": {"min_replicas": 2, "max_replicas": 2},
            "routing": {"prefix_aware": aware},
        }
    )  # fmt: skip
    with connected(num_cpus=4), deployed(config, "127.0.0.1", PORT):
        warm_up, asked = prompts(arguments.groups, 0), prompts(arguments.groups, 1)
        asyncio.run(ask(warm_up[: 2 * arguments.groups], arguments.concurrency))
        before = counters()
        began = time.monotonic()
        ttft = asyncio.run(ask(asked[: arguments.requests], arguments.concurrency))
        seconds = time.monotonic() - began
        after = counters()
    hits, queries = (after[name] - before[name] for name in ("hits", "queries"))
    return {
        "hit_rate": hits / queries,
        "requests_per_s": len(ttft) / seconds,
        "ttft_ms": sorted(ttft)[len(ttft) // 2] * 1e3,
    }


def prompts(groups: int, seed: int) -> list[str]:
    """Questions below system prompts of some 500 tokens, mixed."""
    words = [word for word in Path("README.md").read_text().split() if word.isascii()]
    systems = [" ".join(random.Random(group).choices(words, k=300)) for group in range(groups)]
    mixed = random.Random(seed)
    return [f"{mixed.choice(systems)} {mixed.random()}" for _ in range(10_000)]


async def ask(texts: list[str], concurrency: int) -> list[float]:
    """Ask for eight tokens each; gives the times to the first ones, in seconds."""
    places = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=120) as client:

        async def one(text: str) -> float:
            body: dict[str, Any] = {"model": "phi-4", "prompt": text, "max_tokens": 8}
            async with places:
                began = time.monotonic()
                async with client.stream(
                    "POST", "/v1/completions", json=body | {"stream": True}
                ) as stream:
                    assert stream.is_success, await stream.aread()
                    lines = stream.aiter_lines()
                    await anext(lines)
                    first = time.monotonic() - began
                    async for _ in lines:
                        pass
                return first

        return list(await asyncio.gather(*(one(text) for text in texts)))


def counters() -> dict[str, float]:
    """vLLM's prefix-cache counters, added up over the replicas' own metrics pages."""
    import ray
    from ray import serve

    controller = serve.context._get_global_client()._controller
    groups = ray.get(controller.get_target_groups.remote(app_name="phi4"))
    # They listen where the service was told to, whatever address their node has.
    ports = {target.port for group in groups for target in group.targets}
    total = {"hits": 0.0, "queries": 0.0}
    for port in ports:
        for line in httpx.get(f"http://127.0.0.1:{port}/metrics/").text.splitlines():
            for name in total:
                if line.startswith(f"vllm:prefix_cache_{name}_total{{"):
                    total[name] += float(line.rpartition(" ")[2])
    return total


if __name__ == "__main__":
    main()
