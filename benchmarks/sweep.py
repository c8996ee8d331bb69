"""Throughput of bare vLLM by its engine arguments: what the recipes should say, and why.

    python benchmarks/sweep.py --engine h200 --changes max_num_seqs=512 async_scheduling=false

Each change is made to the engine arguments of `engines.py`, alone or several at once
(`max_num_seqs=512,max_num_batched_tokens=8192`); values are those of `--engine-arg`. First, and for
comparison, the arguments as they are. Each set has a process of its own and the same rows; what
cannot start is told and passed over.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from batch_overhead import prepare
from engines import ENGINES
from rich.console import Console
from rich.table import Table
from schemes import in_process

from jobs.flags import pairs

CHANGES = (
    "max_num_seqs=256", "max_num_seqs=512", "max_num_seqs=2048",
    "max_num_batched_tokens=4096", "max_num_batched_tokens=8192", "max_num_batched_tokens=32768",
    "async_scheduling=false", 'compilation_config={"max_cudagraph_capture_size":1024}',
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engine", choices=sorted(ENGINES), default="cpu")
    parser.add_argument(
        "--shape", default="ragged:512x256", help="of the rows, see batch_overhead.py"
    )
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--changes", nargs="*", default=list(CHANGES), metavar="KEY=VALUE[,…]")
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="phi4ray-") as name:
        prepare(Path(name), arguments.engine, arguments.shape, arguments.rows)
        for change in ["", *arguments.changes]:
            result = in_process(arguments.engine, changed(change), Path(name))
            found.append({"change": change or "none"} | result)
            print(json.dumps(found[-1]), flush=True)
    show(found)


def changed(text: str) -> dict[str, Any]:
    """Engine arguments from `key=value,key=value`; commas inside of a value part nothing."""
    return pairs("--changes", re.split(r",(?=\w+=)", text) if text else [])


def show(found: list[dict[str, Any]]) -> None:
    table = Table("change", "seconds", "tok/s", "of none", "KV tokens", "start s")
    base = found[0].get("tokens_per_s")
    for row in found:
        if "failed" in row:
            table.add_row(row["change"], "failed")
            continue
        table.add_row(
            row["change"], f"{row['seconds']:.1f}", f"{row['tokens_per_s']:,}",
            f"{row['tokens_per_s'] / base:.3f}" if base else "",
            f"{row.get('kv_tokens', 0):,.0f}", f"{row.get('start_s', 0):.0f}",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
