"""Our own machinery without an engine: plan, run and resume a million rows with the fake one.

    python benchmarks/scale.py --rows 1000000

Prints seconds of listing and planning, of the run, and of a second run that finds all parts done;
rows/s, rows/s a core, and the driver's peak memory.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from rich.console import Console

from cluster.batch import RayExecutor
from cluster.local import connected
from phi4ray.batch.manifest import list_parts
from phi4ray.batch.planning import obtain_plan
from phi4ray.batch.run import run_batch
from phi4ray.config import BatchConfig, batch_config

FILES = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shard-rows", type=int, default=5000)
    parser.add_argument("--replicas", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--num-cpus", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="phi4ray-scale-") as name:
        folder = Path(name)
        write_prompts(folder / "prompts", arguments.rows)
        config = batch_config(
            {
                "input": [str(folder / "prompts")],
                "output": str(folder / "answers"),
                "engine": {"kind": "fake", "model": "fake"},
                "sampling": {"max_tokens": 16},
                "shard_rows": arguments.shard_rows,
                "min_replicas": arguments.replicas,
                "max_replicas": arguments.replicas,
            }
        )
        with connected(num_cpus=arguments.num_cpus):
            measure(config, arguments)


def write_prompts(folder: Path, rows: int) -> None:
    folder.mkdir()
    for file in range(FILES):
        with (folder / f"{file}.jsonl").open("w") as stream:
            for row in range(file, rows, FILES):
                prompt = (
                    f"Prompt {row}: what is {row} plus {row * 7 % 1000}, and why does it matter?"
                )
                stream.write(json.dumps({"id": f"row-{row}", "prompt": prompt}) + "\n")


def measure(config: BatchConfig, arguments: argparse.Namespace) -> None:
    console = Console(stderr=True)
    began = time.monotonic()
    plan = obtain_plan(config, RayExecutor(console))
    planned = time.monotonic()
    summary = run_batch(config, RayExecutor(console), console)
    ran = time.monotonic()
    parts = len(list_parts(config.output, plan))
    listed = time.monotonic()
    run_batch(config, RayExecutor(console), console)
    resumed = time.monotonic()
    assert summary.rows == arguments.rows
    assert not summary.error_rows
    seconds = summary.run.engine_s or 0.0
    result = {
        "rows": arguments.rows,
        "parts": parts,
        "replicas": arguments.replicas,
        "plan_s": round(planned - began, 1),
        "run_s": round(ran - planned, 1),
        "engine_s": round(seconds, 1),
        "list_s": round(listed - ran, 2),
        "resume_s": round(resumed - listed, 1),
        "rows_per_s": round(arguments.rows / seconds),
        "rows_per_s_and_replica": round(arguments.rows / seconds / arguments.replicas),
        "driver_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
