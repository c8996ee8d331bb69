"""Throughput and memory of Phi-4's shape by quantization, as published cards compare them.

    python benchmarks/schemes.py --shape 1000x1000 --rows 512

Bare `vllm.LLM.generate` with the engine arguments of `engines.py`, weights made up, each scheme in
a process of its own: `bf16`; `fp8` (weights and activations, quantized while loading); `fp8-kv8`,
the same with an FP8 KV cache; `gptq-4bit`, by the kernel that vLLM chooses for the card (Machete on
Hopper, Marlin before it).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from batch_overhead import generate, last_json, prepare
from engines import bare_arguments
from rich.console import Console
from rich.table import Table

GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
    "checkpoint_format": "gptq",
    # vLLM reads from the weights' file which layers are quantized, where it is not said.
    "modules_in_block_to_quantize": [
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj",
    ],
}  # fmt: skip

SCHEMES: dict[str, dict[str, Any]] = {
    "bf16": {"quantization": None, "kv_cache_dtype": "auto"},
    "fp8": {"quantization": "fp8", "kv_cache_dtype": "auto"},
    "fp8-kv8": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
    "gptq-4bit": {"quantization": None, "kv_cache_dtype": "auto"},
}

LOGGED = {
    "weights_gib": r"Model loading took ([\d.]+) GiB",
    "kv_tokens": r"GPU KV cache size: ([\d,]+) tokens",
    "start_s": r"init engine .* took ([\d.]+) s",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="1000x1000", help="prompt x answer tokens")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--schemes", nargs="+", choices=sorted(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        engine, changes, folder = arguments.run
        run(engine, changes, Path(folder))
        return
    found = []
    for scheme in arguments.schemes:
        with tempfile.TemporaryDirectory(prefix="phi4ray-") as name:
            prepare(Path(name), "h200", arguments.shape, arguments.rows)
            result = measure(scheme, Path(name))
            if "failed" in result:
                raise SystemExit(f"{scheme} failed:\n{result['failed']}")
            found.append({"scheme": scheme} | result)
            print(json.dumps(found[-1]), flush=True)
    show(found)


def measure(scheme: str, folder: Path) -> dict[str, Any]:
    """What one scheme's engine logs and reaches."""
    if scheme == "gptq-4bit":
        file = folder / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": GPTQ}))
    return in_process("h200", SCHEMES[scheme], folder)


def in_process(engine: str, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Bare vLLM with some engine arguments changed, in a process of its own: log and figures."""
    command = [sys.executable, __file__, "--run", json.dumps([engine, changes, str(folder)])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        return {"failed": done.stdout[-3000:]}
    logged = {
        name: float(match[1].replace(",", ""))
        for name, mark in LOGGED.items()
        if (match := re.search(mark, done.stdout))
    }
    kernels = sorted(set(re.findall(r"Using (\w+LinearKernel)", done.stdout)))
    return last_json(done.stdout) | logged | {"kernels": kernels}


def run(engine: str, changes: dict[str, Any], folder: Path) -> None:
    import torch
    from vllm import LLM

    sampling = json.loads((folder / "sampling.json").read_text())
    llm = LLM(str(folder / "model"), **(bare_arguments(engine) | changes))
    took = generate(llm, folder / "prompts", sampling)
    answers, seconds = took["completion_tokens"], took["engine_s"]
    result = {
        "seconds": round(seconds, 2),
        "tokens_per_s": round((took["prompt_tokens"] + answers) / seconds),
        "answer_tokens_per_s": round(answers / seconds),
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        result["memory_gib"] = round((total - free) / (1 << 30), 1)
    print(json.dumps(result))


def show(found: list[dict[str, Any]]) -> None:
    table = Table("scheme", "weights GiB", "KV tokens", "memory GiB", "tok/s", "of bf16", "kernel")
    base = next((row["tokens_per_s"] for row in found if row["scheme"] == "bf16"), None)
    for row in found:
        table.add_row(
            row["scheme"], f"{row.get('weights_gib', 0):.2f}", f"{row.get('kv_tokens', 0):,.0f}",
            f"{row['memory_gib']:.1f}", f"{row['tokens_per_s']:,}",
            f"{row['tokens_per_s'] / base:.2f}" if base else "", ", ".join(row["kernels"]),
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
