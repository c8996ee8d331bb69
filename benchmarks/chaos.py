"""A fault campaign: a batch job, S3 to S3, while everything around it is killed and breaks.

    python benchmarks/chaos.py --rows 1000000 --kills 40 --seed 0

Several Ray nodes run on this machine. At random moments, which the seed decides, the campaign
SIGKILLs shard workers, raylets, the head's GCS and the driver, takes the S3 server away, and fills
the disk under Ray; all the time the S3 server answers a share of its requests by 500, 503 SlowDown,
a connection that ends or is reset, a stall or a cut body, and the wall clocks of driver and workers
jump. An operator's only part is to run the same command again until it ends with 0.

It passes when no row is lost, none is there twice, all are right, at most 1% of the answers were
given in vain, and the driver's memory does not grow with its rows. "Given in vain" counts every
answer of an engine beyond one a row: (answers - rows) / rows. It is judged where there are 20,000
rows a fault, and else only told.
"""

import argparse
import os
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from chaos_faults import Campaign, small_disk
from chaos_nodes import Nodes
from chaos_rows import Found, check, write_prompts
from chaos_store import BUCKET, Store, failing_store
from rich.console import Console
from rich.table import Table

from phi4ray.storage import join

ROOT = Path(__file__).resolve().parent.parent
CLOCK_S = 86400.0
MOST_GROWTH_MIB = 64.0
MOST_IN_VAIN = 0.01
ROWS_A_FAULT_TO_JUDGE_BY = 20_000
"""What a killed worker had open may be more than 1% of fewer rows."""


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
        write_prompts(join(prefix, "prompts/"), arguments.rows)
        nodes = Nodes(arguments.nodes, folder, folder / "ray")
        stack.callback(nodes.close)
        campaign = Campaign(
            nodes,
            store,
            disk,
            random.Random(arguments.seed),
            count=arguments.kills,
            parts=-(-arguments.rows // arguments.shard_rows),
            engines=arguments.engine != "fake",
        )
        began = time.monotonic()
        try:
            job = command(arguments, prefix, folder)
            campaign.run(job, driver_environment(nodes, store), folder, arguments.max_minutes)
        finally:
            answers = sum(path.stat().st_size for path in (folder / "answers").iterdir())
            seconds = time.monotonic() - began
            keep_logs(folder, arguments.logs)
        fake = arguments.engine == "fake"
        found = check(join(prefix, "answers/"), arguments.rows, fake=fake)
        passed = report(console, arguments, campaign, found, answers, seconds)
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


def driver_environment(nodes: Nodes, store: Store) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "benchmarks" / "injected"), str(ROOT)])
    told = {"RAY_ADDRESS": nodes.address, "AWS_ENDPOINT_URL": store.url, "PYTHONPATH": path}
    return {**os.environ, **told}


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


def keep_logs(folder: Path, target: Path | None) -> None:
    if target is not None:
        target.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.log"):
            (target / path.name).write_bytes(path.read_bytes())


def report(
    console: Console,
    arguments: argparse.Namespace,
    campaign: Campaign,
    found: Found,
    answers: int,
    seconds: float,
) -> bool:
    """Print the table; True if everything holds."""
    rows, store = arguments.rows, campaign.store
    in_vain = (answers - rows) / rows
    peak = max(mib for run in campaign.runs for _, mib in run.memory)
    growth = max(run.growth_mib for run in campaign.runs)
    longest = max(run.memory[-1][0] - run.memory[0][0] for run in campaign.runs if run.memory)
    codes = Counter(run.exit_code for run in campaign.runs)
    table = Table(title=f"fault campaign, seed {arguments.seed}", show_header=False)
    lines = [
        ("rows", f"{rows:,} in {len(store.parts):,} parts"),
        ("minutes", f"{seconds / 60:.1f}"),
        ("faults", f"{campaign.done.total()} of {arguments.kills} before the job was done"),
        *((f"  {kind}", f"{n:,}") for kind, n in sorted(campaign.done.items())),
        ("starts of nodes", f"{campaign.nodes.starts:,}"),
        ("runs of the command", ", ".join(f"{n} ended with {c}" for c, n in codes.items())),
        ("requests to S3", f"{store.requests:,}"),
        *((f"  {name}", f"{n:,}") for name, n in sorted(store.faults.items())),
        ("lost rows", f"{found.lost:,}"),
        ("duplicate rows", f"{found.duplicates:,}"),
        ("wrong rows", f"{found.wrong:,}"),
        ("answers of engines", f"{answers:,}"),
        ("given in vain", f"{answers - rows:,} ({in_vain:.2%} of the rows)"),
        ("driver's peak memory", f"{peak:.0f} MiB"),
        ("its growth in one run", f"{growth:.0f} MiB at most, in up to {longest:,} parts"),
    ]
    for name, value in lines:
        table.add_row(name, value)
    console.print(table)
    checks = {
        "no row is lost": not found.lost,
        "no row is there twice": not found.duplicates,
        "every row is right": not found.wrong,
        "the driver's memory is flat": growth <= MOST_GROWTH_MIB,
    }
    if rows >= ROWS_A_FAULT_TO_JUDGE_BY * arguments.kills:
        checks["at most 1% given in vain"] = 0 <= in_vain <= MOST_IN_VAIN
    for name, holds in checks.items():
        console.print(f"{'pass' if holds else 'FAIL'}  {name}")
    return all(checks.values())


if __name__ == "__main__":
    main()
