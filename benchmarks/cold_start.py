"""How long a replica takes from its process's start to its first token, and where the seconds go.

    python benchmarks/cold_start.py --engine cpu
    python benchmarks/cold_start.py --engine h200
    python benchmarks/cold_start.py --engine h200 --model s3://bucket/phi-4/ --load-format auto
    python benchmarks/cold_start.py --engine h200 --sleep --set cudagraph_capture_sizes=[1,8,64,512]

Three starts, one after the other, each in a process of its own: the first with every cache of
compiled code empty, the second with what the first left there, the third with them empty again. The
third tells the compile cache's share from that of the operating system, which keeps files in memory
after they were read once: for a machine's very first start, let this be the first that it runs. A
phase ends with a line that the engine logs; lines get their time when they arrive here. Seconds of
CPU are of all processes of a start: on a machine that is shared, they tell more than those of a
clock. With `--sleep` the engine is then put to sleep, weights in the host's memory, and woken.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from engines import ENGINES, make_model
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

STARTS = ("first", "second", "third")

PHASES = {
    "python": r"@@ running",
    "the model's files, import vLLM": r"@@ imported",
    "the model's class": r"Resolved architecture",
    "engine process, its imports": r"Initializing a V1 LLM engine",
    "device, worker process if any": r"Starting to load model",
    "weights": r"Loading weights took|Model loading took",
    "compile, profile": r"KV cache size: [\d,]+ tokens",
    "graphs, warm-up": r"init engine \(profile, create kv cache, warmup model\) took",
    "HTTP application, first requests": r"@@ started",
    "first token": r"@@ answered",
    "falling asleep": r"@@ asleep",
    "waking up, to its first token": r"@@ awake",
    "stop": r"@@ stopped",
}
"""Each phase ends with the last line that has this, before the next phase's."""

REPORTED = {
    "CPU, to the first token": r"answered, CPU ([\d.]+) s",
    "reading weights": r"Loading weights took ([\d.]+) s",
    "torch.compile": r"torch\.compile (?:takes|took) ([\d.]+) s in total",
    "compiled code from cache": r"[Dd]irectly load .* took ([\d.]+) s",
    "graph capture": r"Graph capturing finished in ([\d.]+) s",
    "init engine": r"init engine .* took ([\d.]+) s",
}
"""What the processes themselves say."""

CACHES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
    "PYTHONPYCACHEPREFIX": "bytecode",  # which images have that pip made
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engine", choices=sorted(ENGINES), default="cpu")
    parser.add_argument(
        "--recipe", default=None, help="its engine's settings instead of --engine's"
    )
    parser.add_argument("--model", default=None, help="folder, hub name or s3:// folder")
    parser.add_argument("--load-format", default=None, help="as in `vllm serve`")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument(
        "--folder", type=Path, default=None, help="for caches and model, to be kept for another run"
    )
    parser.add_argument("--eager", action="store_true", help="nothing is compiled or captured")
    parser.add_argument("--sleep", action="store_true", help="then to sleep, and awake (GPUs)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=JSON", help="other engine arguments of vLLM's"
    )
    parser.add_argument("--results", type=Path, default=None, help="JSON file for the results")
    parser.add_argument("--log", type=Path, default=None, help="file for what the engines logged")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        asyncio.run(start(json.loads(arguments.child)))
        return
    kept = arguments.folder and contextlib.nullcontext(arguments.folder)
    with kept or tempfile.TemporaryDirectory(prefix="phi4ray-") as name:
        folder = Path(name)
        config = engine(arguments, folder)
        results = {}
        for side in arguments.starts:
            if side != "second":
                shutil.rmtree(folder / "caches", ignore_errors=True)
            results[side] = measure(config, folder / "caches", arguments.log)
            print(json.dumps({side: results[side]}), flush=True)
    show(results)
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=1))


def engine(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The fields of the engine's configuration."""
    settings: dict[str, Any] = dict(ENGINES[arguments.engine])
    if arguments.recipe:
        from phi4ray.recipes import find_recipe

        settings = dict(find_recipe(arguments.recipe).settings["engine"])
    if arguments.model:
        settings["model"] = arguments.model
        settings.pop("load_format", None)  # of weights that are made up
    else:
        settings["model"] = make_model(arguments.engine, folder / "model")
    if arguments.load_format:
        settings["load_format"] = arguments.load_format
    if arguments.eager:
        settings["enforce_eager"] = True
    pairs = (pair.split("=", 1) for pair in arguments.set)
    more = {name: json.loads(value) for name, value in pairs}
    if arguments.sleep:
        more["enable_sleep_mode"] = True
    settings["engine_args"] = {**settings.get("engine_args", {}), **more}
    return {**settings, "served_model_name": "phi-4"}


async def start(settings: dict[str, Any]) -> None:
    """The process that is measured."""
    print("@@ running", flush=True)
    from phi4ray.config import EngineConfig
    from phi4ray.engines import make_replica

    replica = make_replica(EngineConfig(**settings))
    print("@@ imported", flush=True)
    await replica.start()
    print("@@ started", flush=True)
    body = {"model": "phi-4", "prompt": "Hello", "max_tokens": 1}
    answer = await replica.complete("/v1/completions", body)
    assert answer.status == 200, answer.body
    print(f"@@ answered, CPU {cpu_s():.2f} s", flush=True)
    if replica.can_sleep:
        await sleep_and_wake(replica)
    await replica.stop()
    print("@@ stopped", flush=True)


async def sleep_and_wake(replica: Any) -> None:
    await replica.sleep()
    print("@@ asleep", flush=True)
    await replica.wake()
    body = {"model": "phi-4", "prompt": "Hello again", "max_tokens": 1}
    answer = await replica.complete("/v1/completions", body)
    assert answer.status == 200, answer.body
    print("@@ awake", flush=True)


def measure(config: dict[str, Any], caches: Path, log: Path | None) -> dict[str, float]:
    """Seconds of each phase of one start."""
    environment = {
        **os.environ,
        **{name: str(caches / folder) for name, folder in CACHES.items()},
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    for folder in CACHES.values():
        (caches / folder).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--child", json.dumps(config)]
    began = time.monotonic()
    lines: list[tuple[float, str]] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.monotonic() - began, line))
    text = "".join(f"{at:8.2f} {line}" for at, line in lines)
    if log:
        with log.open("a") as stream:
            stream.write(text)
    if process.returncode:
        raise SystemExit(f"the engine did not start:\n{text[-3000:]}")
    return phases(lines) | reported(text)


def cpu_s() -> float:
    """Seconds that the cores spent on this process and all below it, those that ended too."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def phases(lines: list[tuple[float, str]]) -> dict[str, float]:
    """How long each phase took; one whose line is not logged is counted to the next."""
    found, before = {}, 0.0
    for name, mark in PHASES.items():
        ends = [at for at, line in lines if re.search(mark, line)]
        if ends:
            found[name] = round(ends[-1] - before, 2)
            before = ends[-1]
            if name == "first token":
                found["process to first token"] = round(before, 2)
    return found


def reported(text: str) -> dict[str, float]:
    """What the engine says that parts of it took, where it says so."""
    said = {name: re.findall(mark, text) for name, mark in REPORTED.items()}
    return {f"by the log: {name}": float(times[-1]) for name, times in said.items() if times}


def show(results: dict[str, dict[str, float]]) -> None:
    table = Table("seconds", *results)
    names = dict.fromkeys(name for result in results.values() for name in result)
    for name in sorted(names, key=lambda name: name.startswith("by the log")):
        table.add_row(name, *(f"{result.get(name, 0):.1f}" for result in results.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
