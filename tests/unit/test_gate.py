"""The gate alone, around small applications: who gets in, with what, and what is given back."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
import yaml
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi4ray.errors import ConfigError
from phi4ray.protocol import Json
from phi4ray.serve.body import DEEPEST_JSON
from phi4ray.serve.gate import Gate, GateConfig
from phi4ray.serve.headers import FORM
from phi4ray.serve.limits import Spent
from phi4ray.serve.meter import Usage
from phi4ray.serve.observe import Observe
from phi4ray.serve.state import State
from phi4ray.serve.tenants import digest
from tests.waiting import until

CHAT = "/v1/chat/completions"
KEY = {"authorization": "Bearer secret"}
HELLO = b'{"model": "m", "messages": []}'


async def read_all(receive: Receive) -> bytes:
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


async def ok(send: Send, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


class App:
    """Keeps what reaches it, and answers it."""

    def __init__(self, status: int = 200, used: tuple[int, int] | None = None) -> None:
        self.bodies: list[bytes] = []
        self.states: list[State] = []
        self._status, self._used = status, used

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append(await read_all(receive))
        self.states.append(State.of(scope))
        if self._used:
            State.of(scope).usage = Usage(*self._used)
        await ok(send, self._status)


def gated(
    app: ASGIApp, demand: Callable[[str, Json | None], float] | None = None, **config: Any
) -> Gate:
    return Gate(app, GateConfig(**config), demand or (lambda path, body: 100))


def keys(folder: Path, **limits: Any) -> dict[str, Any]:
    tenant = {"name": "acme", "key_sha256": [digest("secret")], **limits}
    (folder / "keys.yaml").write_text(yaml.safe_dump({"tenants": [tenant]}))
    return {"keys_file": str(folder / "keys.yaml")}


def asked(gate: Gate, scenario: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(app=Observe(gate))
        async with httpx.AsyncClient(transport=transport, base_url="http://phi4") as client:
            await scenario(client)

    asyncio.run(run())


def answer_to(gate: Gate, path: str = CHAT, **request: Any) -> httpx.Response:
    answers: list[httpx.Response] = []

    async def scenario(client: httpx.AsyncClient) -> None:
        answers.append(await client.post(path, **{"content": HELLO, **request}))

    asked(gate, scenario)
    return answers[0]


def http_scope(**fields: Any) -> Scope:
    return {"type": "http", "method": "POST", "path": CHAT, "headers": [], **fields}


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer in OpenAI's shape."""
    error: dict[str, Any] = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    return error


# What the application behind it gets


def test_the_body_arrives_as_it_was_sent_and_decoded() -> None:
    app = App()
    answer_to(gated(app))
    assert app.bodies == [HELLO]
    assert app.states[0].body == {"model": "m", "messages": []}


def test_chunks_are_replayed_and_then_the_clients_hanging_up_is_heard() -> None:
    heard: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([await receive() for _ in range(3)])

    sent: list[Message] = [
        {"type": "http.request", "body": HELLO[:9], "more_body": True},
        {"type": "http.request", "body": HELLO[9:], "more_body": False},
        {"type": "http.disconnect"},
    ]
    coming = iter(sent)

    async def receive() -> Message:
        return next(coming)

    async def send(message: Message) -> None:
        raise AssertionError(message)

    asyncio.run(Observe(gated(app))(http_scope(), receive, send))
    assert heard == sent


@pytest.mark.parametrize(
    "fields",
    [
        [("content-type", "application/json")],
        [("content-type", "APPLICATION/JSON")],
        [("content-type", "application/json"), ("content-type", "text/plain")],
        [("content-type", "text/plain")],
        [],
    ],
)
def test_no_content_type_hides_a_body_from_the_limits(
    tmp_path: Path, fields: list[tuple[str, str]]
) -> None:
    gate = gated(App(), **keys(tmp_path, models=["other"]))
    answer = answer_to(gate, headers=[*fields, *KEY.items()])
    refused(answer, 403, "model_not_allowed")


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff\xfe\xfd", b"", b"7" * 5000, b"null"])
def test_what_is_no_json_object_passes_unchanged(body: bytes) -> None:
    app = App()
    assert answer_to(gated(app), content=body).status_code == 200
    assert app.bodies == [body]
    assert app.states[0].body is None


def nested(levels: int) -> bytes:
    return b'{"a": ' * (levels - 1) + b"[]" + b"}" * (levels - 1)


def test_nesting_goes_as_deep_as_said() -> None:
    assert answer_to(gated(App()), content=nested(DEEPEST_JSON)).status_code == 200


