"""What a step of bare vLLM's engine takes, by its prompts' tokens and its sequences.

    python benchmarks/steps.py --engine h200 --changes async_scheduling=false

So many sequences generate, and beside them each step has prompts of `--prompt` tokens each, or a
shorter one, with that many tokens in all. The changes are those of `sweep.py`; each has a process
of its own. With `--profile TOKENS` the steps with so many prompt tokens are told by kernel as well.
"""

import argparse
import json
import operator
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engines import ENGINES, bare_arguments, make_model
from rich.console import Console
from rich.table import Table
from sweep import changed

TOKENS = [0, 64, 256, 512, 1024, 2048, 3072]
WARM = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--engine", choices=sorted(ENGINES), default="cpu")
    add("--sequences", type=int, nargs="+", default=[32, 224], help="that generate [32 224]")
    add("--tokens", type=int, nargs="+", default=TOKENS, help="of a step's prompts")
    add("--prompt", type=int, default=512, help="tokens of a prompt [512]")
    add("--steps", type=int, default=24, help="of each kind [24]")
    add("--profile", type=int, nargs="*", default=[], help="tokens of steps to tell by kernel")
    add("--changes", nargs="*", default=[], metavar="KEY=VALUE[,…]")
    add("--run", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        run(arguments)
        return
    found = []
    with tempfile.TemporaryDirectory(prefix="phi4ray-") as name:
        model = make_model(arguments.engine, Path(name))
        for change in ["", *arguments.changes]:
            command = [*sys.argv, "--run", json.dumps([model, changed(change)])]
            done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{change or 'none'} failed: {done.stdout[-3000:]}", flush=True)
                continue
            rows = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
            found += [{"change": change or "none"} | row for row in rows]
            print(done.stdout[done.stdout.find('{"sequences"') :], flush=True)
    show(found)


def run(arguments: argparse.Namespace) -> None:
    """One engine in this process, stepped by hand; a line of JSON for each kind of step."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    model, changes = arguments.run
    engine = LLM(model, **(bare_arguments(arguments.engine) | changes)).llm_engine
    for count in arguments.sequences:
        begun = [ask(engine, arguments.prompt, answer=1000) for _ in range(count)]
        while any(begun):
            answering = {one.request_id for one in engine.step()}
            begun = [name for name in begun if name not in answering]
        for tokens in arguments.tokens:
            seconds = timed(engine, arguments, tokens)
            row = {"sequences": count, "tokens": tokens, "ms": round(1000 * seconds, 2)}
            print(json.dumps(row), flush=True)
            if tokens in arguments.profile:
                print(kernels(engine, arguments, tokens), flush=True)
        engine.abort_request(list(engine.output_processor.request_states))
        while engine.has_unfinished_requests():
            engine.step()


def ask(engine: Any, tokens: int, answer: int) -> str:
    """Ask for an answer of so many tokens to a prompt that no other begins as."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0, detokenize=False)
    name = f"{random.getrandbits(64):x}"
    # The dummy tokenizers have no more than some thousand tokens.
    prompt = {"prompt_token_ids": [random.randrange(300, 500) for _ in range(tokens)]}
    engine.add_request(name, prompt, sampling)
    return name


def timed(engine: Any, arguments: argparse.Namespace, tokens: int) -> float:
    """Mean seconds of a step; the first ones, beside which others are on their way, not counted."""
    began = 0.0
    for step in range(WARM + arguments.steps):
        if step == WARM:
            began = time.perf_counter()
        left = tokens
        while left > 0:
            ask(engine, min(left, arguments.prompt), answer=1)
            left -= arguments.prompt
        engine.step()
    return (time.perf_counter() - began) / arguments.steps


def kernels(engine: Any, arguments: argparse.Namespace, tokens: int) -> str:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        seconds = timed(engine, arguments, tokens)
    steps = WARM + arguments.steps
    averages = profiled.key_averages()
    busy = sum(event.self_device_time_total for event in averages) / steps / 1000
    lines = [f"profiled: {1000 * seconds:.2f} ms a step, its kernels {busy:.2f} ms"]
    for where, most in (("device", 22), ("cpu", 12)):
        total_us = operator.attrgetter(f"self_{where}_time_total")
        for one in sorted(averages, key=total_us, reverse=True)[:most]:
            each = total_us(one) / steps / 1000
            lines.append(f"{each:8.3f} ms {one.count / steps:7.1f} x {where} {one.key[:100]}")
    return "\n".join(lines)


def show(found: list[dict[str, Any]]) -> None:
    """Milliseconds of a step; a column for each change."""
    taken = {(row["change"], row["sequences"], row["tokens"]): row["ms"] for row in found}
    changes = list(dict.fromkeys(row["change"] for row in found))
    table = Table("sequences", "prompt tokens", *changes)
    for kind in dict.fromkeys((row["sequences"], row["tokens"]) for row in found):
        cells = (taken.get((change, *kind)) for change in changes)
        table.add_row(*map(str, kind), *("" if ms is None else f"{ms:.2f}" for ms in cells))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
