"""An HTTP proxy before an S3 server, which breaks what it is told to break."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Request:
    """What arrived at the proxy. Header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Exchange:
    """One request, and the means to answer it."""

    def __init__(self, proxy: "FaultProxy", handler: BaseHTTPRequestHandler) -> None:
        self._proxy, self._handler = proxy, handler
        headers = {name.lower(): value for name, value in handler.headers.items()}
        body = handler.rfile.read(int(headers.get("content-length", 0)))
        self.request = Request(handler.command, handler.path, headers, body)

    def forward(self, *, without: str | None = None) -> Reply:
        """Have the server carry the request out."""
        dropped = {"expect", "connection", without}
        headers = {k: v for k, v in self.request.headers.items() if k not in dropped}
        upstream = http.client.HTTPConnection(self._proxy.upstream)
        try:
            upstream.request(self.request.method, self.request.path, self.request.body, headers)
            response = upstream.getresponse()
            skipped = {"connection", "transfer-encoding"}
            kept = [(k, v) for k, v in response.getheaders() if k.lower() not in skipped]
            return Reply(response.status, kept, response.read())
        finally:
            upstream.close()

    def send(self, reply: Reply, first_bytes: int | None = None) -> None:
        """Answer; with `first_bytes` the connection ends after so much of the body."""
        self._handler.send_response_only(reply.status)
        for name, value in reply.headers:
            self._handler.send_header(name, value)
        self._handler.end_headers()
        self._handler.wfile.write(reply.body[:first_bytes])
        if first_bytes is not None:
            self.hang_up()

    def refuse(self, status: int, code: str, message: str = "") -> None:
        """Answer with an S3 error."""
        text = f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>".encode()
        headers = [("Content-Length", str(len(text))), ("Content-Type", "application/xml")]
        body = b"" if self.request.method == "HEAD" else text
        self.send(Reply(status, headers, body))

    def hang_up(self) -> None:
        """End the connection."""
        self._handler.close_connection = True

    def reset(self) -> None:
        """End the connection as a host does that has lost it: by an RST."""
        now = struct.pack("ii", 1, 0)
        self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        self.hang_up()


Fault = Callable[[Exchange], None]


def cut_after(size: int) -> Fault:
    """The body ends after so many bytes."""
    return lambda exchange: exchange.send(exchange.forward(), size)


def refusal(status: int, code: str, message: str = "") -> Fault:
    """The server answers with an error, and does nothing."""
    return lambda exchange: exchange.refuse(status, code, message)


def hang_up(exchange: Exchange) -> None:
    """The server ends the connection without an answer, and does nothing."""
    exchange.hang_up()


def reset(exchange: Exchange) -> None:
    """The connection is reset without an answer, and the server does nothing."""
    exchange.reset()


def stall(seconds: float) -> Fault:
    """The server carries the request out, and takes so long to answer."""

    def fault(exchange: Exchange) -> None:
        reply = exchange.forward()
        time.sleep(seconds)
        exchange.send(reply)

    return fault


def lose_answer(exchange: Exchange) -> None:
    """The server carries the request out, and its answer never arrives."""
    exchange.forward()
    exchange.hang_up()


def ignore_header(name: str) -> Fault:
    """The server does not know a header."""
    return lambda exchange: exchange.send(exchange.forward(without=name))


@dataclass
class _Rule:
    method: str
    fault: Fault
    header: str | None
    left: float


@dataclass
class FaultProxy:
    """Forwards everything, except what a rule made by `on`, or `choose`, says."""

    url: str
    upstream: str
    choose: Callable[[Request], Fault | None] | None = None
    """Asked about every request, from many threads; with it, `requests` are not kept."""
    requests: list[Request] = field(default_factory=list)
    _rules: list[_Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def on(self, method: str, fault: Fault, *, times: float = 1, header: str | None = None) -> None:
        """Do this to the next requests of a method, or to those of them that have a header."""
        self._rules.append(_Rule(method, fault, header, times))

    def sent(self, method: str) -> list[Request]:
        """The requests of a method, in order."""
        return [request for request in self.requests if request.method == method]

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        exchange = Exchange(self, handler)
        if self.choose is not None:
            fault = self.choose(exchange.request)
            fault(exchange) if fault else exchange.send(exchange.forward())
            return
        with self._lock:
            self.requests.append(exchange.request)
            rule = next((rule for rule in self._rules if self._applies(rule, exchange)), None)
            if rule:
                rule.left -= 1
        if rule:
            rule.fault(exchange)
        else:
            exchange.send(exchange.forward())

    def _applies(self, rule: _Rule, exchange: Exchange) -> bool:
        request = exchange.request
        named = rule.header is None or rule.header in request.headers
        return rule.left > 0 and rule.method == request.method and named


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A running proxy before the server at a URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            proxy.handle(self)

        do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = do  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def shutdown_request(self, request: Any) -> None:
            self.close_request(request)  # without a FIN first: it is a reset if it shall be one

        def handle_error(self, *_: Any) -> None:
            """A client that goes away in the middle of an answer is what these tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}", urlsplit(upstream).netloc)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
