"""The layers around a replica's application, with the fake engine: what each request meets."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from phi4ray.fake import FakeReplica
from phi4ray.serve.app import OnlineApp
from phi4ray.serve.config import serve_config
from phi4ray.serve.observe import Observe
from phi4ray.serve.tenants import digest
from tests.waiting import until

CHAT = "/v1/chat/completions"
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def online(
    engine: dict[str, Any] | None = None, *, max_model_len: int = 16384, **settings: Any
) -> OnlineApp:
    return with_replica(engine, max_model_len, **settings)[0]


def with_replica(
    engine: dict[str, Any] | None = None, max_model_len: int = 16384, **settings: Any
) -> tuple[OnlineApp, FakeReplica]:
    kind = {"kind": "fake", "model": "m", "max_model_len": max_model_len}
    config = serve_config({"engine": {**kind, "engine_args": engine or {}}, **settings})
    replica = FakeReplica(config.engine)
    return OnlineApp(replica, config), replica


@asynccontextmanager
async def client_of(app: OnlineApp, prefix: str = "") -> AsyncIterator[httpx.AsyncClient]:
    # As Serve and uvicorn do: the prefix is in `root_path` and in `path`.
    transport = httpx.ASGITransport(app=app, root_path=prefix)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url=f"http://phi4{prefix}") as client:
        yield client


async def begun(
    app: OnlineApp, request: Coroutine[Any, Any, httpx.Response]
) -> "asyncio.Task[httpx.Response]":
    """A request that runs on while others are sent."""
    running = asyncio.create_task(request)
    while not app.admission.running:
        await asyncio.sleep(0)
    return running


def asked(
    app: OnlineApp,
    scenario: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]],
    prefix: str = "",
) -> Any:
    async def run() -> Any:
        async with client_of(app, prefix) as client:
            return await scenario(client)

    return asyncio.run(run())


def with_keys(folder: Path, **limits: Any) -> dict[str, Any]:
    tenant = {"name": "acme", "key_sha256": [digest("secret")], **limits}
    (folder / "keys.yaml").write_text(yaml.safe_dump({"tenants": [tenant]}))
    return {"gate": {"keys_file": str(folder / "keys.yaml")}}


KEY = {"authorization": "Bearer secret"}


def test_an_answer_passes_through_whole_and_streamed() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        whole = (await client.post(CHAT, json=HELLO)).json()
        streamed = await client.post(CHAT, json=HELLO | {"stream": True})
        lines = [line for line in streamed.text.splitlines() if line]
        assert lines[-1] == "data: [DONE]"
        parts = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        text = "".join(part["choices"][0]["delta"]["content"] for part in parts)
        assert text == whole["choices"][0]["message"]["content"]

    asked(online(), scenario)


def test_over_capacity_a_request_waits_and_then_gets_429_with_retry_after() -> None:
    app = online(
        {"latency_s": 0.5, "kv_cache_size_tokens": 100}, admission={"queue_timeout_s": 0.1}
    )

    async def scenario(client: httpx.AsyncClient) -> list[httpx.Response]:
        body = HELLO | {"max_tokens": 90}
        return list(await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(3))))

    answers = asked(app, scenario)
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "engine_overloaded"
    assert refused.json()["error"]["type"] == "rate_limit_error"


LONG = "word " * 200
SAID = {"role": "user", "content": LONG}
COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, {"messages": [SAID]}, 400),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}, 400),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 60}] * 2}, 400),
        (COMPLETIONS, {"prompt": LONG}, 400),
        (COMPLETIONS, {"prompt": ["a", LONG], "n": 4}, 400),
        (COMPLETIONS, {"prompt": "x" * 13_000}, 400),
        (COMPLETIONS, {"prompt": [1] * 500}, 400),
        # What vLLM may cut, leave out or find short enough waits for room.
        (CHAT, {"messages": [SAID], "truncate_prompt_tokens": -1}, 429),
        (CHAT, {"messages": [{"role": "tool", "content": LONG}]}, 429),
        (CHAT, HELLO | {"prompt": LONG}, 429),
        (COMPLETIONS, {"prompt": " " * 12_000}, 429),
    ],
)
def test_what_is_surely_too_long_waits_for_no_room_to_be_refused(
    path: str, body: dict[str, Any], status: int
) -> None:
    app = online(
        {"latency_s": 0.02, "kv_cache_size_tokens": 100},
        max_model_len=100,
        admission={"queue_timeout_s": 0},
    )

    async def scenario(client: httpx.AsyncClient) -> None:
        running = await begun(app, client.post(CHAT, json=HELLO | {"max_tokens": 90}))
        assert (await client.post(path, json=body)).status_code == status
        assert (await running).status_code == 200

    asked(app, scenario)


def test_no_request_counts_as_more_than_the_models_context() -> None:
    app = online(
        {"latency_s": 0.02, "kv_cache_size_tokens": 1000},
        max_model_len=300,
        admission={"queue_timeout_s": 0},
    )

    async def scenario(client: httpx.AsyncClient) -> None:
        running = await begun(app, client.post(CHAT, json=HELLO | {"max_tokens": 250}))
        unknown = await client.post(COMPLETIONS, json={"prompt": "x" * 30_000})
        assert unknown.status_code == 400  # the engine's answer, who alone knows its length
        assert (await running).status_code == 200

    asked(app, scenario)


@pytest.mark.parametrize(
    ("path", "body", "tokens", "sequences"),
    [
        (CHAT, HELLO | {"max_tokens": 10, "n": 4}, 40, 4),
        ("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 10}, 30, 3),
        ("/v1/completions", {"prompt": [[1], [2]], "max_tokens": 10, "n": 2}, 40, 4),
    ],
)
def test_a_request_is_admitted_as_all_its_answers(
    path: str, body: dict[str, Any], tokens: int, sequences: int
) -> None:
    app = online({"latency_s": 0.02})

    async def scenario(client: httpx.AsyncClient) -> None:
        asking = await begun(app, client.post(path, json=body))
        assert app.admission.sequences == sequences
        assert tokens < app.admission.used_tokens < tokens + 10
        assert (await asking).status_code == 200
        assert app.admission.sequences == 0

    asked(app, scenario)


def test_of_what_a_request_says_others_are_not_expected_to_be_longer() -> None:
    """It has a hundred prompts, and says in a field of another path that it is one."""
    app, replica = with_replica({"latency_s": 0.02})
    begin, finish = replica.on_begun, replica.on_finished
    assert begin is not None
    assert finish is not None

    def begin_all(engine_id: str) -> None:
        for _ in range(100):
            begin(engine_id)

    def finish_all(engine_id: str, _prompt_tokens: int, _completion_tokens: int) -> None:
        for _ in range(100):
            finish(engine_id, 5, 200)

    replica.on_begun, replica.on_finished = begin_all, finish_all

    async def scenario(client: httpx.AsyncClient) -> None:
        many = {"prompt": ["a"] * 100, "messages": "x"}
        assert (await client.post(COMPLETIONS, json=many)).status_code == 200
        asking = await begun(app, client.post(CHAT, json=HELLO))
        assert 0 < app.admission.used_tokens < 300
        await asking

    asked(app, scenario)


def test_what_needs_no_kv_cache_does_not_wait() -> None:
    app = online({"latency_s": 0.5, "kv_cache_size_tokens": 10})

    async def scenario(client: httpx.AsyncClient) -> None:
        busy = asyncio.create_task(client.post(CHAT, json=HELLO))
        await asyncio.sleep(0.1)
        assert app.admission.running == 1
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/ready")).status_code == 200
        await busy
        assert app.admission.running == 0

    asked(app, scenario)


def test_a_dead_engines_requests_get_503_which_proxies_and_clients_try_again() -> None:
    app = online({"die_after": 2, "latency_s": 0.1})

    async def scenario(client: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*(client.post(CHAT, json=HELLO) for _ in range(3)))
        assert sorted(answer.status_code for answer in answers) == [200, 503, 503]
        for answer in (*answers, await client.get("/ready"), await client.post(CHAT, json=HELLO)):
            if answer.status_code != 200:
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "engine_dead"
                assert answer.headers["retry-after"] == "1"

    asked(app, scenario)


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "invalid_api_key"),
        ({"authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ({"authorization": "Basic secret"}, 401, "invalid_api_key"),
        (KEY, 200, None),
        ({"authorization": "bearer  secret "}, 200, None),
        ({"x-api-key": "secret"}, 200, None),
    ],
)
def test_keys(tmp_path: Path, headers: dict[str, str], status: int, code: str | None) -> None:
    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(CHAT, json=HELLO, headers=headers)

    answer = asked(online(**with_keys(tmp_path)), scenario)
    assert answer.status_code == status
    assert answer.json().get("error", {}).get("code") == code


@pytest.mark.parametrize(
    ("priority", "status"),
    [(-1, 403), ("-1", 403), (-1.0, 403), (0, 200), (7, 200), ("7", 200)],
)
def test_nobody_puts_a_request_before_those_of_others(priority: Any, status: int) -> None:
    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(CHAT, json=HELLO | {"priority": priority})

    found = asked(online(), scenario)
    assert found.status_code == status
    if status == 403:
        assert found.json()["error"]["code"] == "priority_not_allowed"


@pytest.mark.parametrize(
    ("stated", "status"),
    [(["-1"], 403), ([" -1_0 "], 403), (["3", "-1"], 403), (["7"], 200), (["low"], 200)],
)
def test_nor_by_the_header_that_vllm_reads_first(stated: list[str], status: int) -> None:
    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        headers = [("X-Vllm-Priority", one) for one in stated]
        return await client.post(CHAT, json=HELLO, headers=headers)

    found = asked(online(), scenario)
    assert found.status_code == status
    if status == 403:
        assert found.json()["error"]["code"] == "priority_not_allowed"


def test_under_serves_route_prefix_every_layer_does_its_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = with_keys(tmp_path, tokens_per_minute=10_000, models=["m"])
    settings["gate"]["max_body_bytes"] = 1000
    app = online({"latency_s": 0.02}, **settings, batches={"store": str(tmp_path / "store")})

    async def scenario(client: httpx.AsyncClient) -> None:
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200  # without a key
        client.headers.update(KEY)
        asking = asyncio.create_task(client.post(CHAT, json=HELLO | {"max_tokens": 1000}))
        while not asking.done() and not app.admission.running:
            await asyncio.sleep(0)
        assert app.admission.arrived_tokens_per_s > 0
        answer = await asking
        assert answer.status_code == 200
        # Its most expected demand is taken while it runs.
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 9_900
        first = await client.post(CHAT, json=HELLO | {"priority": -1})
        assert (first.status_code, first.json()["error"]["code"]) == (403, "priority_not_allowed")
        await client.post("/v1/files", data={"purpose": "batch"}, files={"file": b"{}" * 1000})
        assert len((await client.get("/v1/files")).json()["data"]) == 1

    with caplog.at_level(logging.INFO, "phi4ray.access"):
        asked(app, scenario, "/phi4")
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["path"] for line in lines] == [CHAT, CHAT, "/v1/files", "/v1/files"]
    assert lines[0]["completion_tokens"] == 4


def test_health_and_metrics_need_no_key(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[int]:
        return [(await client.get(path)).status_code for path in ("/health", "/ready")]

    assert asked(online(**with_keys(tmp_path)), scenario) == [200, 200]


@pytest.mark.parametrize(
    ("limits", "status", "code"),
    [
        ({"disabled": True}, 403, "tenant_disabled"),
        ({"models": ["other"]}, 403, "model_not_allowed"),
        ({"models": ["m"]}, 200, None),
        ({"requests_per_minute": 0.5}, 429, "rate_limit_exceeded"),
    ],
)
def test_what_a_tenant_may_not(
    tmp_path: Path, limits: dict[str, Any], status: int, code: str | None
) -> None:
    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        await client.post(CHAT, json=HELLO, headers=KEY)
        return await client.post(CHAT, json=HELLO, headers=KEY)

    answer = asked(online(**with_keys(tmp_path, **limits)), scenario)
    assert answer.status_code == status
    assert answer.json().get("error", {}).get("code") == code
    if status == 429:
        assert int(answer.headers["retry-after"]) > 1


def test_tokens_that_were_not_used_are_given_back(tmp_path: Path) -> None:
    app = online(**with_keys(tmp_path, tokens_per_minute=10_000))

    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        await client.post(CHAT, json=HELLO | {"max_tokens": 400}, headers=KEY)
        return await client.post(CHAT, json=HELLO | {"max_tokens": 400}, headers=KEY)

    answer = asked(app, scenario)
    assert answer.headers["x-ratelimit-limit-tokens"] == "10000"
    # Five tokens of the first, and the four hundred that the second may use.
    assert 9500 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 9700


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"json": HELLO | {"user": "x" * 2000}}, 413, "body_too_large"),
        ({"json": HELLO, "headers": {"x-long": "y" * 2000}}, 431, "headers_too_large"),
    ],
)
def test_sizes(request_: dict[str, Any], status: int, code: str) -> None:
    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(CHAT, **request_)

    answer = asked(online(gate={"max_body_bytes": 1000, "max_header_bytes": 1000}), scenario)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"[" * 100_000, b""])
def test_a_body_that_is_no_json_object_is_the_applications_to_refuse(body: bytes) -> None:
    async def scenario(client: httpx.AsyncClient) -> int:
        headers = {"content-type": "application/json"}
        return (await client.post(CHAT, content=body, headers=headers)).status_code

    assert asked(online(), scenario) == 400


def test_the_log_has_a_line_a_request_and_no_secrets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(client: httpx.AsyncClient) -> str:
        with caplog.at_level(logging.INFO, "phi4ray.access"):
            answer = await client.post(CHAT, json=HELLO, headers=KEY | {"x-request-id": "abc"})
            await client.get("/ready")
        return str(answer.json()["choices"][0]["message"]["content"])

    text = asked(online(**with_keys(tmp_path)), scenario)
    (record,) = caplog.records
    line = json.loads(record.getMessage())
    assert (line["request_id"], line["tenant"], line["status"]) == ("abc", "acme", 200)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (1, 4)
    for secret in ("secret", "hello", text):
        assert secret not in record.getMessage()


@contextmanager
def listening(app: OnlineApp) -> Iterator[int]:
    """Run the application in a real HTTP server; gives its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield int(server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join()


def send_chat(port: int, **body: Any) -> socket.socket:
    raw = json.dumps(HELLO | body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"authorization: {KEY['authorization']}\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


@pytest.mark.slow
def test_a_client_that_hangs_up_frees_its_tokens_or_its_place_in_the_queue() -> None:
    app = online({"latency_s": 2, "kv_cache_size_tokens": 100})
    with listening(app) as port:
        running = send_chat(port, max_tokens=90)
        until(lambda: app.admission.running == 1, 10)
        waiting = send_chat(port, max_tokens=90)
        until(lambda: app.admission.queued == 1, 10)
        waiting.close()
        until(lambda: app.admission.queued == 0, 10)
        assert app.admission.running == 1
        running.close()


def test_who_hangs_up_in_the_queue_pays_nothing(tmp_path: Path) -> None:
    limited = with_keys(tmp_path, tokens_per_minute=30_000)
    app = online({"latency_s": 2, "kv_cache_size_tokens": 10_000}, **limited)
    with listening(app) as port:
        send_chat(port, max_tokens=500, n=18)
        until(lambda: app.admission.running == 1, 10)
        for _ in range(3):
            waiting = send_chat(port, max_tokens=300, n=10)
            until(lambda: app.admission.queued == 1, 10)
            waiting.close()
            until(lambda: app.admission.queued == 0, 10)
        left = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=KEY).headers
        assert int(left["x-ratelimit-remaining-tokens"]) > 20_000


def test_a_stream_that_is_given_up_frees_its_tokens() -> None:
    app = online({"chunk_s": 0.2})
    with listening(app) as port:
        stream = send_chat(port, stream=True)
        assert stream.recv(16).startswith(b"HTTP/1.1 200")
        assert app.admission.running == 1
        stream.close()
        until(lambda: app.admission.running == 0, 10)


def test_a_body_that_grows_too_large_is_cut_off_while_it_comes() -> None:
    app = online(gate={"max_body_bytes": 1000})
    with listening(app) as port:
        connection = socket.create_connection(("127.0.0.1", port))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        for _ in range(3):
            connection.sendall(b"1f4\r\n" + b"x" * 500 + b"\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 413")
        connection.close()


def test_requests_at_once_under_one_id_are_told_apart_and_each_keeps_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = online({"latency_s": 0.02})

    async def scenario(client: httpx.AsyncClient) -> None:
        async def ask(text: str) -> Any:
            body = HELLO | {"messages": [{"role": "user", "content": text}]}
            return await client.post(CHAT, json=body, headers={"x-request-id": "trace"})

        for answer in await asyncio.gather(ask("hi"), ask("hello " * 100)):
            assert answer.status_code == 200

    with caplog.at_level(logging.INFO, "phi4ray.access"):
        asked(app, scenario)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["request_id"] for line in lines] == ["trace"] * 2
    assert sorted(line["prompt_tokens"] for line in lines) == [1, 150]