@pytest.mark.parametrize("levels", [DEEPEST_JSON + 1, 960, 100_000])
def test_deeper_nesting_is_refused_before_it_breaks_what_recurses_on_it(levels: int) -> None:
    app = App()
    refused(answer_to(gated(app), content=nested(levels)), 400, "invalid_json")
    assert app.bodies == []


def test_brackets_alone_are_not_nesting() -> None:
    body = json.dumps({"model": "m", "prompt": "[{" * 5000, "ids": [[1]] * 1000}).encode()
    assert answer_to(gated(App()), content=body).status_code == 200


def test_the_tenant_and_its_priority_go_with_the_request(tmp_path: Path) -> None:
    app = App()
    answer_to(gated(app, **keys(tmp_path, priority=-3)), headers=KEY)
    assert (app.states[0].tenant, app.states[0].priority) == ("acme", -3)


# Keys


def test_without_a_keys_file_the_door_is_open() -> None:
    app = App()
    assert answer_to(gated(app)).status_code == 200
    assert app.states[0].tenant is None


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"x-api-key": "no"}])
def test_a_request_without_a_valid_key_gets_401(tmp_path: Path, headers: dict[str, str]) -> None:
    app = App()
    answer = answer_to(gated(app, **keys(tmp_path)), headers=headers)
    error = refused(answer, 401, "invalid_api_key")
    assert error["type"] == "invalid_request_error"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert app.bodies == []


def test_a_body_is_not_read_before_its_key_is_known(tmp_path: Path) -> None:
    statuses: list[int] = []

    async def receive() -> Message:
        raise AssertionError("the body was asked for")

    async def send(message: Message) -> None:
        statuses.append(message.get("status", 0))

    asyncio.run(Observe(gated(App(), **keys(tmp_path)))(http_scope(), receive, send))
    assert statuses[0] == 401


def test_a_body_is_not_read_for_a_tenant_that_is_over_its_limits_whatever_is_in_it(
    tmp_path: Path,
) -> None:
    gate = gated(App(), **keys(tmp_path, requests_per_minute=1))
    answer_to(gate, headers=KEY)
    statuses: list[int] = []

    async def receive() -> Message:
        raise AssertionError("the body was asked for")

    async def send(message: Message) -> None:
        statuses.append(message.get("status", 0))

    scope = http_scope(headers=[(b"authorization", b"Bearer secret")])
    asyncio.run(Observe(gate)(scope, receive, send))
    assert statuses[0] == 429


PREFLIGHT = {
    "origin": "https://chat.example.com",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def test_a_browser_is_told_what_a_page_may_ask_without_a_key(tmp_path: Path) -> None:
    app = App()
    inner = CORSMiddleware(app, allow_origins=["*"], allow_headers=["*"], allow_methods=["*"])
    answers: list[httpx.Response] = []

    async def scenario(client: httpx.AsyncClient) -> None:
        answers.append(await client.options(CHAT, headers=PREFLIGHT))
        answers.append(await client.post(CHAT, content=HELLO, headers=PREFLIGHT))

    asked(gated(inner, **keys(tmp_path)), scenario)
    assert [answer.status_code for answer in answers] == [200, 401]
    allowed = answers[0].headers["access-control-allow-headers"].split(",")
    assert [name.strip() for name in allowed if "auth" in name.lower()] == ["authorization"]
    assert app.bodies == []


@pytest.mark.parametrize("missing", ["origin", "access-control-request-method"])
def test_what_only_looks_like_that_needs_a_key(tmp_path: Path, missing: str) -> None:
    headers = {name: value for name, value in PREFLIGHT.items() if name != missing}
    answers: list[httpx.Response] = []

    async def scenario(client: httpx.AsyncClient) -> None:
        answers.append(await client.options(CHAT, headers=headers))

    asked(gated(App(), **keys(tmp_path)), scenario)
    refused(answers[0], 401, "invalid_api_key")


def test_the_open_paths_are_the_configured_ones(tmp_path: Path) -> None:
    gate = gated(App(), open_paths=["/alive"], **keys(tmp_path))
    paths = ("/alive", "/alive/", "/alive/x", "/health", "/")
    statuses = [answer_to(gate, path).status_code for path in paths]
    assert statuses == [200, 200, 401, 401, 401]


def test_a_new_key_is_good_and_the_old_one_bad_without_a_restart(tmp_path: Path) -> None:
    gate = gated(App(), reload_interval_s=1e-9, **keys(tmp_path))
    assert answer_to(gate, headers=KEY).status_code == 200
    keys(tmp_path, key_sha256=[digest("newer")])
    assert answer_to(gate, headers=KEY).status_code == 401
    assert answer_to(gate, headers={"authorization": "Bearer newer"}).status_code == 200


def test_no_start_with_a_keys_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        gated(App(), keys_file=str(tmp_path / "none.yaml"))


def test_a_disabled_tenant_gets_403(tmp_path: Path) -> None:
    app = App()
    answer = answer_to(gated(app, **keys(tmp_path, disabled=True)), headers=KEY)
    refused(answer, 403, "tenant_disabled")
    assert app.bodies == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "m"}, 200),
        ({"model": "other"}, 403),
        ({"model": ["m"]}, 403),
        ({"model": ""}, 403),
        ({"model": None}, 403),
        ({}, 403),
    ],
)
def test_a_tenant_with_models_must_name_one_of_them(
    tmp_path: Path, body: Json, status: int
) -> None:
    gate = gated(App(), **keys(tmp_path, models=["m"]))
    assert answer_to(gate, json=body, content=None, headers=KEY).status_code == status


