"""What `colocate.py` measures with: online traffic, a batch job, and their servers."""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import yaml
from engines import ENGINES, on_gpus, on_ray
from serve_overhead import NAME, PORT, URL
from servers import answering

from jobs.flags import pairs
from phi4ray.serve.slack import HarvestConfig

BASE, BURST, BURST_S, PERIOD_S = 0.1, 1.0, 8.0, 48.0
"""Of a trace: shares of the capacity between bursts and in them, and how long these last."""
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Played:
    """What came of a trace: throughput after its first burst, timings of all of it."""

    seconds: float
    """That throughput is counted for."""
    asked: int
    finished: int
    """Online requests, in those seconds."""
    computed: float
    """Requests' worth of tokens that online traffic had in that time."""
    batch: float
    """Rows that the job finished in that time."""
    aborted: float
    """Rows that made way, in the whole trace."""
    timings: list[tuple[float, float]]
    """Seconds to its first token and for each further one, of every request."""
    capacity: float
    """Rows a second that the job has alone; 0 where there was none."""


def bursts(
    number: int, capacity: float, *, seconds: float, base: float = BASE, burst: float = BURST,
    burst_s: float = BURST_S, period_s: float = PERIOD_S,
) -> list[float]:  # fmt: skip
    """When the requests of a round's trace come, in seconds: see `colocate.py`."""
    moments, at, chance = [], 0.0, random.Random(4 + number)
    while True:
        share = burst if at % period_s > period_s - burst_s else base
        at += chance.expovariate(share * capacity)
        if at >= seconds:
            return moments
        moments.append(at)


@asynccontextmanager
async def under_way(works: Iterator[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Have works that have no end go on for as long as the block lasts."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Loads:
    """Online traffic and batch jobs, and the servers that they are for."""

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
        self._places: int = ENGINES[arguments.engine]["max_num_seqs"]
        told = pairs("--set", arguments.set)
        self._harvest = {"target_tpot_ms": arguments.target_tpot_ms, **told}
        self._idle_s = HarvestConfig.model_validate(self._harvest).idle_s
        self._online_at_s = -math.inf
        self._jobs = 0
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

    def job_alone(self, seconds: float) -> float:
        """Rows a second that a job which has just begun reaches when it has all to itself."""
        time.sleep(max(0.0, self._online_at_s + self._idle_s + 1 - time.monotonic()))
        while self.metric("vllm:num_requests_running") < 8:
            time.sleep(0.2)
        return self._computed_per_s(seconds)

    def _computed_per_s(self, seconds: float) -> float:
        """Of a load that has just begun, when it is under way."""
        time.sleep(seconds / 3)
        before, began = self.computed(), time.monotonic()
        time.sleep(seconds)
        return (self.computed() - before) / (time.monotonic() - began)

    def moments(self, number: int) -> list[float]:
        """When the requests of a round's trace come, in seconds."""
        asked = self._arguments
        return bursts(
            number, self.capacity, seconds=asked.seconds, base=asked.base, burst=asked.burst,
            burst_s=asked.burst_s, period_s=asked.period_s,
        )  # fmt: skip

    async def online(
        self, moments: list[float], *, capacity: float = 0.0, fill: bool = False
    ) -> Played:
        """Play a trace; with `fill` as many requests of low priority as the engine takes beside."""
        seconds, first_s = self._arguments.seconds, self._arguments.period_s
        fillers = self._places if fill else 0
        async with (
            client() as session,
            under_way(self._fill(session, number) for number in range(fillers)),
        ):
            await asyncio.sleep(self._arguments.alone_s if fill else 1)  # until they are under way
            aborted, began = await asyncio.to_thread(self.aborted), time.monotonic()
            timings: list[tuple[float, float]] = []

            async def one(moment: float) -> None:
                await asyncio.sleep(began + moment - time.monotonic())
                timings.append(await self._ask(session))

            asked = [asyncio.create_task(one(moment)) for moment in moments]
            await asyncio.sleep(began + first_s - time.monotonic())
            before, first_s = await asyncio.to_thread(self.finished), time.monotonic() - began
            done, answered = len(timings), self._answered
            await asyncio.sleep(began + seconds - time.monotonic())
            done, answered = len(timings) - done, self._answered - answered
            seconds = time.monotonic() - began - first_s
            total = await asyncio.to_thread(self.finished) - before
            aborted = await asyncio.to_thread(self.aborted) - aborted
            await asyncio.gather(*asked)
        return Played(
            seconds=seconds, asked=sum(moment >= first_s for moment in moments), finished=done,
            batch=total - done, computed=answered / self._tokens, aborted=aborted,
            timings=timings, capacity=capacity,
        )  # fmt: skip

    async def saturate(self, seconds: float) -> float:
        """As many requests at any time as the engine has places; gives how many a second."""

        async def one_by_one(session: aiohttp.ClientSession) -> None:
            while True:
                await self._ask(session)

        async with (
            client() as session,
            under_way(one_by_one(session) for _ in range(self._places)),
        ):
            return await asyncio.to_thread(self._computed_per_s, seconds)

    async def spike(self) -> list[float]:
        """So many requests in one moment; gives seconds to their first tokens."""
        async with client() as session:
            asked = (self._ask(session) for _ in range(self._arguments.spike))
            timings = await asyncio.gather(*asked)
        return [ttft for ttft, _ in timings]

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
        self._online_at_s = last
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

        config = {
            "engine": {"model": str(self._folder / "model"), "served_model_name": NAME,
                       **on_ray(arguments.engine)},
            "harvest": self._harvest,
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
            sys.executable, str(ROOT / "benchmarks/colocate.py"),
            "--engine", self._arguments.engine, "--serve-vllm", str(self._folder / "model"),
        ]  # fmt: skip
        with answering(command, URL, dict(os.environ)):
            yield

    @contextmanager
    def job(self) -> Iterator[None]:
        """A batch job of many rows on our service, for as long as the block lasts."""
        source = self._folder / "rows.jsonl"
        self._jobs += 1  # or the prefix cache would know its rows from the job before
        with source.open("w") as stream:
            for number in range(40_000):
                prompt = f"{self._jobs} {number} {self._prompts[number % len(self._prompts)]}"
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
