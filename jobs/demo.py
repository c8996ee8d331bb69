"""Everything on this machine: an S3 server in this process, a local Ray, a tiny Phi-4, one job.

make demo
"""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from jobs.flags import bare_parser
from phi4ray.batch.plan import REPORT_NAME
from phi4ray.storage import join, storage_for
from phi4ray.train.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".demo"
PROMPTS, ANSWERS = "s3://demo/prompts/", "s3://demo/answers/"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the job's exit code, 3 because one of its rows is wrong on purpose."""
    bare_parser("demo.py", __doc__ or "", "").parse_args(argv)
    console = Console(highlight=False)
    console.rule("a tiny model of Phi-4's architecture, with random weights")
    model = make_tiny_model(WORK / "tiny-phi-4")
    console.print(f"{model}: its answers are noise; everything around them is real")
    with embedded_s3() as endpoint:
        console.rule(f"an S3 server at {endpoint}")
        for path in sorted((ROOT / "examples").glob("*.jsonl")):
            storage_for(PROMPTS).write(join(PROMPTS, path.name), path.read_bytes())
            console.print(f"{path.relative_to(ROOT)} is now {join(PROMPTS, path.name)}")
        command = [
            "jobs/batch_infer.py", "--recipe", "tiny-cpu", "--model", str(model),
            "--input", PROMPTS, "--output", ANSWERS, "--set", "max_tokens=32", "--shard-rows", "5",
        ]  # fmt: skip
        console.rule(" ".join(["python", *command[:3], "…"]))
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if code in (0, 3):
            console.print(answers())
            report = WORK / "report.html"
            report.write_bytes(storage_for(ANSWERS).read(join(ANSWERS, REPORT_NAME)))
            console.print(f"the job's report: {report}")
    if code == 3:
        console.print("the job ended with 3: one row of examples/batch_lines.jsonl has no messages")
    return 0 if code in (0, 3) else code


@contextmanager
def embedded_s3() -> Iterator[str]:
    """Serve S3 from this process's memory, with an empty bucket `demo`; gives the endpoint.

    Inside the block neither this process nor its jobs know of another store, nor of a cluster.
    """
    from moto.server import ThreadedMotoServer  # of the extra `dev`

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # which tells of each request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        with patch.dict(os.environ):  # which is put back at the end
            for name in list(os.environ):
                if name.startswith("AWS_") or name == "RAY_ADDRESS":
                    del os.environ[name]
            os.environ |= {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ENDPOINT_URL_S3": endpoint,
                "AWS_ACCESS_KEY_ID": "demo",
                "AWS_SECRET_ACCESS_KEY": "demo",
                "AWS_REGION": "us-east-1",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            httpx.put(f"{endpoint}/demo").raise_for_status()
            yield endpoint
    finally:
        server.stop()


def answers() -> Table:
    """Read the parts as any program would, and show them."""
    storage = storage_for(ANSWERS)
    parts = [item.uri for item in storage.list(ANSWERS) if item.uri.endswith(".parquet")]
    rows = pa.concat_tables(pq.read_table(io.BytesIO(storage.read(uri))) for uri in parts)
    table = Table("id", "language", "text", "tokens", "error", title=ANSWERS)
    for row in rows.to_pylist():
        text = (row["text"] or "").replace("\n", " ")[:60]
        table.add_row(
            row["id"], row["language"], text, str(row["completion_tokens"] or ""), row["error_code"]
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