def test_a_tenant_with_models_may_not_ask_where_a_header_names_one(tmp_path: Path) -> None:
    header = {"x-amzn-sagemaker-adapter-identifier": "other"}
    gate = gated(App(), **keys(tmp_path, models=["m"]))
    refused(answer_to(gate, "/invocations", headers=KEY | header), 403, "model_not_allowed")
    refused(answer_to(gate, "/invocations", headers=KEY), 403, "model_not_allowed")
    assert answer_to(gated(App(), **keys(tmp_path)), "/invocations", headers=KEY).status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models", 200),
        ("/v1/models/m", 200),
        ("/v1/responses/resp_1/cancel", 200),
        ("/v1/completions/render", 200),
        ("/tokenize", 200),
        ("/metrics", 200),
        ("/v1/batches/batch_1/cancel", 200),
        ("/scale_elastic_ep", 404),
        ("/sleep", 404),
        ("/collective_rpc/", 404),
        ("/v1/load_lora_adapter", 404),
        ("/inference/v1/abort_requests", 404),
        ("/abort_requests", 404),
    ],
)
def test_what_runs_a_replica_is_not_for_tenants(tmp_path: Path, path: str, status: int) -> None:
    assert answer_to(gated(App(), **keys(tmp_path)), path, headers=KEY).status_code == status


@pytest.mark.parametrize(
    "kind",
    ["multipart/form-data; boundary=x", "Multipart/Mixed", FORM.decode(), f"{FORM.decode()};"],
)
def test_a_tenant_with_models_may_not_hide_one_in_a_form(tmp_path: Path, kind: str) -> None:
    app = App()
    gate = gated(app, **keys(tmp_path, models=["m"]))
    path = "/v1/audio/transcriptions"
    form = {"content-type": kind}
    refused(answer_to(gate, path, headers=KEY | form), 403, "model_not_allowed")
    twice = [*KEY.items(), *form.items(), ("content-type", "application/json")]
    assert answer_to(gate, path, headers=twice).status_code == 403
    assert answer_to(gate, path, headers=twice[::-1]).status_code == 403
    assert app.bodies == []


def test_a_tenant_that_may_use_all_models_may_send_forms(tmp_path: Path) -> None:
    app = App()
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert answer_to(gated(app, **keys(tmp_path)), headers=KEY | form).status_code == 200
    assert app.bodies == [HELLO]


def test_a_websocket_has_no_key_and_is_closed_where_keys_are_needed(tmp_path: Path) -> None:
    reached: list[str] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["type"])

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    socket_scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    asyncio.run(Observe(gated(app, **keys(tmp_path)))(socket_scope, receive, send))
    assert (reached, [message["type"] for message in sent]) == ([], ["websocket.close"])
    asyncio.run(Observe(gated(app))(socket_scope, receive, send))
    assert reached == ["websocket"]


def test_no_key_and_no_prompt_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = gated(App(), **keys(tmp_path, requests_per_minute=1))
    body = {"model": "m", "prompt": "confidential"}
    with caplog.at_level(logging.DEBUG):
        for key in ("secret", "secret", "wrong-key"):
            answer_to(gate, json=body, content=None, headers={"authorization": f"Bearer {key}"})
    assert len(caplog.records) >= 3
    for private in ("secret", "wrong-key", "confidential", digest("secret")):
        assert private not in caplog.text


# Sizes


