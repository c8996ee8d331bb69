"""Online traffic and a batch job on one replica: what each costs the other.

    python benchmarks/colocate.py --engine h200 --shape 512x256

One service, asked in turn:

* `batch alone`: a batch job on the idle replica; its throughput is the capacity.
* `online saturated`: as many requests at any time as the engine has places. Each comes by HTTP and
  is streamed, which is work that a row does not make.
* `online alone`: a bursty trace, a Poisson process whose rate is `--base` of the capacity and rises
  to `--burst` of it for `--burst-s` seconds each `--period-s`: at the defaults a quarter of the
  capacity in the mean.
* `both`: the same trace, requests and moments, while the job runs. Just before it the job has the
  replica alone again, and what it reaches is the capacity that `both` is held against.

  `--rounds` plays these two so many times in turn, each time with another trace, and takes all
  requests of a side together: so a machine that grows slower does so for both.
* `priority`: the same on vLLM's own server with `scheduling_policy=priority`, where batch rows are
  requests of a low priority, as many at once as the engine has sequences.

And, once a round, `--spike` requests in one moment, alone and while the job fills the replica: how
much later their first tokens come is what it takes to get the KV cache back.
Throughput counts what is finished from the end of the trace's first burst to that of its last one:
so rows that an idle replica had begun before the trace do not count, and as few are under way at
the one end as at the other. What online traffic takes are the tokens that it had in that time,
those of requests that were not finished yet included: so much of what it has when saturated, and by
tokens so much of what batch has alone. The rest is left.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from batch_overhead import prepare
from colocate_loads import BASE, BURST, BURST_S, PERIOD_S, Loads, Played
from engines import ENGINES
from rich.console import Console
from rich.table import Table
from serve_overhead import serve_vllm

SIDES = ("phi4ray", "priority")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--engine", choices=sorted(ENGINES), default="cpu")
    add("--shape", default="128x64", help="prompt x answer tokens, online and batch [128x64]")
    add("--rounds", type=int, default=1, help="of online alone and both [1]")
    add("--seconds", type=float, default=96.0, help="of a round's trace [96]")
    add("--alone-s", type=float, default=25.0, help="of batch alone [25]")
    add("--base", type=float, default=BASE, help="of the capacity, between bursts [0.1]")
    add("--burst", type=float, default=BURST, help="of the capacity, in bursts [1.0]")
    add("--burst-s", type=float, default=BURST_S, help="[8]")
    add("--period-s", type=float, default=PERIOD_S, help="[48]")
    add("--spike", type=int, default=64, help="requests at once [64]")
    add("--capacity", type=float, help="requests a second, if known: skips batch alone")
    add("--target-tpot-ms", type=float, default=50.0, help="harvest.target_tpot_ms [50]")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of harvest")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--serve-vllm", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.seconds % arguments.period_s or arguments.seconds == arguments.period_s:
        parser.error("--seconds must be whole periods, two at least: see above what is counted")
    if arguments.serve_vllm:
        ENGINES[arguments.engine]["engine_args"] = {"scheduling_policy": "priority"}
        serve_vllm(arguments.engine, arguments.serve_vllm)
    else:
        show(measure(arguments))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def tell(side: str, phase: str, **values: float) -> dict[str, Any]:
        row = {"side": side, "phase": phase} | {k: round(v, 4) for k, v in values.items()}
        print(json.dumps(row), flush=True)
        return row

    with tempfile.TemporaryDirectory(prefix="phi4ray-") as name:
        folder = Path(name)
        prepare(folder, arguments.engine, arguments.shape, 2000)
        prompts = [json.loads(line)["prompt"] for line in (folder / "prompts/prompts.jsonl").open()]
        shape = [int(part) for part in arguments.shape.split("x")]
        loads = Loads(arguments, prompts, sum(shape), shape[1], folder)
        if "phi4ray" in arguments.sides:
            alone, both = [], []
            spikes: dict[str, list[float]] = {"spike alone": [], "spike on batch": []}
            with loads.service():
                if arguments.capacity is None:
                    with loads.job():
                        loads.capacity = loads.job_alone(arguments.alone_s)
                    tell("phi4ray", "batch alone", batch=loads.capacity)
                saturated = asyncio.run(loads.saturate(arguments.alone_s))
                found.append(tell("phi4ray", "online saturated", online=saturated))
                for number in range(arguments.rounds):
                    moments = loads.moments(number)
                    alone.append(asyncio.run(loads.online(moments)))
                    tell("phi4ray", f"online alone {number}", **figures(alone[-1:]))
                    spikes["spike alone"] += asyncio.run(loads.spike())
                    with loads.job():
                        capacity = loads.job_alone(arguments.alone_s)
                        both.append(asyncio.run(loads.online(moments, capacity=capacity)))
                        tell("phi4ray", f"both {number}", **figures(both[-1:]))
                        time.sleep(5)
                        spikes["spike on batch"] += asyncio.run(loads.spike())
            found.append(tell("phi4ray", "online alone", **figures(alone)))
            found.append(tell("phi4ray", "both", **figures(both)))
            for phase, ttfts in spikes.items():
                found.append(tell("phi4ray", phase, **quantiles("ttft", ttfts)))
        if "priority" in arguments.sides:
            with loads.vllm():
                played = loads.online(loads.moments(0), capacity=loads.capacity, fill=True)
                found.append(tell("priority", "both", **figures([asyncio.run(played)])))
    return found


def figures(rounds: list[Played]) -> dict[str, float]:
    """Of several rounds together."""
    seconds = sum(played.seconds for played in rounds)
    timings = [timing for played in rounds for timing in played.timings]
    return {
        "online": sum(played.finished for played in rounds) / seconds,
        "batch": sum(played.batch for played in rounds) / seconds,
        "online_computed": sum(played.computed for played in rounds) / seconds,
        "aimed": sum(played.asked for played in rounds) / seconds,
        "made_way": sum(played.aborted for played in rounds),
        "capacity": sum(played.capacity * played.seconds for played in rounds) / seconds,
        **quantiles("ttft", [ttft for ttft, _ in timings]),
        **quantiles("tpot", [tpot for _, tpot in timings]),
    }


def quantiles(name: str, values: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile in milliseconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"{name}_p{at}_ms": 1e3 * cuts[at - 1] for at in (50, 95, 99)}


def show(found: list[dict[str, Any]]) -> None:
    table = Table(
        "side", "phase", "online /s", "batch /s", "of", "TTFT p50 / p99 ms", "TPOT p50 / p99 ms",
        "made way",
    )  # fmt: skip
    for row in found:

        def pair(name: str, row: dict[str, Any] = row) -> str:
            first, last = row.get(f"{name}_p50_ms"), row.get(f"{name}_p99_ms")
            return "" if first is None else f"{first:,.1f} / {last:,.1f}"

        counted = (str(row.get(name) or "") for name in ("online", "batch", "capacity"))
        table.add_row(
            row["side"], row["phase"], *counted, pair("ttft"), pair("tpot"),
            str(row.get("made_way", "")),
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    by = {(row["side"], row["phase"]): row for row in found}
    alone = by.get(("phi4ray", "online alone"))
    for side in SIDES:
        both = by.get((side, "both"))
        if alone and both and both["capacity"]:
            saturated = by["phi4ray", "online saturated"]["online"]
            console.print(f"{side}: {compared(alone, both, saturated)}")


def compared(alone: dict[str, Any], both: dict[str, Any], saturated: float) -> str:
    """What the goals are for. `saturated`: requests a second that online traffic has at most."""
    tokens_left = both["capacity"] - both["online_computed"]
    left = both["capacity"] * (1 - both["online_computed"] / saturated)
    return (
        f"p99 TTFT {both['ttft_p99_ms'] / alone['ttft_p99_ms']:.2f}x, "
        f"p99 TPOT {both['tpot_p99_ms'] / alone['tpot_p99_ms']:.2f}x of online alone; "
        f"batch has {both['batch'] / left:.0%} of what is left, "
        f"{both['batch'] / tokens_left:.0%} by tokens; "
        f"total {(both['online'] + both['batch']) / alone['online']:.2f}x of online alone"
    )


if __name__ == "__main__":
    main()
