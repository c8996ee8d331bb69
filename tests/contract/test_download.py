"""Checkpoints from s3:// on a node: copied once for all its processes, whole or not at all."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4ray.config import EngineConfig
from phi4ray.engines import MODEL_CACHE, download, make_replica, on_this_machine
from phi4ray.storage import copy_tree, join, s3, storage_for, upload_tree
from phi4ray.storage.copy import PIECE_BYTES
from phi4ray.train.tiny import make_tiny_model
from tests.fault_proxy import Exchange, FaultProxy, fault_proxy
from tests.tiny_engines import tiny_engine

pytestmark = pytest.mark.slow

WEIGHT = os.urandom(2 * PIECE_BYTES + 1)
FILES = {"config.json": b"{}", "empty": b"", "model.safetensors": WEIGHT}

DOWNLOAD = """
import sys
from phi4ray.engines import download
print("began", flush=True)
print(download(sys.argv[1]), flush=True)
"""


@pytest.fixture
def proxy(
    s3_endpoint: str, s3_prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FaultProxy]:
    """A proxy that sees what this process and its children ask the store for."""
    monkeypatch.setenv(MODEL_CACHE, str(tmp_path / "cache"))
    for name, data in FILES.items():
        storage_for(s3_prefix).write(join(s3_prefix, name), data)
    with fault_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3._client.cache_clear()
        yield proxy


def process(uri: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DOWNLOAD, uri]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def ranges(proxy: FaultProxy) -> list[str]:
    return sorted(r.headers["range"] for r in proxy.sent("GET") if "range" in r.headers)


PIECES = sorted(
    [
        "bytes=0-1",
        f"bytes=0-{PIECE_BYTES - 1}",
        f"bytes={PIECE_BYTES}-{2 * PIECE_BYTES - 1}",
        f"bytes={2 * PIECE_BYTES}-{2 * PIECE_BYTES}",
    ]
)


def test_a_large_file_is_read_in_pieces_at_once(proxy: FaultProxy, s3_prefix: str) -> None:
    assert contents(download(s3_prefix)) == FILES
    assert ranges(proxy) == PIECES


def test_a_local_folder_is_copied_in_pieces_too(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    for name, data in FILES.items():
        (tmp_path / "from" / name).write_bytes(data)
    assert contents(copy_tree(str(tmp_path / "from"), tmp_path / "to")) == FILES


def test_processes_of_a_node_share_one_download(proxy: FaultProxy, s3_prefix: str) -> None:
    processes = [process(s3_prefix) for _ in range(3)]
    folders = {one.communicate()[0].split()[-1] for one in processes}
    assert [one.returncode for one in processes] == [0, 0, 0]
    [folder] = folders
    assert contents(Path(folder)) == FILES
    assert ranges(proxy) == PIECES  # each piece once


def test_a_killed_download_leaves_nothing_that_looks_finished(
    proxy: FaultProxy, s3_prefix: str, tmp_path: Path
) -> None:
    stuck, over = threading.Event(), threading.Event()

    def hang(exchange: Exchange) -> None:
        stuck.set()
        over.wait(60)
        exchange.hang_up()

    for name, data in FILES.items():
        if data is not WEIGHT:
            storage_for(s3_prefix).delete(join(s3_prefix, name))
    proxy.on("GET", hang, header="range")
    killed = process(s3_prefix)
    assert stuck.wait(60)
    while not list((tmp_path / "cache").rglob(".model.safetensors.part")):
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    over.set()
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    assert contents(download(s3_prefix)) == {"model.safetensors": WEIGHT}


@pytest.mark.engine
def test_an_engine_streams_the_weights_that_another_reads_from_its_copy(
    s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("runai_model_streamer")
    monkeypatch.setenv(MODEL_CACHE, str(tmp_path / "cache"))
    upload_tree(make_tiny_model(tmp_path / "model"), s3_prefix)
    streamed = first_tokens(tiny_engine(s3_prefix, load_format="runai_streamer"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert streamed == first_tokens(tiny_engine(s3_prefix))
    assert list((tmp_path / "cache").rglob("model.safetensors"))


def first_tokens(config: EngineConfig) -> list[int]:
    async def ask() -> list[int]:
        replica = make_replica(config)
        await replica.start()
        body = {
            "model": "phi-4", "prompt": "Once upon", "max_tokens": 8, "temperature": 0,
            "return_token_ids": True,
        }  # fmt: skip
        try:
            answer = await replica.complete("/v1/completions", body)
        finally:
            await replica.stop()
        tokens: list[int] = answer.body["choices"][0]["token_ids"]
        return tokens

    return asyncio.run(ask())


def test_a_tokenizer_and_a_configuration_come_without_weights_which_may_follow(
    proxy: FaultProxy, s3_prefix: str
) -> None:
    folder = Path(on_this_machine(s3_prefix, weights=False))
    assert contents(folder) == {"config.json": b"{}", "empty": b""}
    assert download(s3_prefix) == folder
    assert contents(folder) == FILES