@pytest.mark.parametrize(
    ("config", "headers"),
    [
        ({"max_header_bytes": 1000}, {"x-long": "y" * 1000}),
        ({"max_headers": 20}, {f"x-{n}": "y" for n in range(20)}),
    ],
)
def test_headers_beyond_their_limits_get_431(
    config: dict[str, Any], headers: dict[str, str]
) -> None:
    assert answer_to(gated(App(), **config)).status_code == 200
    refused(answer_to(gated(App(), **config), headers=headers), 431, "headers_too_large")


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1001, 413)])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_its_limit_gets_413(size: int, status: int, chunked: bool) -> None:
    async def chunks() -> Any:
        yield b"x" * (size - 1)
        yield b"x"

    app = App()
    answer = answer_to(
        gated(app, max_body_bytes=1000), content=chunks() if chunked else b"x" * size
    )
    assert answer.status_code == status
    assert [len(body) for body in app.bodies] == ([size] if status == 200 else [])
    if status == 413:
        refused(answer, 413, "body_too_large")


# Limits


def test_admitted_answers_tell_what_is_left(tmp_path: Path) -> None:
    gate = gated(App(), **keys(tmp_path, requests_per_minute=10, tokens_per_minute=1000))
    headers = answer_to(gate, headers=KEY).headers
    assert headers["x-ratelimit-limit-requests"] == "10"
    assert headers["x-ratelimit-remaining-requests"] == "9"
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert headers["x-ratelimit-remaining-tokens"] == "900"
    assert headers["x-ratelimit-reset-requests"] == "6.0s"
    assert headers["x-ratelimit-reset-tokens"] == "6.0s"


def test_a_tenant_without_limits_is_told_of_none(tmp_path: Path) -> None:
    headers = answer_to(gated(App(), **keys(tmp_path)), headers=KEY).headers
    assert [name for name in headers if name.startswith("x-ratelimit")] == []


def test_over_the_limit_is_429_with_when_to_come_back(tmp_path: Path) -> None:
    app = App()
    gate = gated(app, **keys(tmp_path, tokens_per_minute=120))
    answer_to(gate, headers=KEY)
    answer = answer_to(gate, headers=KEY)
    refused(answer, 429, "rate_limit_exceeded")
    # Eighty tokens are missing, and two come in a second; some were earned since.
    assert 30 <= int(answer.headers["retry-after"]) <= 40
    # What is left is rounded down: who is told of a token can have it.
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) <= 100
    assert len(app.bodies) == 1


def test_what_a_tenant_spent_elsewhere_counts_before_its_first_request_here(tmp_path: Path) -> None:
    gate = gated(App(), reload_interval_s=1e-9, **keys(tmp_path, requests_per_minute=5))
    gate.limiter.absorb({"acme": Spent(requests=5)}, time.monotonic())
    refused(answer_to(gate, headers=KEY), 429, "rate_limit_exceeded")


def test_so_it_does_for_a_tenant_that_came_with_a_new_keys_file(tmp_path: Path) -> None:
    gate = gated(App(), reload_interval_s=1e-9, **keys(tmp_path, name="other"))
    keys(tmp_path, requests_per_minute=5)
    answer_to(gate, headers={"authorization": "Bearer wrong"})
    gate.limiter.absorb({"acme": Spent(requests=5)}, time.monotonic())
    refused(answer_to(gate, headers=KEY), 429, "rate_limit_exceeded")


def test_the_demand_is_of_the_path_and_the_body(tmp_path: Path) -> None:
    asked_for: list[tuple[str, Json | None]] = []

    def demand(path: str, body: Json | None) -> float:
        asked_for.append((path, body))
        return 0

    answer_to(gated(App(), demand, **keys(tmp_path)), headers=KEY)
    assert asked_for == [(CHAT, {"model": "m", "messages": []})]


@pytest.mark.parametrize(
    ("app", "left"),
    [(App(used=(7, 3)), 990), (App(), 900), (App(status=400), 1000), (App(status=503), 1000)],
)
def test_what_was_not_used_goes_back(tmp_path: Path, app: App, left: int) -> None:
    gate = gated(app, **keys(tmp_path, tokens_per_minute=1000))
    answer_to(gate, headers=KEY)
    assert gate.limiter.take_spent()["acme"].tokens == 1000 - left


