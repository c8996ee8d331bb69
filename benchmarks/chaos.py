"""A fault campaign: a batch job, S3 to S3, while everything around it is killed and breaks.

    python benchmarks/chaos.py --rows 1000000 --kills 40 --seed 0

Several Ray nodes run on this machine. At random moments, which the seed decides, the campaign
SIGKILLs shard workers, raylets, the head's GCS and the driver, takes the S3 server away, and fills
the disk under Ray; all the time the S3 server answers a share of its requests by 500, 503 SlowDown,
a connection that ends or is reset, a stall or a cut body, and the wall clocks of driver and workers
jump. An operator's only part is to run the same command again until it ends with 0.

It passes when no row is lost, none is there twice, all are right, at most 1% of the answers were
given in vain, and the driver's memory does not grow with its rows. "Given in vain" counts every
answer of an engine beyond one a row: (answers - rows) / rows.
"""

import argparse
import io
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from chaos_nodes import Nodes
from chaos_store import BUCKET, Store, failing_store
from rich.console import Console
from rich.table import Table

from phi4ray.fake import fake_text
from phi4ray.storage import join, storage_for

ROOT = Path(__file__).resolve().parent.parent
FILES = 8
CLOCK_S = 86400.0
MOST_IN_VAIN = 0.01
DISK_MIB = 512
DISK_FULL_S = 10.0
STORE_DOWN_S = 15.0
RETRY_S = 2.0
SETTLED_S = 30.0
"""A driver's memory is compared with what it was when it had run for so long."""
MOST_GROWTH_MIB = 64.0

ROWS_TO_JUDGE_BY = 100_000
"""What a few killed workers had open is more than 1% of fewer rows."""

# Of a hundred faults; engines have processes of their own with `--engine cpu`.
WEIGHTS = {
    "worker": 40, "raylet": 20, "driver": 15, "head": 10, "store": 8, "disk": 7, "engine": 20,
}  # fmt: skip
PROCESSES = {
    "worker": "ShardWorker", "raylet": "raylet", "head": "gcs_server", "engine": "EngineCore",
}  # fmt: skip


@dataclass
class Run:
    """One driver: how it ended, and its memory by its age in seconds."""

    exit_code: int | None = None
    rss_mib: list[tuple[float, float]] = field(default_factory=list)

    @property
    def growth_mib(self) -> float:
        """What its memory grew by after it had settled."""
        settled = [mib for age, mib in self.rss_mib if age >= SETTLED_S]
        return max(settled) - settled[0] if settled else 0.0


def main() -> None:
    arguments = parse()
    console = Console()
    console.print(f"seed {arguments.seed}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        store = stack.enter_context(failing_store(arguments.seed, arguments.fault_rate))
        (folder / "answers").mkdir()
        os.environ.update(environment(store, folder))
        disk = stack.enter_context(small_disk(folder / "ray"))
        if disk is None:
            console.print("no right to mount a small disk: it will not be filled")
        prefix = f"s3://{BUCKET}/job/"
        write_prompts(join(prefix, "prompts/"), arguments.rows, store)
        nodes = Nodes(arguments.nodes, folder, folder / "ray")
        stack.callback(nodes.close)
        campaign = Campaign(arguments, nodes, store, folder, disk)
        began = time.monotonic()
        try:
            campaign.run(command(arguments, prefix, folder))
        finally:
            answers = sum(path.stat().st_size for path in (folder / "answers").iterdir())
            seconds = time.monotonic() - began
            keep_logs(folder, arguments.logs)
        found = check(join(prefix, "answers/"), arguments, store)
        passed = report(console, arguments, campaign, store, found, answers, seconds)
    sys.exit(0 if passed else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--engine", choices=["fake", "cpu"], default="fake")
    parser.add_argument("--kills", type=int, default=40, help="faults besides those of requests")
    parser.add_argument("--fault-rate", type=float, default=0.02, help="of requests to S3")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 16))
    parser.add_argument("--nodes", type=int, default=3, help="besides the head")
    parser.add_argument("--shard-rows", type=int, default=250)
    parser.add_argument("--max-minutes", type=float, default=60)
    parser.add_argument("--logs", type=Path, help="a folder to keep the driver's and nodes' logs")
    return parser.parse_args()