def test_an_answer_names_its_request_as_the_client_did() -> None:
    """vLLM names it as it was told, with `enable_request_id_headers`."""
    both = asyncio.Barrier(2)
    seen: list[bytes] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        name = dict(scope["headers"])[b"x-request-id"]
        seen.append(name)
        await both.wait()
        headers = [(b"X-Request-Id", name)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def scenario(client: httpx.AsyncClient) -> list[str]:
        asked = (client.get("/", headers={"x-request-id": "trace"}) for _ in range(2))
        return [answer.headers["x-request-id"] for answer in await asyncio.gather(*asked)]

    observed: Any = Observe(app)
    assert asked(observed, scenario) == ["trace"] * 2
    assert len(set(seen)) == 2


PAGE = "https://page.example"


def test_a_page_is_told_what_stands_before_the_engine_as_well(tmp_path: Path) -> None:
    config = serve_config({
        "engine": {"kind": "fake", "model": "m"},
        "batches": {"store": str(tmp_path / "store")},
        **with_keys(tmp_path, requests_per_minute=1),
    })  # fmt: skip
    replica = FakeReplica(config.engine)
    replica.app.add_middleware(CORSMiddleware, allow_origins=[PAGE], allow_headers=["*"])

    async def scenario(client: httpx.AsyncClient) -> None:
        for path in ("/v1/files", CHAT):
            ask = {"access-control-request-method": "GET", "access-control-request-headers": "x-a"}
            told = await client.options(path, headers={"origin": PAGE, **ask})
            assert (told.status_code, told.headers["access-control-allow-origin"]) == (200, PAGE)
        for headers, status in (({}, 401), (KEY, 200), (KEY, 429)):
            answer = await client.post(CHAT, json=HELLO, headers={"origin": PAGE, **headers})
            assert answer.status_code == status
            assert answer.headers.get_list("access-control-allow-origin") == [PAGE]
            assert "retry-after" in answer.headers["access-control-expose-headers"]
        other = await client.post(CHAT, json=HELLO, headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers

    asked(OnlineApp(replica, config), scenario)
