"""Credentials that expire, or that cannot be had for a while, and other failures that pass."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
)

from phi4ray.errors import AccessDeniedError, TransientStorageError
from phi4ray.storage import Storage, join, s3, storage_for
from tests.fault_proxy import FaultProxy, fault_proxy, refusal

PROCESS = "[default]\ncredential_process = false\n"


def keys(path: Path, number: int) -> None:
    """Write a file of credentials, as a tool does that renews them."""
    path.write_text(
        f"[default]\naws_access_key_id = KEY{number}\naws_secret_access_key = secret\n"
        f"aws_session_token = token{number}\n"
    )


@pytest.fixture
def file(tmp_path: Path, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that credentials come from, and nothing else does."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    s3._client.cache_clear()
    return tmp_path / "credentials"


@pytest.fixture
def proxy(s3_endpoint: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with fault_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3._client.cache_clear()
        yield proxy


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("GET", lambda storage, uri: storage.read(uri)),
        ("GET", lambda storage, uri: list(storage.list(uri))),
        ("HEAD", lambda storage, uri: storage.head(uri)),
        ("PUT", lambda storage, uri: storage.write_new(uri + "2", b"x")),
    ],
    ids=["read", "list", "head", "write"],
)
@pytest.mark.parametrize("code", ["ExpiredToken", "RequestExpired", "TokenRefreshRequired"])
def test_what_failed_for_expired_credentials_is_tried_again_with_those_of_the_renewed_file(
    proxy: FaultProxy,
    file: Path,
    s3_prefix: str,
    code: str,
    method: str,
    call: Callable[[Storage, str], object],
) -> None:
    keys(file, 1)
    uri = join(s3_prefix, "x")
    storage_for(uri).write(uri, b"x")
    # After such an answer to a HEAD the client asks for the bucket's region, by another one.
    times = 2 if method == "HEAD" else 1
    proxy.on(method, refusal(400, code, "The provided token has expired."), times=times)
    keys(file, 2)
    with pytest.raises(TransientStorageError, match="expired: renew them"):
        call(storage_for(uri), uri)
    call(storage_for(uri), uri)
    used = [request.headers["authorization"].split("/")[0] for request in proxy.sent(method)[-2:]]
    assert [name.partition("=")[2] for name in used] == ["KEY1", "KEY2"]


def test_credentials_that_were_missing_are_looked_for_again(file: Path, s3_prefix: str) -> None:
    uri = join(s3_prefix, "x")
    with pytest.raises(AccessDeniedError, match="there are no S3 credentials"):
        storage_for(uri).write(uri, b"x")
    keys(file, 1)
    storage_for(uri).write(uri, b"x")


def test_credentials_that_cannot_be_had_now_may_come_later(file: Path, s3_prefix: str) -> None:
    file.write_text(PROCESS)
    uri = join(s3_prefix, "x")
    with pytest.raises(TransientStorageError, match="check what gives this node credentials"):
        storage_for(uri).write(uri, b"x")
    keys(file, 1)
    storage_for(uri).write(uri, b"x")


def refused(code: str, status: int) -> ClientError:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "PutObject")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        CredentialRetrievalError(provider="iam-role", error_msg="timeout"),
        FlexibleChecksumError(error_msg="Expected checksum a did not match b"),
        refused("IncompleteBody", 400),
        refused("520", 520),
    ],
    ids=lambda error: str(error)[:40],
)
def test_failures_that_pass_are_transient(error: BotoCoreError | ClientError) -> None:
    with pytest.raises(TransientStorageError), s3._translated("s3://bucket/key"):
        raise error