def environment(store: Store, folder: Path) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": store.direct,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "PHI4RAY_CHAOS_ANSWERS": str(folder / "answers"),
        "PHI4RAY_CHAOS_CLOCK_S": str(CLOCK_S),
        # Ray's workers would write their names over their environment.
        "SPT_NOENV": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def command(arguments: argparse.Namespace, prefix: str, folder: Path) -> list[str]:
    engine = ["--recipe", "fake", "--engine-arg", "latency_s=0.01", "max_num_seqs=50"]
    if arguments.engine == "cpu":
        from phi4ray.train.tiny import make_tiny_model

        make_tiny_model(folder / "model")
        engine = ["--recipe", "tiny-cpu", "--model", str(folder / "model")]
    return [
        sys.executable, str(ROOT / "jobs" / "batch_infer.py"), *engine,
        "--input", join(prefix, "prompts/"), "--output", join(prefix, "answers/"),
        "--set", "max_tokens=16", "temperature=0", "--shard-rows", str(arguments.shard_rows),
        "--max-replicas", str(arguments.nodes),
    ]  # fmt: skip


def prompt_of(row: int) -> str:
    return f"Prompt {row}: what is {row} plus {row * 7 % 1000}, and why does it matter?"


def write_prompts(prompts: str, rows: int, store: Store) -> None:
    for file in range(FILES):
        lines = [
            json.dumps({"id": f"row-{row}", "prompt": prompt_of(row)}) + "\n"
            for row in range(file, rows, FILES)
        ]
        storage_for(prompts).write(join(prompts, f"{file}.jsonl"), "".join(lines).encode())


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own for what Ray writes, if this user may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Campaign:
    """Runs the job again and again, and does the planned faults as it goes on."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        nodes: Nodes,
        store: Store,
        folder: Path,
        disk: Path | None,
    ) -> None:
        random_ = random.Random(arguments.seed)
        missing = {"disk": disk is None, "engine": arguments.engine == "fake"}
        kinds = [kind for kind in WEIGHTS if not missing.get(kind)]
        # Each kind at least once.
        drawn = random_.choices(kinds, [WEIGHTS[kind] for kind in kinds], k=arguments.kills)
        drawn[: len(kinds)] = kinds[: len(drawn)]
        random_.shuffle(drawn)
        parts = -(-arguments.rows // arguments.shard_rows)
        places = sorted(random_.uniform(0, 0.95) * parts for _ in drawn)
        self.planned = list(zip(places, drawn, strict=True))
        self.done: Counter[str] = Counter()
        self.runs: list[Run] = []
        self._random = random_
        self._nodes, self._store, self._disk = nodes, store, disk
        self._log = folder / "driver.log"
        self._deadline = time.monotonic() + 60 * arguments.max_minutes
        self._ballast_until: float | None = None

    def run(self, command: list[str]) -> None:
        """Return when the job has ended with 0."""
        environment = {
            **os.environ,
            "RAY_ADDRESS": self._nodes.address,
            "AWS_ENDPOINT_URL": self._store.url,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks" / "injected"), str(ROOT)]),
        }
        while True:
            with self._log.open("ab") as log:
                driver = psutil.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
                run = Run()
                self.runs.append(run)
                try:
                    self._watch(driver, run)
                finally:
                    if driver.poll() is None:
                        driver.kill()
                    driver.wait()
                    self._free_disk(now=True)
            if run.exit_code == 0:
                return
            if run.exit_code in (2, 3):
                raise SystemExit(f"exit code {run.exit_code}: {self._log.read_text()[-3000:]}")
            time.sleep(RETRY_S)

    def _watch(self, driver: psutil.Popen, run: Run) -> None:
        """Until the driver ends: do what is planned, and look at its memory once a second."""
        began, sampled, due = time.monotonic(), 0.0, None
        while (code := driver.poll()) is None:
            now = time.monotonic()
            if now > self._deadline:
                raise SystemExit(f"not finished in time: {self._log.read_text()[-3000:]}")
            if now - sampled >= 1.0:
                sampled = now
                run.rss_mib.append((now - began, driver.memory_info().rss / (1 << 20)))
            self._free_disk()
            if self.planned and len(self._store.parts) >= self.planned[0][0]:
                if due is None:
                    due = now + self._random.uniform(0, 3)
                if now >= due and self._do(self.planned[0][1], driver):
                    self.done[self.planned.pop(0)[1]] += 1
                    due = None
            time.sleep(0.1)
        run.exit_code = code

    def _do(self, kind: str, driver: psutil.Popen) -> bool:
        """Do a fault; False where there is nothing to do it to yet."""
        if kind == "driver":
            driver.kill()
            return True
        if kind == "store":
            self._store.fail_for(self._random.uniform(0, 2 * STORE_DOWN_S))
            return True
        if kind == "disk":
            assert self._disk is not None
            fill(self._disk)
            self._ballast_until = time.monotonic() + DISK_FULL_S
            return True
        if kind == "head":
            return self._nodes.head.kill(PROCESSES[kind])
        nodes = self._random.sample(self._nodes.others, len(self._nodes.others))
        return any(node.kill(PROCESSES[kind]) for node in nodes)

    def _free_disk(self, *, now: bool = False) -> None:
        if self._ballast_until is not None and (now or time.monotonic() > self._ballast_until):
            assert self._disk is not None
            (self._disk / "ballast").unlink()
            self._ballast_until = None


def fill(disk: Path) -> None:
    """Write until there is no room left."""
    with (disk / "ballast").open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(1 << 16))
        except OSError:
            return


@dataclass(frozen=True)
class Found:
    """What stands in the output."""

    lost: int
    duplicates: int
    wrong: int


def check(answers: str, arguments: argparse.Namespace, store: Store) -> Found:
    """Read every part, past the faults, and hold its rows against the prompts."""
    storage = storage_for(answers)
    assert storage.read(join(answers, "_SUCCESS")) == b""
    counts = bytearray(arguments.rows)
    wrong = 0
    for item in storage.list(answers):
        if not item.uri.endswith(".parquet"):
            continue
        table = pq.read_table(io.BytesIO(storage.read(item.uri)), columns=["id", "text"])
        for name, text in zip(*(column.to_pylist() for column in table.columns), strict=True):
            row = int(name.removeprefix("row-"))
            counts[row] += 1
            right = text if arguments.engine == "cpu" else fake_text(prompt_of(row))
            wrong += text is None or text != right
    return Found(counts.count(0), sum(count - 1 for count in counts if count > 1), wrong)


def keep_logs(folder: Path, target: Path | None) -> None:
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.log"):
            (target / path.name).write_bytes(path.read_bytes())


def report(
    console: Console,
    arguments: argparse.Namespace,
    campaign: Campaign,
    store: Store,
    found: Found,
    answers: int,
    seconds: float,
) -> bool:
    """Print the table; True if everything holds."""
    rows = arguments.rows
    in_vain = (answers - rows) / rows
    peak = max(mib for run in campaign.runs for _, mib in run.rss_mib)
    growth = max(run.growth_mib for run in campaign.runs)
    longest = max(run.rss_mib[-1][0] for run in campaign.runs if run.rss_mib)
    codes = Counter(run.exit_code for run in campaign.runs)
    table = Table(title=f"fault campaign, seed {arguments.seed}", show_header=False)
    lines = [
        ("rows", f"{rows:,} in {len(store.parts):,} parts"),
        ("minutes", f"{seconds / 60:.1f}"),
        ("faults done", ", ".join(f"{kind} {n}" for kind, n in sorted(campaign.done.items()))),
        ("starts of nodes", f"{campaign._nodes.starts:,}"),
        ("runs of the command", ", ".join(f"{n} ended with {c}" for c, n in codes.items())),
        ("requests to S3", f"{store.requests:,}"),
        *((f"  {name}", f"{n:,}") for name, n in sorted(store.faults.items())),
        ("lost rows", f"{found.lost:,}"),
        ("duplicate rows", f"{found.duplicates:,}"),
        ("wrong rows", f"{found.wrong:,}"),
        ("answers of engines", f"{answers:,}"),
        ("given in vain", f"{answers - rows:,} ({in_vain:.2%} of the rows)"),
        ("driver's peak memory", f"{peak:.0f} MiB"),
        ("its growth after 30 s", f"{growth:.0f} MiB at most, in up to {longest:.0f} s"),
    ]
    for name, value in lines:
        table.add_row(name, value)
    console.print(table)
    checks = {
        "no row is lost": not found.lost,
        "no row is there twice": not found.duplicates,
        "every row is right": not found.wrong,
        "the driver's memory is flat": growth <= MOST_GROWTH_MIB,
        "all faults were done": not campaign.planned,
    }
    if rows >= ROWS_TO_JUDGE_BY:
        checks["at most 1% given in vain"] = 0 <= in_vain <= MOST_IN_VAIN
    for name, holds in checks.items():
        console.print(f"{'pass' if holds else 'FAIL'}  {name}")
    return all(checks.values())


if __name__ == "__main__":
    main()
