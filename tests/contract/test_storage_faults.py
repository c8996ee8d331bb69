"""S3 servers that fail, cut off and differ: a proxy in front of moto makes them."""

import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from phi4ray.errors import AccessDeniedError, PreconditionError, StorageError, TransientStorageError
from phi4ray.storage import join, s3, storage_for

pytestmark = pytest.mark.slow


@dataclass
class Fault:
    """What the proxy does to the next requests of a method: `times` of them."""

    method: str
    times: int
    status: int = 0
    body: bytes = b""
    cut_after: int | None = None
    carry_out: bool = False


@dataclass
class Proxy:
    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    drop_headers: tuple[str, ...] = ()
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def proxy(s3_prefix: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    state = Proxy("")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            state.requests.append(f"{self.command} {self.headers.get('Range', '')}".strip())
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length)
            fault = next((f for f in state.faults if f.method == self.command and f.times), None)
            if fault is not None:
                fault.times -= 1
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in ("host", "content-length", *state.drop_headers)
            }
            if fault is None or fault.carry_out or fault.cut_after is not None:
                reply = httpx.request(
                    self.command, s3_endpoint + self.path, headers=headers, content=content
                )
            if fault is not None and fault.status:
                self.send_response(fault.status)
                self.send_header("Content-Length", str(len(fault.body)))
                self.end_headers()
                self.wfile.write(fault.body)
                return
            self.send_response(reply.status_code)
            for name, value in reply.headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            size = reply.headers.get("Content-Length", str(len(reply.content)))
            self.send_header("Content-Length", size)
            self.end_headers()
            if self.command != "HEAD":
                cut = fault.cut_after if fault is not None else None
                self.wfile.write(reply.content[:cut])
                if cut is not None:
                    self.close_connection = True

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = serve  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", state.endpoint)
    s3._client.cache_clear()
    yield state
    server.shutdown()
    server.server_close()


DATA = bytes(range(256)) * 20_000


def test_a_body_that_is_cut_off_is_read_on_from_there(proxy: Proxy, s3_prefix: str) -> None:
    uri = join(s3_prefix, "cut")
    storage_for(uri).write(uri, DATA)
    proxy.faults = [Fault("GET", 2, cut_after=1_500_000)]
    assert storage_for(uri).read(uri) == DATA
    proxy.faults = [Fault("GET", 1, cut_after=100), Fault("GET", 1, cut_after=2_000_000)]
    with storage_for(uri).open(uri) as stream:
        assert stream.read() == DATA


def test_reading_on_costs_one_request(proxy: Proxy, s3_prefix: str) -> None:
    uri = join(s3_prefix, "whole")
    storage_for(uri).write(uri, DATA)
    proxy.requests.clear()
    with storage_for(uri).open(uri) as stream:
        while stream.read(10_000):
            pass
    assert len([request for request in proxy.requests if request.startswith("GET")]) == 1


def test_an_object_that_changes_while_it_is_read_is_not_mixed(proxy: Proxy, s3_prefix: str) -> None:
    uri = join(s3_prefix, "changes")
    storage = storage_for(uri)
    storage.write(uri, DATA * 2)
    stream = storage.open(uri)
    assert stream.read(100) == DATA[:100]
    storage.write(uri, DATA[::-1] * 2)
    stream.seek(2 * len(DATA) - 10)
    with pytest.raises(PreconditionError):
        stream.read()


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_fails_now_and_then_is_asked_again(
    proxy: Proxy, s3_prefix: str, status: int
) -> None:
    uri = join(s3_prefix, "again")
    proxy.faults = [Fault("PUT", 2, status=status)]
    storage_for(uri).write(uri, b"there")
    proxy.faults = [Fault("GET", 2, status=status)]
    assert storage_for(uri).read(uri) == b"there"


def test_a_write_whose_answer_was_lost_is_known_as_our_own(proxy: Proxy, s3_prefix: str) -> None:
    uri = join(s3_prefix, "lost-answer")
    proxy.faults = [Fault("PUT", 1, status=500, carry_out=True)]
    storage_for(uri).write_new(uri, b"ours")
    assert storage_for(uri).read(uri) == b"ours"


def ignore_conditions(proxy: Proxy) -> None:
    proxy.drop_headers = ("if-none-match",)


def refuse_conditions(proxy: Proxy) -> None:
    body = b"<Error><Code>NotImplemented</Code><Message>no</Message></Error>"
    proxy.faults = [Fault("PUT", 1, 501, body)]


@pytest.mark.parametrize("differ", [ignore_conditions, refuse_conditions])
def test_servers_without_conditional_writes_take_plain_ones(
    proxy: Proxy, s3_prefix: str, differ: Callable[[Proxy], None]
) -> None:
    uri = join(s3_prefix, "plain")
    differ(proxy)
    storage_for(uri).write_new(uri, b"first")
    assert storage_for(uri).read(uri) == b"first"


def test_a_server_that_refuses_checksums_is_an_error_that_says_what_to_set(
    proxy: Proxy, s3_prefix: str
) -> None:
    uri = join(s3_prefix, "checksum")
    body = b"<Error><Code>XAmzContentSHA256Mismatch</Code><Message>m</Message></Error>"
    proxy.faults = [Fault("PUT", 1, 400, body)]
    with pytest.raises(StorageError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        storage_for(uri).write(uri, b"x")


def test_denied_access_names_the_variables(proxy: Proxy, s3_prefix: str) -> None:
    uri = join(s3_prefix, "denied")
    body = b"<Error><Code>AccessDenied</Code><Message>m</Message></Error>"
    proxy.faults = [Fault("PUT", 1, 403, body)]
    with pytest.raises(AccessDeniedError, match="AWS_SECRET_ACCESS_KEY"):
        storage_for(uri).write(uri, b"x")


def test_missing_credentials_say_what_to_set(
    s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    s3._client.cache_clear()
    with pytest.raises(AccessDeniedError, match="set AWS_ACCESS_KEY_ID"):
        storage_for(s3_prefix).read(join(s3_prefix, "x"))


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_a_server_that_is_not_there_is_a_transient_error_that_names_the_variable_it_is_from(
    s3_prefix: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setattr(s3, "RETRIES", 1)
    monkeypatch.setattr(s3, "_resumed", s3._resumed.copy(stop=lambda _: True))
    s3._client.cache_clear()
    with pytest.raises(TransientStorageError, match=f"network, and {variable}=http://127.0.0.1:9$"):
        storage_for(s3_prefix).read(join(s3_prefix, "x"))