def test_openais_client_knows_each_refusal(tmp_path: Path) -> None:
    gate = gated(App(), **keys(tmp_path, requests_per_minute=1, models=["m"]))

    async def scenario(http: Any) -> None:
        def asks(key: str, model: str) -> Awaitable[Any]:
            client = openai.AsyncOpenAI(
                api_key=key, base_url="http://phi4/v1", http_client=http, max_retries=0
            )
            return client.chat.completions.create(model=model, messages=[])

        with pytest.raises(openai.AuthenticationError) as unknown:
            await asks("wrong", "m")
        assert unknown.value.code == "invalid_api_key"
        with pytest.raises(openai.PermissionDeniedError):
            await asks("secret", "other")
        await asks("secret", "m")
        with pytest.raises(openai.RateLimitError) as limited:
            await asks("secret", "m")
        assert limited.value.code == "rate_limit_exceeded"

    asked(gate, scenario)


# A place among the requests at once is given back, whatever ends a request


def running(gate: Gate) -> int:
    spent = gate.limiter.take_spent()
    return spent["acme"].running if spent else 0


def test_a_place_is_given_back_when_the_answer_is_sent(tmp_path: Path) -> None:
    gate = gated(App(), **keys(tmp_path, max_concurrency=1))
    for _ in range(3):
        assert answer_to(gate, headers=KEY).status_code == 200
    assert running(gate) == 0


def test_a_place_is_given_back_when_the_application_fails(tmp_path: Path) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("broken")

    gate = gated(app, **keys(tmp_path, max_concurrency=1))
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            answer_to(gate, headers=KEY)
    assert running(gate) == 0


def test_a_place_is_given_back_when_the_request_is_cancelled(tmp_path: Path) -> None:
    seen: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(running(gate))
        await asyncio.sleep(3600)

    gate = gated(app, **keys(tmp_path, max_concurrency=1))

    async def scenario(client: httpx.AsyncClient) -> None:
        request = asyncio.create_task(client.post(CHAT, content=HELLO, headers=KEY))
        while not seen:
            await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    asked(gate, scenario)
    assert seen == [1]
    assert running(gate) == 0


# Over real sockets


@contextmanager
def listening(gate: Gate) -> Iterator[uvicorn.Server]:
    """Run the gate in a real HTTP server."""
    app: Any = Observe(gate)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started, 10)
        yield server
    finally:
        server.should_exit = True
        thread.join()


def connected(server: uvicorn.Server, *fields: str) -> socket.socket:
    """A request whose head is sent, and nothing of its body."""
    port = server.servers[0].sockets[0].getsockname()[1]
    head = (f"POST {CHAT} HTTP/1.1", "host: x", "authorization: Bearer secret", *fields, "", "")
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall("\r\n".join(head).encode())
    return connection


def test_a_chunked_body_is_cut_off_as_soon_as_it_is_too_large(tmp_path: Path) -> None:
    app = App()
    gate = gated(app, max_body_bytes=1000, **keys(tmp_path, requests_per_minute=1))
    with listening(gate) as server, connected(server, "transfer-encoding: chunked") as connection:
        for _ in range(3):  # and the body does not end here
            connection.sendall(b"1f4\r\n" + b"x" * 500 + b"\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 413")
    assert app.bodies == []
    assert gate.limiter.take_spent() == {}


def test_a_client_that_hangs_up_while_it_sends_costs_its_tenant_nothing(tmp_path: Path) -> None:
    app = App()
    gate = gated(app, **keys(tmp_path, requests_per_minute=1))
    with listening(gate) as server:
        with connected(server, "content-length: 1000") as connection:
            connection.sendall(HELLO)
            until(lambda: server.server_state.tasks, 10)
        until(lambda: not server.server_state.tasks, 10)
        with connected(server, f"content-length: {len(HELLO)}") as connection:
            connection.sendall(HELLO)
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
    assert app.bodies == [HELLO]


def test_bodies_that_still_come_count_among_the_requests_at_once(tmp_path: Path) -> None:
    gate = gated(App(), **keys(tmp_path, max_concurrency=1))
    with listening(gate) as server:
        with connected(server, "content-length: 1000"):
            until(lambda: server.server_state.tasks, 10)
            with connected(server, "content-length: 1000") as connection:
                assert connection.recv(64).startswith(b"HTTP/1.1 429")
        until(lambda: not server.server_state.tasks, 10)
    assert running(gate) == 0


def test_a_client_that_hangs_up_in_the_stream_gives_its_place_back(tmp_path: Path) -> None:
    places: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_all(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    gate = gated(app, **keys(tmp_path, max_concurrency=1))
    with listening(gate) as server:
        for _ in range(2):
            with connected(server, f"content-length: {len(HELLO)}") as connection:
                connection.sendall(HELLO)
                assert connection.recv(64).startswith(b"HTTP/1.1 200")
                places.append(running(gate))
            until(lambda: running(gate) == 0, 10)
    assert places == [1, 1]
