"""Small files and requests that stand for much, and what is done with them under test.

Everything here runs in processes of bounded memory, see `tests/bounded.py`.
"""

import asyncio
import gzip
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from phi4ray.batch.carried import decode_schema
from phi4ray.batch.executor import InProcessExecutor
from phi4ray.batch.files import Reader
from phi4ray.batch.planning import obtain_plan
from phi4ray.config import load_yaml
from phi4ray.errors import Phi4rayError
from phi4ray.fake import FakeReplica
from phi4ray.protocol import RowError
from phi4ray.serve.app import OnlineApp
from phi4ray.serve.config import serve_config
from tests.small_jobs import job

MIB = 1 << 20
PROMPT = b'{"prompt": "x"}\n'


def one_endless_line(path: Path) -> None:
    """Much without a line's end, in a file system that keeps none of it."""
    path.write_bytes(PROMPT)
    with path.open("r+b") as stream:
        stream.truncate(400 * MIB)
        stream.seek(0, 2)
        stream.write(b"\n" + PROMPT)


def packed(path: Path, block: bytes, times: int) -> None:
    """The same content many times, compressed once: both formats may be concatenated."""
    pack = gzip.compress if path.suffix == ".gz" else _zstd
    path.write_bytes(pack(PROMPT) + pack(block) * times)


def _zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def dictionary(size: int, rows: int) -> pa.Array:
    """One large text for many rows."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), ["a" * size])


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pq.write_table(pa.table(columns), path, compression="zstd", **options)


def make(name: str, folder: Path) -> None:
    """Write the bomb of this name into `<folder>/in/`."""
    path = folder / "in" / name
    path.parent.mkdir()
    match path.name.split(".")[0]:
        case "endless_line":
            one_endless_line(path)
        case "endless_packed_line":
            packed(path, b"a" * (16 * MIB), 16)
        case "endless_blank_line":
            packed(path, b" " * (16 * MIB), 16)
        case "large_rows":
            packed(path, b'{"prompt": "' + b"a" * (20 * MIB) + b'"}\n', 24)
        case "lists":
            path.write_bytes(PROMPT + b'{"prompt": "x", "m": [' + b"[]," * (10 * MIB) + b"1]}\n")
        case "members":
            members = ",".join(f'"m{n}": 1' for n in range(MIB))
            path.write_text(f'{{"prompt": "x", {members}}}\n')
        case "members_of_all":
            rows = (
                ",".join(f'"m{n}": 1' for n in range(row, row + 50))
                for row in range(0, 200_000, 50)
            )
            path.write_text("".join(f'{{"prompt": "x", {row}}}\n' for row in rows))
        case "columns":
            parquet(path, {"prompt": ["x"], **{f"c{n}": [1] for n in range(20_000)}})
        case "large_dictionary":
            size = 1 << 30
            parquet(path, {"prompt": dictionary(64 * MIB, 10)}, dictionary_pagesize_limit=size)
        case "often_used_dictionary":
            parquet(path, {"prompt": dictionary(8 * MIB, 100_000)})
        case "ids_of_a_dictionary":
            parquet(path, {"prompt": ["x"] * 10_000, "id": dictionary(8 * MIB, 10_000)})
        case "pages":
            texts = [chr(97 + n % 26) * MIB for n in range(520)]
            parquet(path, {"prompt": texts}, use_dictionary=False, write_statistics=False)
        case "claims":
            parquet(path, {"prompt": pa.nulls(20_000, pa.string())})
            # As Thrift writes both numbers: zigzag, seven bits a byte.
            path.write_bytes(path.read_bytes().replace(b"\xc0\xb8\x02", b"\xfe\xff\x7f"))


def read_all(folder: Path) -> list[str]:
    """Plan a job over `<folder>/in/` and read all its rows: their errors, or why it is refused."""
    config = job(folder)
    try:
        plan = obtain_plan(config, InProcessExecutor())
        reader = Reader(plan.inputs, decode_schema(plan.carried))
        found: list[str] = []
        for shard in plan.shards:
            for piece in shard.slices:
                rows = reader.read(piece).rows
                found += [row.code if isinstance(row, RowError) else "" for row in rows]
    except Phi4rayError as error:
        return [f"{type(error).__name__}: {error}"]
    return found


def ask(content: bytes) -> tuple[int, str]:
    """Send a body to a service; gives status and code."""
    config = serve_config({"engine": {"kind": "fake", "model": "m"}})
    app: Any = OnlineApp(FakeReplica(config.engine), config)

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://phi4") as client:
            return await client.post("/v1/chat/completions", content=content)

    answer = asyncio.run(post())
    return answer.status_code, answer.json()["error"]["code"]


def load(text: str) -> str:
    """Read a config file; gives why it is refused."""
    try:
        return repr(load_yaml(text, "a.yaml"))[:100]
    except Phi4rayError as error:
        return f"{type(error).__name__}: {error}"
