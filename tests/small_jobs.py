"""Small batch jobs on local files with the fake engine, in this process."""

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from phi4ray.batch.executor import InProcessExecutor
from phi4ray.batch.run import run_batch
from phi4ray.batch.summary import Summary
from phi4ray.config import BatchConfig, EngineConfig, batch_config
from phi4ray.engines import make_replica
from phi4ray.fake import FakeReplica
from phi4ray.protocol import Replica


def job(folder: Path, **changes: Any) -> BatchConfig:
    """A job from `<folder>/in/` to `<folder>/out`; changes may be nested, as `engine={...}`."""
    base = {
        "input": (f"{folder}/in/",),
        "output": f"{folder}/out",
        "engine": {"kind": "fake", "model": "tiny"},
    }
    return batch_config(base, changes)


def run(
    config: BatchConfig,
    make: Callable[[EngineConfig], Replica] = make_replica,
    console: Console | None = None,
) -> Summary:
    return run_batch(config, InProcessExecutor(make), console or Console(file=io.StringIO()))


def engine(**knobs: Any) -> Callable[[EngineConfig], Replica]:
    """A fake engine with knobs that are no part of the job: it may differ from run to run."""
    return lambda config: FakeReplica(config.model_copy(update={"engine_args": knobs}))


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    """Write JSONL; rows that are bytes go in as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_parquet(path: Path, table: pa.Table, row_group_size: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def prompts(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows that the fake engine answers with `fake_text("prompt <n>")`."""
    return [{"id": f"r{n}", "prompt": f"prompt {n}", "n": n} for n in range(start, start + count)]


def parts(config: BatchConfig) -> dict[str, Path]:
    """The parts of a job, by name, in order."""
    return {path.name: path for path in sorted(Path(config.output).rglob("part-*.parquet"))}


def answers(config: BatchConfig) -> list[dict[str, Any]]:
    """Every row of a job's output, in the order of the parts."""
    rows: list[dict[str, Any]] = []
    for path in parts(config).values():
        rows += pq.read_table(path, partitioning=None).to_pylist()
    return rows


def standing(config: BatchConfig) -> dict[str, tuple[bytes, int]]:
    """Content and time of every part: unchanged where nothing was written again."""
    return {
        name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in parts(config).items()
    }
