"""An S3 server by real HTTP for the tests that need one: moto's, in this process."""

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import settings
from moto.server import ThreadedMotoServer
from xdist.scheduler import LoadScopeScheduling

from phi4ray.storage import s3

# How long an example takes says more of the machine than of the code.
settings.register_profile("phi4ray", deadline=None)
# HYPOTHESIS_PROFILE=long runs tests/unit/test_fuzz_*.py for minutes, see tests/fuzz.py.
settings.register_profile("long", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "phi4ray"))


# Of the tests with clusters, the files that deploy no application of Ray Serve.
WITHOUT_SERVE = {
    f"tests/cluster/test_{name}.py"
    for name in ("finetune", "fit", "job", "limits", "local", "readme", "shared", "stop")
}


class SideBySide(LoadScopeScheduling):  # type: ignore[misc]
    """One test with Ray Serve at a time, whose ports are fixed, and beside it one with Ray alone.

    Both come first, each in a process; then those of other files, which may share what a file has
    started, as an engine.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        if file in WITHOUT_SERVE or file.startswith("tests/crash/"):
            return "ray"
        return "serve" if file.startswith("tests/cluster/") else file


@pytest.hookimpl(optionalhook=True)  # one process, -p no:xdist, asks for none
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SideBySide:
    return SideBySide(config, log)


def pytest_unconfigure() -> None:
    # What ends after pytest, as vLLM's guards, would log to streams that are closed by then.
    logging.raiseExceptions = False


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_prefix(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder in a bucket of its own; the AWS variables lead to it."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    httpx.put(f"{s3_endpoint}/{bucket}").raise_for_status()
    yield from connected(s3_endpoint, monkeypatch, f"s3://{bucket}/folder/")


def connected(endpoint: str, monkeypatch: pytest.MonkeyPatch, prefix: str) -> Iterator[str]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.delenv("AWS_REGION", raising=False)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    s3._client.cache_clear()
    yield prefix
    s3._client.cache_clear()


@pytest.fixture(params=["local", "s3"])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder in every kind of store."""
    if request.param == "local":
        return f"{tmp_path}/"
    found: str = request.getfixturevalue("s3_prefix")
    return found
