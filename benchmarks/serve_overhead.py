"""Our service against vLLM's own server, both asked by vLLM's own `vllm bench serve`.

    python benchmarks/serve_overhead.py --engine cpu --repeat 3

The same engine arguments on both sides, as recipes have them, one after the other, in turns. Two
loads: `saturation` (all requests at once, so many at a time as `--concurrency`) for throughput, and
`light` (requests by a Poisson clock, `--rate` a second) for the time to the first token. Medians
of the rounds are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines import ENGINES, as_in_recipes, make_model
from rich.console import Console
from rich.table import Table
from servers import answering

ROOT = Path(__file__).resolve().parent.parent
PORT = 8123
URL = f"http://127.0.0.1:{PORT}"
SIDES = ("vllm", "phi4ray")
NAME = "phi-4"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engine", choices=sorted(ENGINES), default="cpu")
    parser.add_argument("--shape", default="128x64", help="prompt x answer tokens [128x64]")
    parser.add_argument("--requests", type=int, default=1000, help="at saturation [1000]")
    parser.add_argument("--concurrency", type=int, default=64, help="at saturation [64]")
    parser.add_argument("--rate", type=float, default=4.0, help="light requests a second [4]")
    parser.add_argument("--light-requests", type=int, default=100, help="[100]")
    parser.add_argument("--warmups", type=int, default=32, help="requests before each load [32]")
    parser.add_argument("--repeat", type=int, default=3, help="rounds [3]")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--serve-vllm", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bench", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_vllm:
        serve_vllm(arguments.engine, arguments.serve_vllm)
    elif arguments.bench:
        bench(arguments.bench)
    else:
        show(measure(arguments))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    with tempfile.TemporaryDirectory(prefix="phi4ray-") as name:
        model = make_model(arguments.engine, Path(name) / "model")
        every = bench_options(model, arguments.shape) | {"num_warmups": arguments.warmups}
        loads: dict[str, dict[str, Any]] = {
            "saturation": {
                "num_prompts": arguments.requests, "max_concurrency": arguments.concurrency,
            },
            "light": {"num_prompts": arguments.light_requests, "request_rate": arguments.rate},
        }  # fmt: skip
        for round_ in range(arguments.repeat):
            for side in arguments.sides:
                with running(side, arguments.engine, model):
                    for load, options in loads.items():
                        file = Path(name) / f"{side}-{round_}-{load}.json"
                        asked = every | options | {"result_filename": str(file), "seed": round_}
                        command = [sys.executable, __file__, "--bench", json.dumps(asked)]
                        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                        found = json.loads(file.read_text())
                        results.append(
                            {
                                "side": side,
                                "load": load,
                                "round": round_,
                                "failed": found["failed"],
                                "tokens_per_s": round(found["total_token_throughput"], 1),
                                "ttft_ms": round(found["median_ttft_ms"], 2),
                                "tpot_ms": round(found["median_tpot_ms"], 2),
                            }
                        )
                        print(json.dumps(results[-1]), flush=True)
    return results


def bench_options(model: str, shape: str) -> dict[str, Any]:
    """What every load asks of `vllm bench serve`."""
    prompt, answer = shape.split("x")
    return {
        "backend": "openai", "endpoint": "/v1/completions", "model": NAME,
        "tokenizer": model, "base_url": URL, "dataset_name": "random",
        "random_input_len": prompt, "random_output_len": answer, "ignore_eos": True,
        "disable_tqdm": True, "num_warmups": 32, "save_result": True, "temperature": 0,
    }  # fmt: skip


@contextmanager
def running(side: str, engine: str, model: str, replicas: int = 1) -> Iterator[None]:
    """Have one side's server run; it is ready inside the block."""
    settings = as_in_recipes(engine)
    if side == "vllm":
        command = [sys.executable, __file__, "--engine", engine, "--serve-vllm", model]
    else:
        pairs = [f"{key}={value}" for key, value in settings.items()]
        command = [
            sys.executable, str(ROOT / "jobs" / "serve.py"), "--model", model, "--port", str(PORT),
            "--served-model-name", NAME, "--min-replicas", str(replicas),
            "--max-replicas", str(replicas), "--engine-arg", *pairs,
        ]  # fmt: skip
    with answering(command, URL, os.environ | settings.get("env", {})):
        yield


def serve_vllm(engine: str, model: Path) -> None:
    """vLLM's own server, by its Python API."""
    import uvloop

    try:
        from vllm.entrypoints.launchers.api_server.entry import run_server
    except ModuleNotFoundError:  # vLLM 0.25
        from vllm.entrypoints.openai.api_server import run_server

    from phi4ray.config import EngineConfig
    from phi4ray.replica import server_args

    args = server_args(
        EngineConfig(
            model=str(model),
            served_model_name=NAME,
            disable_log_stats=False,
            **as_in_recipes(engine),
        )
    )
    args.host, args.port, args.disable_uvicorn_access_log = "127.0.0.1", PORT, True
    uvloop.run(run_server(args))


def bench(options: dict[str, Any]) -> None:
    """`vllm bench serve`, by its Python entry point."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    given = []
    for name, value in options.items():
        given += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    main(parser.parse_args(given))


def show(results: list[dict[str, Any]]) -> None:
    table = Table("load", "side", "tok/s", "of vllm", "median TTFT ms", "more ms", "TPOT ms")
    for load in dict.fromkeys(result["load"] for result in results):
        base: dict[str, float] = {}
        for side in dict.fromkeys(result["side"] for result in results):
            mine = [r for r in results if r["load"] == load and r["side"] == side]
            mid = {
                name: statistics.median(result[name] for result in mine)
                for name in ("tokens_per_s", "ttft_ms", "tpot_ms")
            }
            base = base or mid
            table.add_row(
                load,
                side,
                f"{mid['tokens_per_s']:,.0f}",
                f"{mid['tokens_per_s'] / base['tokens_per_s']:.3f}",
                f"{mid['ttft_ms']:.1f}",
                f"{mid['ttft_ms'] - base['ttft_ms']:+.1f}",
                f"{mid['tpot_ms']:.2f}",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
