"""Our batch job against bare `vllm.LLM.generate` and against `ray.data.llm`.

    python benchmarks/batch_overhead.py --engine cpu
    python benchmarks/batch_overhead.py --engine h200 --shapes 512x256 128x16 heavy:512x256

Shapes are prompt x answer tokens. `ragged:` has answers of half to one and a half times that
length, `heavy:` of log-normal lengths with that mean and at most `--longest`, each row with its own
limit; `shared:` has prompts whose first half is that of eight rows, in random order.

The same rows and engine arguments on every side, each side in a process of its own, one after the
other. Compared is the engine phase: from the moment when the engine is ready to the last answer
(bare), or to the last durable part (the jobs). Every answer has the length of its row's limit
(`ignore_eos`).
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engines import ENGINES, bare_arguments, make_model, on_gpus, on_ray
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

SPREAD = 1.2
"""The sigma of heavy-tailed lengths: the longest hundredth is 8 times as long as the mean."""
SHARED = 8
"""So many rows share a prefix."""

SIDES = ("bare", "ours", "ray.data.llm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engine", choices=sorted(ENGINES), default="cpu")
    parser.add_argument(
        "--shapes", nargs="+", default=["512x256", "128x16"], help="prompt x answer tokens"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=None, help="rows of each shape")
    parser.add_argument(
        "--longest", type=int, default=8192, help="tokens of a heavy-tailed answer at most [8192]"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument(
        "--repeat", type=int, default=1, help="rounds; the best of each side counts"
    )
    parser.add_argument(
        "--results", type=Path, default=None, help="JSON file to add the results to"
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.engine, arguments.folder)
        return
    rows = arguments.rows or [4096 if on_gpus(arguments.engine) else 512] * len(arguments.shapes)
    results = []
    for shape, count in zip(arguments.shapes, rows, strict=True):
        with tempfile.TemporaryDirectory(prefix="phi4ray-") as name:
            folder = Path(name)
            prepare(folder, arguments.engine, shape, count, arguments.longest)
            for round_ in range(arguments.repeat):
                for side in arguments.sides:
                    result = measure(side, arguments.engine, folder)
                    results.append(
                        {"shape": shape, "rows": count, "side": side, "round": round_} | result
                    )
                    print(json.dumps(results[-1]), flush=True)
    show(results)
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=1))


def prepare(folder: Path, engine: str, shape: str, rows: int, longest: int = 8192) -> None:
    """Write the model's folder and the prompts: random words, with their limits."""
    from transformers import AutoTokenizer

    model = make_model(engine, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    kind, _, size = shape.rpartition(":")
    prompt_tokens, answer_tokens = map(int, size.split("x"))
    random_ = random.Random(0)
    words = sorted({word for word in (ROOT / "README.md").read_text().split() if word.isascii()})

    def text(tokens: int) -> str:
        ids = tokenizer.encode(" ".join(random_.choices(words, k=tokens)))
        return tokenizer.decode(ids[:tokens])

    shared = [text(prompt_tokens // 2) for _ in range(rows // SHARED)] if kind == "shared" else []
    longest = min(longest, ENGINES[engine]["max_model_len"] - prompt_tokens - 64)
    middle = math.log(answer_tokens) - SPREAD**2 / 2
    (folder / "prompts").mkdir()
    with (folder / "prompts" / "prompts.jsonl").open("w") as stream:
        for number in range(rows):
            row: dict[str, Any] = {"id": str(number), "prompt": text(prompt_tokens)}
            if kind == "shared":
                rest = text(prompt_tokens - prompt_tokens // 2)
                row["prompt"] = f"{random_.choice(shared)} {rest}"
            if kind == "heavy":
                limit = round(random_.lognormvariate(middle, SPREAD))
                row["sampling"] = {"max_tokens": min(longest, max(1, limit))}
            if kind == "ragged":
                limit = random_.randint(answer_tokens // 2, answer_tokens * 3 // 2)
                row["sampling"] = {"max_tokens": limit}
            stream.write(json.dumps(row) + "\n")
    sampling = {"temperature": 0.0, "max_tokens": answer_tokens, "ignore_eos": True}
    (folder / "sampling.json").write_text(json.dumps(sampling))


def measure(side: str, engine: str, folder: Path) -> dict[str, Any]:
    """Run one side in a process of its own; gives what it printed last, as JSON."""
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--engine",
        engine,
        "--folder",
        str(folder),
    ]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        return {"failed": done.returncode}
    return last_json(done.stdout) | {"wall_s": round(time.monotonic() - began, 1)}


def last_json(said: str) -> dict[str, Any]:
    """What a process printed last as JSON: engines may say more on their way out."""
    lines = reversed(said.splitlines())
    found: dict[str, Any] = json.loads(next(line for line in lines if line.startswith("{")))
    return found


def run_side(side: str, engine: str, folder: Path) -> None:
    sampling = json.loads((folder / "sampling.json").read_text())
    run = {"bare": bare, "ours": ours, "ray.data.llm": ray_data_llm}[side]
    result = run(str(folder / "model"), folder / "prompts", sampling, engine)
    total = result["prompt_tokens"] + result["completion_tokens"]
    print(json.dumps(result | {"tokens_per_s": round(total / result["engine_s"], 1)}))


def bare(model: str, prompts: Path, sampling: dict[str, Any], engine: str) -> dict[str, Any]:
    from vllm import LLM

    return generate(LLM(model, **bare_arguments(engine)), prompts, sampling)


def generate(llm: Any, prompts: Path, sampling: dict[str, Any]) -> dict[str, Any]:
    """What `LLM.generate` takes for all rows."""
    from vllm import SamplingParams

    rows = [json.loads(line) for line in (prompts / "prompts.jsonl").open()]
    limits = [SamplingParams(**(sampling | row.get("sampling", {}))) for row in rows]
    llm.generate(["Hello"], SamplingParams(max_tokens=1), use_tqdm=False)  # as our replicas do
    began = time.monotonic()
    outputs = llm.generate([row["prompt"] for row in rows], limits, use_tqdm=False)
    return {
        "engine_s": time.monotonic() - began,
        "prompt_tokens": sum(len(output.prompt_token_ids or ()) for output in outputs),
        "completion_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
    }


def ours(
    model: str, prompts: Path, sampling: dict[str, Any], engine: str,
    *, replicas: int = 1, limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    from cluster.batch import RayExecutor
    from cluster.local import connected
    from phi4ray.batch.run import run_batch
    from phi4ray.config import batch_config

    console = Console(stderr=True)
    settings = on_ray(engine) | {"model": model}
    with tempfile.TemporaryDirectory(prefix="phi4ray-answers-") as output:
        config = batch_config(
            {
                "input": [str(prompts)],
                "output": output,
                "endpoint": "/v1/completions",
                "engine": settings,
                "sampling": sampling,
                "shard_rows": 128,
                "min_replicas": replicas,
                "max_replicas": replicas,
                "limit": limit,
            }
        )
        with connected(num_cpus=os.cpu_count()):
            summary = run_batch(config, RayExecutor(console), console)
    assert not summary.error_rows, summary.errors
    return {
        "engine_s": summary.run.engine_s,
        "first_part_s": summary.run.first_part_s,
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
    }


def ray_data_llm(
    model: str, prompts: Path, sampling: dict[str, Any], engine: str
) -> dict[str, Any]:
    import pyarrow.parquet as pq
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from cluster.local import connected

    with (
        tempfile.TemporaryDirectory(prefix="ray-answers-") as output,
        connected(num_cpus=os.cpu_count()),
    ):
        config = vLLMEngineProcessorConfig(
            model_source=model,
            engine_kwargs=bare_arguments(engine),
            batch_size=128,
            concurrency=1,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            **(
                {"placement_group_config": {"bundles": [{"CPU": 1}]}, "accelerator_type": None}
                if not on_gpus(engine)
                else {}
            ),
        )
        processor = build_processor(
            config,
            preprocess=lambda row: {
                "prompt": row["prompt"],
                "id": row["id"],
                "sampling_params": sampling | (row.get("sampling") or {}),
            },
            postprocess=lambda row: {
                "id": row["id"],
                "text": row["generated_text"],
                "prompt_tokens": row["num_input_tokens"],
                "completion_tokens": row["num_generated_tokens"],
                # When the engine got the row: the first one's moment is when it was ready.
                "began": time.time() - row["time_taken_llm"],
            },
        )
        data = ray.data.read_json(str(prompts), override_num_blocks=32)
        processor(data).write_parquet(output)
        ended = time.time()
        table = pq.read_table(output)
    began = min(table["began"].to_pylist())
    return {
        "engine_s": ended - began,
        "prompt_tokens": sum(table["prompt_tokens"].to_pylist()),
        "completion_tokens": sum(table["completion_tokens"].to_pylist()),
    }


def show(results: list[dict[str, Any]]) -> None:
    """Print every side's best round, as a share of bare vLLM's."""
    table = Table("shape", "rows", "side", "engine s", "tok/s", "of bare", "first part s")
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        key = result["shape"], result["side"]
        if result.get("tokens_per_s", 0) >= best.get(key, {}).get("tokens_per_s", 0):
            best[key] = result
    for (shape, side), result in best.items():
        if "failed" in result:
            table.add_row(shape, str(result["rows"]), side, "failed")
            continue
        peer = best.get((shape, "bare"), {}).get("tokens_per_s")
        first = result.get("first_part_s")
        table.add_row(
            shape, str(result["rows"]), side, f"{result['engine_s']:.1f}",
            f"{result['tokens_per_s']:,.0f}",
            f"{result['tokens_per_s'] / peer:.3f}" if peer else "",
            f"{first:.1f}" if first is not None else "",
        )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
