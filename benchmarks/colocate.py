"""Online traffic and a batch job on one replica: what each costs the other.

    python benchmarks/colocate.py --engine h200 --shape 512x256

One service, asked in turn:

* `batch alone`: a batch job on the idle replica; its throughput is the capacity.
* `online alone`: a bursty trace, a Poisson process whose rate is `--base` of the capacity and rises
  to `--burst` of it for `--burst-s` seconds each `--period-s`: at the defaults a quarter of the
  capacity in the mean.
* `both`: the same trace, requests and moments, while the job runs. Just before it the job has the
  replica alone again, and what it reaches is the capacity that `both` is held against.

  `--rounds` plays these two so many times in turn, each time with another trace, and takes all
  requests of a side together: so a machine that grows slower does so for both.
* `priority`: the same on vLLM's own server with `scheduling_policy=priority`, where batch rows are
  requests of a low priority, as many at once as the engine has sequences.

And `--spike` requests in one moment, alone and while the job fills the replica: how much later
their first tokens come is what it takes to get the KV cache back.
Throughput counts prompt and answer tokens of what was finished between a phase's begin and end.
What online traffic leaves is the capacity without the tokens that it had in that time, those of
requests that were not finished yet included.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import yaml
from batch_overhead import prepare
from engines import ENGINES, on_gpus, on_ray
from rich.console import Console
from rich.table import Table
from serve_overhead import NAME, PORT, URL, serve_vllm
from servers import answering

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("phi4ray", "priority")
IDLE_S = 31.0
"""After so long without online requests the replica gives itself wholly to batch."""


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
    add("--base", type=float, default=0.1, help="of the capacity, between bursts [0.1]")
    add("--burst", type=float, default=1.0, help="of the capacity, in bursts [1.0]")
    add("--burst-s", type=float, default=8.0, help="[8]")
    add("--period-s", type=float, default=48.0, help="[48]")
    add("--spike", type=int, default=64, help="requests at once [64]")
    add("--capacity", type=float, help="requests a second, if known: skips batch alone")
    add("--target-tpot-ms", type=float, default=50.0, help="harvest.target_tpot_ms [50]")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of harvest")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--serve-vllm", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_vllm:
        ENGINES[arguments.engine]["engine_args"] = {"scheduling_policy": "priority"}
        serve_vllm(arguments.engine, arguments.serve_vllm)
    else:
        show(measure(arguments))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def tell(side: str, phase: str, **figures: float) -> dict[str, Any]:
        row = {"side": side, "phase": phase} | {k: round(v, 4) for k, v in figures.items()}
        print(json.dumps(row), flush=True)
        return row

    with tempfile.TemporaryDirectory(prefix="phi4ray-") as name:
        folder = Path(name)
        prepare(folder, arguments.engine, arguments.shape, 2000)
        prompts = [json.loads(line)["prompt"] for line in (folder / "prompts/prompts.jsonl").open()]
        shape = [int(part) for part in arguments.shape.split("x")]
        bench = Bench(arguments, prompts, sum(shape), shape[1], folder)
        last = arguments.rounds - 1
        if "phi4ray" in arguments.sides:
            alone, both, spikes = [], [], {}
            with bench.service():
                if arguments.capacity is None:
                    with bench.job():
                        bench.capacity = bench.computed_per_s(arguments.alone_s)
                    tell("phi4ray", "batch alone", batch=bench.capacity)
                for number in range(arguments.rounds):
                    moments = bench.moments(number)
                    alone.append(asyncio.run(bench.online(moments)))
                    tell("phi4ray", f"online alone {number}", **figures(alone[-1:]))
                    if number == last:
                        spikes["spike alone"] = asyncio.run(bench.spike())
                    idle_at = time.monotonic() + IDLE_S
                    with bench.job():
                        time.sleep(max(0.0, idle_at - time.monotonic()))
                        capacity = bench.computed_per_s(arguments.alone_s)
                        both.append(asyncio.run(bench.online(moments)))
                        both[-1].capacity = capacity
                        tell("phi4ray", f"both {number}", **figures(both[-1:]))
                        if number == last:
                            time.sleep(5)
                            spikes["spike on batch"] = asyncio.run(bench.spike())
            found.append(tell("phi4ray", "online alone", **figures(alone)))
            found.append(tell("phi4ray", "both", **figures(both)))
            found.extend(tell("phi4ray", phase, **spike) for phase, spike in spikes.items())
        if "priority" in arguments.sides:
            with bench.vllm():
                played = asyncio.run(bench.online(bench.moments(0), fill=True))
                played.capacity = bench.capacity
                found.append(tell("priority", "both", **figures([played])))
    return found


@dataclass
class Played:
    """What came of a trace."""

    seconds: float
    asked: int
    finished: int
    """Online requests, within the trace's seconds."""
    computed: float
    """Requests' worth of tokens that online traffic had in that time."""
    batch: float
    """Rows that the job finished in that time."""
    aborted: float
    """Rows that made way."""
    timings: list[tuple[float, float]]
    """Seconds to its first token and for each further one, of every request."""
    capacity: float = 0.0
    """Rows a second that the job has alone."""


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


