"""How many requests are sent, how often again, and what is made of each refusal."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phi4ray.errors import (
    AccessDeniedError,
    ConfigError,
    ObjectNotFoundError,
    PreconditionError,
    StorageError,
    TransientStorageError,
)
from phi4ray.storage import Storage, copy_tree, expand, join, s3, storage_for
from tests.fault_proxy import (
    Exchange,
    Fault,
    FaultProxy,
    cut_after,
    fault_proxy,
    hang_up,
    ignore_header,
    lose_answer,
    refusal,
    reset,
)

pytestmark = pytest.mark.slow

MIB = 1 << 20
DATA = os.urandom(3 * MIB)
ALWAYS = float("inf")
ATTEMPTS = 1 + s3.RETRIES
"""How often one request is sent at most."""

SLOW_DOWN = refusal(503, "SlowDown", "Please reduce your request rate.")


@pytest.fixture
def proxy(
    s3_endpoint: str, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    """A proxy that all requests go through, and no pauses between attempts."""
    retries = "botocore.retries.standard.ExponentialBackoff.delay_amount"
    monkeypatch.setattr(retries, lambda *_: 0)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for retrying in (s3._resumed, s3._unconflicted):
        monkeypatch.setattr(retrying, "sleep", lambda _: None)
    with fault_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3._client.cache_clear()
        yield proxy


@pytest.fixture
def uri(s3_prefix: str, proxy: FaultProxy) -> str:
    """An object of 3 MiB behind the proxy."""
    uri = join(s3_prefix, "data")
    storage_for(uri).write(uri, DATA)
    proxy.requests.clear()
    return uri


@pytest.fixture
def new(s3_prefix: str, proxy: FaultProxy) -> str:
    """The URI of an object that is not there."""
    return join(s3_prefix, "new")


def ranges(proxy: FaultProxy) -> list[str]:
    return [request.headers["range"] for request in proxy.sent("GET")]


# Bodies that are cut


def test_a_read_goes_on_where_the_body_was_cut(proxy: FaultProxy, uri: str) -> None:
    proxy.on("GET", cut_after(MIB + 7))
    proxy.on("GET", cut_after(5))
    proxy.on("GET", cut_after(0))
    assert storage_for(uri).read(uri) == DATA
    starts = [int(text.removeprefix("bytes=").split("-")[0]) for text in ranges(proxy)]
    assert len(starts) == 4
    assert starts[0] == 0
    assert MIB <= starts[1] <= starts[2] <= starts[3] < 2 * MIB


@pytest.mark.parametrize("replacement", [DATA[::-1], b"short"], ids=["as long", "shorter"])
@pytest.mark.parametrize("honoured", [True, False], ids=["If-Match", "no If-Match"])
@pytest.mark.parametrize("way", ["read", "open"])
def test_an_object_replaced_between_two_requests_is_not_mixed(
    proxy: FaultProxy, uri: str, way: str, honoured: bool, replacement: bytes
) -> None:
    def replace_after(exchange: Exchange) -> None:
        reply = exchange.forward()
        storage_for(uri).write(uri, replacement)
        exchange.send(reply, MIB + 7)

    proxy.on("GET", replace_after)
    if not honoured:
        proxy.on("GET", ignore_header("if-match"), times=ALWAYS)
    storage = storage_for(uri)
    with pytest.raises(PreconditionError, match="data"):
        storage.read(uri) if way == "read" else storage.open(uri).read()


def test_a_server_without_ranges_is_refused_and_not_misread(proxy: FaultProxy, uri: str) -> None:
    proxy.on("GET", ignore_header("range"), times=ALWAYS)
    assert storage_for(uri).read(uri) == DATA
    with pytest.raises(StorageError, match="Range"):
        storage_for(uri).read(uri, 5, 10)


def test_a_connection_that_never_gives_a_byte_is_given_up(proxy: FaultProxy, uri: str) -> None:
    proxy.on("GET", cut_after(0), times=ALWAYS)
    with pytest.raises(TransientStorageError, match="data"):
        storage_for(uri).read(uri)
    assert len(proxy.sent("GET")) <= ATTEMPTS


def test_a_slow_line_that_always_gives_some_bytes_is_not_given_up(
    proxy: FaultProxy, uri: str
) -> None:
    proxy.on("GET", cut_after(len(DATA) // 25), times=30)
    with storage_for(uri).open(uri) as stream:
        assert stream.read() == DATA


# Requests of a stream


def test_a_far_seek_is_a_new_request(proxy: FaultProxy, s3_prefix: str) -> None:
    uri, size = join(s3_prefix, "far"), 12 * MIB
    storage_for(uri).write(uri, bytes(size - 1) + b"x")
    with storage_for(uri).open(uri) as stream:
        stream.read(10)
        stream.seek(size - 1)
        assert stream.read() == b"x"
        stream.seek(0)
        assert stream.read(1) == b"\0"
    last = size - 1
    assert ranges(proxy) == [f"bytes=0-{last}", f"bytes={last}-{last}", f"bytes=0-{last}"]


# Requests that are refused


CALLS: list[tuple[str, Callable[[Storage, str], object]]] = [
    ("GET", lambda storage, uri: storage.read(uri)),
    ("GET", lambda storage, uri: list(storage.list(uri))),
    ("HEAD", lambda storage, uri: storage.head(uri)),
    ("PUT", lambda storage, uri: storage.write(uri, b"x")),
    ("DELETE", lambda storage, uri: storage.delete(uri)),
]
calls = pytest.mark.parametrize(
    ("method", "call"), CALLS, ids=["read", "list", "head", "write", "delete"]
)
busy = pytest.mark.parametrize(
    "fault",
    [SLOW_DOWN, hang_up, reset],
    ids=["slow down", "hung up", "reset"],
)


@calls
@busy
def test_a_passing_failure_is_not_seen(
    proxy: FaultProxy, uri: str, method: str, call: Callable[[Storage, str], object], fault: Fault
) -> None:
    proxy.on(method, fault, times=3)
    call(storage_for(uri), uri)
    assert len(proxy.sent(method)) == 4


@calls
@busy
def test_a_lasting_failure_is_transient_after_so_many_attempts(
    proxy: FaultProxy, uri: str, method: str, call: Callable[[Storage, str], object], fault: Fault
) -> None:
    proxy.on(method, fault, times=ALWAYS)
    with pytest.raises(TransientStorageError, match="s3://test-"):
        call(storage_for(uri), uri)
    assert len(proxy.sent(method)) == ATTEMPTS


@calls
def test_a_refusal_names_the_bucket_and_the_variables(
    proxy: FaultProxy, uri: str, method: str, call: Callable[[Storage, str], object]
) -> None:
    proxy.on(method, refusal(403, "AccessDenied", "no s3:checksum for you"), times=ALWAYS)
    with pytest.raises(AccessDeniedError) as caught:
        call(storage_for(uri), uri)
    for word in (uri.split("/")[2], "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert word in str(caught.value)
    assert "CHECKSUM" not in str(caught.value)
    assert len(proxy.sent(method)) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("AWS_ENDPOINT_URL", "localhost:9000"), ("AWS_PROFILE", "no-such-profile")],
)
def test_a_wrong_variable_is_told_as_a_wrong_configuration(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    s3._client.cache_clear()
    with pytest.raises(ConfigError, match=value):
        storage_for("s3://bucket/key").head("s3://bucket/key")


@pytest.mark.parametrize(
    ("variables", "region"),
    [
        ({}, "us-east-1"),
        ({"AWS_DEFAULT_REGION": "fr-par"}, "fr-par"),
        ({"AWS_REGION": "fr-par"}, "fr-par"),
        ({"AWS_REGION": "fr-par", "AWS_DEFAULT_REGION": "nl-ams"}, "fr-par"),
        ({"AWS_REGION": "", "AWS_DEFAULT_REGION": "nl-ams"}, "nl-ams"),
    ],
)
def test_requests_are_signed_for_the_region_that_the_environment_names(
    proxy: FaultProxy,
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    region: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    s3._client.cache_clear()
    proxy.requests.clear()
    storage_for(uri).read(uri)
    [request] = proxy.sent("GET")
    assert f"/{region}/s3/aws4_request" in request.headers["authorization"]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "XAmzContentSHA256Mismatch", "The provided value does not match."),
        (411, "MissingContentLength", "You must provide the Content-Length HTTP header."),
        (400, "InvalidArgument", "x-amz-checksum-crc32 is not known"),
        (501, "NotImplemented", "Transfer-Encoding aws-chunked with trailer"),
    ],
)
def test_a_server_that_refuses_checksums_gets_advice(
    proxy: FaultProxy, new: str, status: int, code: str, message: str
) -> None:
    proxy.on("PUT", refusal(status, code, message), times=ALWAYS)
    with pytest.raises(StorageError) as caught:
        storage_for(new).write_new(new, b"x")
    assert type(caught.value) is StorageError
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in str(caught.value)
    assert "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required" in str(caught.value)


def test_the_advice_makes_the_client_send_no_checksums(
    proxy: FaultProxy, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    s3._client.cache_clear()
    storage_for(new).write(new, b"x")
    (request,) = proxy.sent("PUT")
    assert [name for name in request.headers if "checksum" in name or "trailer" in name] == []


# Writing what is not there yet


UNSUPPORTED = pytest.mark.parametrize(
    "fault",
    [
        refusal(501, "NotImplemented", "A header implies functionality that is not implemented"),
        refusal(400, "InvalidArgument", "If-None-Match is not supported"),
        refusal(400, "InvalidArgument"),
    ],
    ids=["501", "400 with the name", "400"],
)


@UNSUPPORTED
def test_a_server_without_conditions_is_asked_first(
    proxy: FaultProxy, new: str, fault: Fault
) -> None:
    proxy.on("PUT", fault, header="if-none-match", times=ALWAYS)
    storage_for(new).write_new(new, b"first")
    with pytest.raises(PreconditionError, match="new"):
        storage_for(new).write_new(new, b"second")
    assert storage_for(new).read(new) == b"first"


def test_a_server_that_ignores_conditions_keeps_the_last_writer_whole(
    proxy: FaultProxy, new: str
) -> None:
    proxy.on("PUT", ignore_header("if-none-match"), times=ALWAYS)
    storage_for(new).write_new(new, b"first")
    storage_for(new).write_new(new, b"second")
    assert storage_for(new).read(new) == b"second"


@pytest.mark.parametrize("known", [True, False], ids=["digest given", "no digest"])
def test_a_write_whose_answer_was_lost_is_known_as_ours(
    proxy: FaultProxy, new: str, known: bool
) -> None:
    proxy.on("PUT", lose_answer)
    storage_for(new).write_new(new, b"ours", sha256="00ff" if known else None)
    assert len(proxy.sent("PUT")) == 2
    assert storage_for(new).read(new) == b"ours"


def test_a_write_that_another_won_meanwhile_is_not_ours(proxy: FaultProxy, new: str) -> None:
    def lose_to_another(exchange: Exchange) -> None:
        storage_for(new).write(new, b"theirs")
        exchange.hang_up()

    proxy.on("PUT", lose_to_another, header="if-none-match")
    with pytest.raises(PreconditionError, match="new"):
        storage_for(new).write_new(new, b"ours")
    assert storage_for(new).read(new) == b"theirs"


CONFLICT = refusal(409, "ConditionalRequestConflict", "A conflicting operation is in progress.")


def test_a_conflict_between_writers_is_tried_again(proxy: FaultProxy, new: str) -> None:
    proxy.on("PUT", CONFLICT, times=2)
    storage_for(new).write_new(new, b"ours")
    assert storage_for(new).read(new) == b"ours"


def test_a_conflict_that_the_other_writer_won_is_lost(proxy: FaultProxy, new: str) -> None:
    def lose_to_another(exchange: Exchange) -> None:
        storage_for(new).write(new, b"theirs")
        CONFLICT(exchange)

    proxy.on("PUT", lose_to_another, header="if-none-match")
    with pytest.raises(PreconditionError):
        storage_for(new).write_new(new, b"ours")
    assert storage_for(new).read(new) == b"theirs"


def test_a_lasting_conflict_is_transient(proxy: FaultProxy, new: str) -> None:
    proxy.on("PUT", CONFLICT, times=ALWAYS)
    with pytest.raises(TransientStorageError):
        storage_for(new).write_new(new, b"ours")
    assert len(proxy.sent("PUT")) == s3.RETRIES


# What is built on it


def test_a_listing_that_breaks_midway_is_an_error_and_not_a_short_list(
    proxy: FaultProxy, uri: str
) -> None:
    def first_page_then_nothing(exchange: Exchange) -> None:
        reply = exchange.forward()
        body = reply.body.replace(
            b"<IsTruncated>false</IsTruncated>",
            b"<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>",
        )
        assert body != reply.body
        headers = [(k, v) for k, v in reply.headers if k.lower() != "content-length"]
        headers.append(("Content-Length", str(len(body))))
        exchange.send(type(reply)(reply.status, headers, body))

    proxy.on("GET", first_page_then_nothing)
    proxy.on("GET", SLOW_DOWN, times=ALWAYS)
    with pytest.raises(TransientStorageError):
        expand([f"{uri.rpartition('/')[0]}/*"])


def test_a_copy_repairs_itself_and_then_reads_nothing(
    proxy: FaultProxy, s3_prefix: str, tmp_path: Path
) -> None:
    for name in ("m/a", "m/b/c"):
        storage_for(s3_prefix).write(join(s3_prefix, name), DATA)
    proxy.requests.clear()
    proxy.on("GET", cut_after(MIB), header="range", times=2)
    folder = copy_tree(join(s3_prefix, "m"), tmp_path / "copy")
    assert (folder / "a").read_bytes() == (folder / "b" / "c").read_bytes() == DATA
    proxy.requests.clear()
    copy_tree(join(s3_prefix, "m"), folder)
    assert [request.path.split("?")[1][:9] for request in proxy.requests] == ["list-type"]


def test_a_copy_that_fails_leaves_no_half_file_under_a_name(
    proxy: FaultProxy, s3_prefix: str, tmp_path: Path
) -> None:
    storage_for(s3_prefix).write(join(s3_prefix, "m/a"), DATA)
    proxy.on("GET", cut_after(MIB), header="range")
    proxy.on("GET", refusal(404, "NoSuchKey"), header="range")
    with pytest.raises(ObjectNotFoundError):
        copy_tree(join(s3_prefix, "m"), tmp_path / "copy")
    assert not (tmp_path / "copy" / "a").exists()
    copy_tree(join(s3_prefix, "m"), tmp_path / "copy")
    assert (tmp_path / "copy" / "a").read_bytes() == DATA
