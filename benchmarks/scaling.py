"""Throughput of one, two, four, … GPUs of one machine, behind both doors.

    python benchmarks/scaling.py --engine h200 --gpus 1 2 4
    python benchmarks/scaling.py --engine h200-tp2 --gpus 2

Each GPU has a replica, or each pair of them one that is split over both. The batch job has `--rows`
for each replica, and its throughput is that of the engine phase: from the moment when the first
replica is ready to the last durable part, so that replicas which start later and shards which end
last count against it. The service is asked by `vllm bench serve`, one process of it a replica, each
with `--requests` of which `--concurrency` are under way; throughput is the sum of tokens by the
time of the longest. Efficiency is throughput by that of the first number of GPUs, GPU by GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from batch_overhead import ours, prepare
from engines import ENGINES, make_model
from rich.console import Console
from rich.table import Table
from serve_overhead import bench_options, running

ROOT = Path(__file__).resolve().parent.parent
DOORS = ("batch", "serve")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--engine", choices=sorted(ENGINES), default="h200")
    add("--gpus", type=int, nargs="+", default=[1, 2, 4], help="how many, in this order")
    add("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    add("--shape", default="ragged:512x256", help="of the batch job's rows, see batch_overhead.py")
    add("--rows", type=int, default=2048, help="for each replica [2048]")
    add("--serve-shape", default="512x128", help="prompt x answer tokens [512x128]")
    add("--requests", type=int, default=1000, help="for each replica [1000]")
    add("--concurrency", type=int, default=256, help="for each replica [256]")
    arguments = parser.parse_args()
    measure = {"batch": batch, "serve": serve}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(64)))
    each = ENGINES[arguments.engine].get("tensor_parallel_size", 1)
    found = []
    with tempfile.TemporaryDirectory(prefix="phi4ray-") as name:
        if "batch" in arguments.doors:
            most = max(arguments.gpus) * arguments.rows
            prepare(Path(name), arguments.engine, arguments.shape, most)
        for door in arguments.doors:
            for gpus in arguments.gpus:
                # What Ray takes for the GPUs of the machine.
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:gpus])
                began = time.monotonic()
                result = measure[door](arguments, Path(name), gpus // each)
                wall = {"wall_s": round(time.monotonic() - began, 1)}
                found.append({"door": door, "gpus": gpus} | result | wall)
                print(json.dumps(found[-1]), flush=True)
    show(found)


def batch(arguments: argparse.Namespace, folder: Path, replicas: int) -> dict[str, Any]:
    result = ours(
        str(folder / "model"),
        folder / "prompts",
        json.loads((folder / "sampling.json").read_text()),
        arguments.engine,
        replicas=replicas,
        limit=replicas * arguments.rows,
    )
    tokens = result["prompt_tokens"] + result["completion_tokens"]
    return {
        "tokens": tokens,
        "seconds": round(result["engine_s"], 2),
        "tokens_per_s": round(tokens / result["engine_s"]),
    }


def serve(arguments: argparse.Namespace, folder: Path, replicas: int) -> dict[str, Any]:
    model = make_model(arguments.engine, folder / "model")
    options = bench_options(model, arguments.serve_shape) | {
        "num_prompts": arguments.requests, "max_concurrency": arguments.concurrency,
    }  # fmt: skip
    with running("phi4ray", arguments.engine, model, replicas):
        wait_for_replicas(replicas)
        clients = []
        for client in range(replicas):
            asked = options | {
                "seed": client, "result_filename": str(folder / f"{replicas}-{client}.json"),
            }  # fmt: skip
            overhead = str(ROOT / "benchmarks" / "serve_overhead.py")
            clients.append(
                subprocess.Popen(
                    [sys.executable, overhead, "--bench", json.dumps(asked)],
                    stdout=subprocess.DEVNULL,
                )
            )
        codes = [client.wait() for client in clients]
        assert not any(codes), codes
    said = [json.loads((folder / f"{replicas}-{n}.json").read_text()) for n in range(replicas)]
    tokens = sum(one["total_input_tokens"] + one["total_output_tokens"] for one in said)
    seconds = max(one["duration"] for one in said)
    return {
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds),
        "failed": sum(one["failed"] for one in said),
        "ttft_ms": [round(one["median_ttft_ms"]) for one in said],
    }


def wait_for_replicas(count: int) -> None:
    """Until so many answer: the first one has the service answer already."""
    code = (
        "import sys, time, ray\nfrom ray import serve\n"
        "ray.init('auto', logging_level='ERROR')\n"
        "def running():\n"
        "    known = serve.status().applications['phi4'].deployments['replica']\n"
        "    return known.replica_states.get('RUNNING', 0)\n"
        "while running() < int(sys.argv[1]): time.sleep(0.5)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(count)], check=True, timeout=600)


def show(found: list[dict[str, Any]]) -> None:
    table = Table("door", "GPUs", "tokens", "seconds", "tok/s", "efficiency")
    for door in DOORS:
        mine = [row for row in found if row["door"] == door]
        for row in mine:
            each = mine[0]["tokens_per_s"] / mine[0]["gpus"]
            table.add_row(
                door, str(row["gpus"]), f"{row['tokens']:,}", f"{row['seconds']:.1f}",
                f"{row['tokens_per_s']:,}", f"{row['tokens_per_s'] / row['gpus'] / each:.3f}",
            )  # fmt: skip
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