class Bench:
    """The loads, and the servers that they are for."""

    def __init__(
        self, arguments: argparse.Namespace, prompts: list[str], tokens: int, answer: int,
        folder: Path,
    ) -> None:  # fmt: skip
        self._arguments = arguments
        self._prompts = prompts
        self._tokens = tokens
        self._answer = answer
        self._folder = folder
        self.capacity: float = arguments.capacity or 0.0
        self._asked = 0
        self._answered = 0
        """Tokens of online requests that came: of a prompt with its first answer token."""

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's samples, of those with a label where one is given."""
        lines = httpx.get(f"{URL}/metrics", timeout=30).text.splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith((f"{name} ", f"{name}{{")) and label in line
        )

    def finished(self) -> float:
        """Requests and rows that the engine answered to their end."""
        return self.metric("vllm:request_success_total", 'finished_reason="length"')

    def aborted(self) -> float:
        """Rows that made way."""
        return self.metric("phi4ray:batch_aborted_rows")

    def computed(self) -> float:
        """Requests' worth of tokens that the engine computed."""
        names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
        return sum(map(self.metric, names)) / self._tokens

    def computed_per_s(self, seconds: float) -> float:
        """What a job that has just begun reaches when it is under way."""
        while self.metric("vllm:num_requests_running") < 8:
            time.sleep(0.2)
        time.sleep(seconds / 3)
        before, began = self.computed(), time.monotonic()
        time.sleep(seconds)
        return (self.computed() - before) / (time.monotonic() - began)

    def moments(self, number: int) -> list[float]:
        """When the requests of a round's trace come, in seconds."""
        arguments, chance = self._arguments, random.Random(4 + number)
        moments, at = [], 0.0
        while True:
            burst = at % arguments.period_s > arguments.period_s - arguments.burst_s
            share = arguments.burst if burst else arguments.base
            at += chance.expovariate(share * self.capacity)
            if at >= arguments.seconds:
                return moments
            moments.append(at)

    async def online(self, moments: list[float], *, fill: bool = False) -> Played:
        """Play a trace; with `fill` as many requests of low priority as the engine takes beside."""
        seconds = self._arguments.seconds
        async with client() as session:
            fillers = [
                asyncio.create_task(self._fill(session, n))
                for n in range(ENGINES[self._arguments.engine]["max_num_seqs"] if fill else 0)
            ]
            await asyncio.sleep(self._arguments.alone_s if fill else 1)  # until they are under way
            aborted = await asyncio.to_thread(self.aborted)
            before, began = await asyncio.to_thread(self.finished), time.monotonic()
            answered = self._answered
            timings: list[tuple[float, float]] = []

            async def one(moment: float) -> None:
                await asyncio.sleep(began + moment - time.monotonic())
                timings.append(await self._ask(session))

            asked = [asyncio.create_task(one(moment)) for moment in moments]
            await asyncio.sleep(began + seconds - time.monotonic())
            done, seconds = len(timings), time.monotonic() - began
            answered = self._answered - answered
            total = await asyncio.to_thread(self.finished) - before
            aborted = await asyncio.to_thread(self.aborted) - aborted
            await asyncio.gather(*asked)
            for filler in fillers:
                filler.cancel()
            await asyncio.gather(*fillers, return_exceptions=True)
        return Played(
            seconds=seconds, asked=len(moments), finished=done, batch=total - done,
            computed=answered / self._tokens, aborted=aborted, timings=timings,
        )  # fmt: skip

    async def spike(self) -> dict[str, float]:
        """So many requests in one moment."""
        async with client() as session:
            asked = (self._ask(session) for _ in range(self._arguments.spike))
            timings = await asyncio.gather(*asked)
        return quantiles("ttft", [ttft for ttft, _ in timings])

    async def _ask(self, session: aiohttp.ClientSession) -> tuple[float, float]:
        """One streamed completion; gives seconds to its first token, and for each further one."""
        self._asked += 1  # or the prefix cache would know it from an earlier phase
        prompt = f"online {self._asked} {self._prompts[self._asked % len(self._prompts)]}"
        body = {
            "model": NAME, "prompt": prompt,
            "max_tokens": self._answer, "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        asked = time.monotonic()
        first = last = 0.0
        async with session.post("/v1/completions", json=body, raise_for_status=True) as stream:
            async for chunk in stream.content.iter_any():
                if tokens := chunk.count(b"data: {"):
                    last = time.monotonic()
                    self._answered += tokens + (0 if first else self._tokens - self._answer)
                    first = first or last
        return first - asked, (last - first) / max(1, self._answer - 1)

    async def _fill(self, session: aiohttp.ClientSession, number: int) -> None:
        body = {
            "model": NAME, "max_tokens": self._answer, "temperature": 0, "ignore_eos": True,
            "priority": 1000,
        }  # fmt: skip
        while True:
            body["prompt"] = f"{number} " + self._prompts[number % len(self._prompts)]
            async with session.post("/v1/completions", json=body, raise_for_status=True) as reply:
                await reply.read()
            number += 7919

    @contextmanager
    def service(self) -> Iterator[None]:
        """Our service, on a cluster of this machine."""
        arguments = self._arguments
        import ray

        from cluster.environment import SERVING
        from cluster.local import connected

        harvest = dict(item.split("=") for item in arguments.set)
        config = {
            "engine": {"model": str(self._folder / "model"), "served_model_name": NAME,
                       **on_ray(arguments.engine)},
            "harvest": {"target_tpot_ms": arguments.target_tpot_ms, **harvest},
            "admission": {"queue_timeout_s": 600},
        }  # fmt: skip
        file = self._folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        # A cluster is told at its start how Serve is to work.
        os.environ |= SERVING | {"RAY_AUTH_MODE": "disabled"}
        command = [
            sys.executable, str(ROOT / "jobs/serve.py"), "--config", str(file), "--port", str(PORT),
        ]  # fmt: skip
        with connected(num_cpus=os.cpu_count() if on_gpus(arguments.engine) else 4):
            address = ray.get_runtime_context().gcs_address
            self._environment = {**os.environ, "RAY_ADDRESS": address}
            with answering(command, URL, self._environment):
                yield

    @contextmanager
    def vllm(self) -> Iterator[None]:
        """vLLM's own server, with priorities."""
        command = [
            sys.executable, __file__, "--engine", self._arguments.engine,
            "--serve-vllm", str(self._folder / "model"),
        ]  # fmt: skip
        with answering(command, URL, dict(os.environ)):
            yield

    @contextmanager
    def job(self) -> Iterator[None]:
        """A batch job of many rows on our service, for as long as the block lasts."""
        source = self._folder / "rows.jsonl"
        with source.open("w") as stream:
            for number in range(200_000):
                prompt = f"{number} " + self._prompts[number % len(self._prompts)]
                stream.write(json.dumps({"prompt": prompt}) + "\n")
        sampling = json.loads((self._folder / "sampling.json").read_text())
        with tempfile.TemporaryDirectory(prefix="phi4ray-out-") as output:
            command = [
                sys.executable, str(ROOT / "jobs/batch_infer.py"), "--serve", "phi4",
                "--input", str(source), "--output", output, "--endpoint", "/v1/completions",
                "--set", *(f"{key}={json.dumps(value)}" for key, value in sampling.items()),
            ]  # fmt: skip
            with tempfile.TemporaryFile() as log:
                job = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
                try:
                    while self.metric("phi4ray:batch_rows") == 0:
                        if job.poll() is not None:
                            log.seek(0)
                            raise SystemExit(log.read().decode()[-3000:])
                        time.sleep(0.2)
                    yield
                finally:
                    job.send_signal(signal.SIGINT)
                    job.wait(120)
        with suppress(httpx.HTTPError):
            while self.metric("phi4ray:batch_rows") + self.metric("phi4ray:batch_waiting_rows"):
                time.sleep(1)


def client() -> aiohttp.ClientSession:
    """As many connections as it takes, none kept: servers close idle ones."""
    return aiohttp.ClientSession(
        URL,
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(),
    )


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
    for side in ("phi4ray", "priority"):
        both = by.get((side, "both"))
        if alone and both and both["capacity"]:
            left = both["capacity"] - both["online_computed"]
            console.print(
                f"{side}: p99 TTFT {both['ttft_p99_ms'] / alone['ttft_p99_ms']:.2f}x, "
                f"p99 TPOT {both['tpot_p99_ms'] / alone['tpot_p99_ms']:.2f}x of online alone; "
                f"batch has {both['batch'] / left:.0%} of what is left; "
                f"total {(both['online'] + both['batch']) / alone['online']:.2f}x of online alone"
            )


if __name__ == "__main__":
    main()
