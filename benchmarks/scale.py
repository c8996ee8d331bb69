"""Our own machinery without an engine: plan, run, interrupt and resume a job with the fake one.

    python benchmarks/scale.py --rows 1000000
    python benchmarks/scale.py --rows 20000000 --shard-rows 1000 --synthesize

Prints the seconds of each step: planning, the run up to an interruption when half the parts are
there, listing, the run of the other half, and adding it all up; and the driver's peak memory after
each. With `--synthesize` rows are not answered one by one: workers write each part with the
project's own writer, from results that are made up. All that the driver does is the same.
"""

import argparse
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pyarrow as pa
from rich.console import Console

from cluster.batch import RayExecutor
from cluster.local import connected
from cluster.worker import ShardCalls
from phi4ray.batch.carried import decode_schema
from phi4ray.batch.manifest import list_parts
from phi4ray.batch.parts import Receipt, Result, make_receipt, part_table, write_part
from phi4ray.batch.plan import Plan
from phi4ray.batch.planning import obtain_plan
from phi4ray.batch.run import answer, finish, pending_shards
from phi4ray.batch.tally import Snapshot
from phi4ray.batch.worker import ShardWorker, WorkerStats
from phi4ray.config import BatchConfig, batch_config

FILES = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shard-rows", type=int, default=5000)
    parser.add_argument("--replicas", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    parser.add_argument("--shards-in-flight", type=int, help="of each replica")
    parser.add_argument("--num-cpus", type=int, default=os.cpu_count())
    parser.add_argument("--synthesize", action="store_true", help="write parts, answer no row")
    parser.add_argument("--s3", action="store_true", help="answers go to moto's S3 server")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phi4ray-scale-")))
        write_prompts(folder / "prompts", arguments.rows)
        output = stack.enter_context(s3_folder()) if arguments.s3 else str(folder / "answers")
        config = batch_config(
            {
                "input": [str(folder / "prompts")],
                "output": output,
                "engine": {"kind": "fake", "model": "fake"},
                "sampling": {"max_tokens": 16},
                "shard_rows": arguments.shard_rows,
                "min_replicas": arguments.replicas,
                "max_replicas": arguments.replicas,
                "shards_in_flight": arguments.shards_in_flight,
            }
        )
        stack.enter_context(connected(num_cpus=arguments.num_cpus))
        measure(config, arguments)


def write_prompts(folder: Path, rows: int) -> None:
    folder.mkdir()
    for file in range(FILES):
        with (folder / f"{file}.jsonl").open("w") as stream:
            for row in range(file, rows, FILES):
                why = f"Prompt {row}: what is {row} plus {row * 7 % 1000}, and why does it matter?"
                stream.write(f'{{"id": "row-{row}", "prompt": "{why}"}}\n')


@contextlib.contextmanager
def s3_folder() -> Iterator[str]:
    """A folder of an S3 server in a process of its own; the AWS variables lead there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, bucket = f"http://127.0.0.1:{port}", f"scale-{uuid.uuid4().hex[:8]}"
    os.environ |= {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
    }  # fmt: skip
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        client = httpx.Client(transport=httpx.HTTPTransport(retries=10))
        client.put(f"{url}/{bucket}").raise_for_status()
        yield f"s3://{bucket}/answers"
    finally:
        server.terminate()
        server.wait()


class PartWriter:
    """What `ShardCalls` needs of a `phi4ray.batch.worker.ShardWorker`; asks no engine."""

    def __init__(self, config: BatchConfig, plan: Plan) -> None:
        self._config, self._plan = config, plan
        self._carried = decode_schema(plan.carried)

    def stats(self) -> WorkerStats:
        return WorkerStats()

    async def run(self, index: int) -> Receipt:
        started_at = time.time()
        results = [
            Result(
                id=f"row-{piece.row_start + row}",
                source_file=self._plan.inputs[piece.file].uri,
                source_row=piece.row_start + row,
                text="fake:0123456789abcdef",
                finish_reason="stop",
                response='{"object": "chat.completion"}',
                prompt_tokens=16,
                completion_tokens=4,
                attempts=1,
                latency_s=0.01,
            )
            for piece in self._plan.shards[index].slices
            for row in range(piece.rows)
        ]
        carried = pa.table([pa.nulls(len(results), kind) for kind in self._carried.types],
                           schema=self._carried)  # fmt: skip
        receipt = make_receipt(self._plan.plan_id, index, results, started_at, time.time())
        return write_part(self._config.output, self._plan, part_table(results, carried, receipt))


class RayPartWriter(ShardCalls):
    """`ShardCalls` around a `PartWriter`."""

    async def _start(self, config: BatchConfig, plan: Plan) -> ShardWorker:
        await super()._start(config, plan)
        return cast(ShardWorker, PartWriter(config, plan))


class WritingExecutor(RayExecutor):
    worker: Any = RayPartWriter


class HalfwayError(Exception):
    """Half of the rows are done."""


class Clock:
    """Seconds and peak memory of the driver, step by step."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        seconds = round(time.monotonic() - began, 2)
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        self.steps[name] = {"seconds": seconds, "driver_peak_mib": peak_mib}
        print(f"{name}: {seconds} s, driver's peak {peak_mib} MiB", file=sys.stderr, flush=True)


def measure(config: BatchConfig, arguments: argparse.Namespace) -> None:
    console, clock = Console(stderr=True), Clock()

    def executor() -> RayExecutor:
        return WritingExecutor(console) if arguments.synthesize else RayExecutor(console)

    def halfway(snapshot: Snapshot) -> None:
        if snapshot.rows_done >= arguments.rows // 2:
            raise HalfwayError

    with clock.step("plan"):
        plan = obtain_plan(config, executor())
    with clock.step("run of the first half"), contextlib.suppress(HalfwayError):
        answer(config, plan, pending_shards(config, plan), executor(), console, halfway)
    with clock.step("list"):
        listed = len(list_parts(config.output, plan))
    with clock.step("resume: read the plan"):
        again = obtain_plan(config, executor())
    with clock.step("resume: find what is pending"):
        pending = pending_shards(config, again)
    with clock.step("resume: run of the rest"):
        facts = answer(config, again, pending, executor(), console)
    with clock.step("finish"):
        summary = finish(config, again, facts, executor())
    with clock.step("list all"):
        parts = len(list_parts(config.output, plan))
    assert parts == len(plan.shards)
    assert summary.rows == arguments.rows
    assert not summary.error_rows
    seconds = facts.engine_s or 0.0
    result = {
        "rows": arguments.rows,
        "parts": parts,
        "parts_at_the_interruption": listed,
        "parts_of_the_rest": len(pending),
        "replicas": arguments.replicas,
        "synthesized": arguments.synthesize,
        "plan_mib": round(len(plan.model_dump_json()) / (1 << 20), 1),
        "rows_per_s": round(facts.rows / seconds),
        "rows_per_s_and_replica": round(facts.rows / seconds / arguments.replicas),
        "steps": clock.steps,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
