"""Whatever is sent to a service, it answers, and never with a fault of its own."""

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phi4ray.batch.lines import row_of
from phi4ray.batches.validation import MAX_ERRORS, check, lines_of
from phi4ray.fake import FakeReplica
from phi4ray.serve.app import OnlineApp
from phi4ray.serve.config import serve_config
from phi4ray.serve.paths import BATCHES, FILES, GENERATING
from tests.fuzz import broken_texts, budget, deep, dumped, near, texts

pytestmark = pytest.mark.slow

CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 3, "n": 1, "stream": False, "stream_options": None, "priority": 0,
    "temperature": 1.0, "prompt": "hello", "input": ["hello"],
}  # fmt: skip
FILE_ID = "file-" + "0" * 32
CREATE = {
    "input_file_id": FILE_ID, "endpoint": "/v1/chat/completions", "completion_window": "24h",
    "metadata": {"a": "b"}, "output_expires_after": {"anchor": "created_at", "seconds": 3600},
}  # fmt: skip
BATCH_LINE = {
    "custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"},
}  # fmt: skip

Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Sends one request to a service; an exception that leaves its application is raised here."""
    store: Path = tmp_path_factory.mktemp("store")
    config = serve_config(
        {"engine": {"kind": "fake", "model": "m"}, "batches": {"store": str(store)}}
    )
    app: Any = OnlineApp(FakeReplica(config.engine), config)

    async def send(*args: Any, **kwargs: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://phi4") as client:
            return await asyncio.wait_for(client.request(*args, **kwargs), 60)

    with asyncio.Runner() as runner:
        yield lambda *args, **kwargs: runner.run(send(*args, **kwargs))


def answered(answer: httpx.Response) -> None:
    """It is an answer, or a refusal in OpenAI's shape."""
    assert answer.status_code < 500, answer.text
    kind = answer.headers.get("content-type")
    if answer.status_code >= 400 and kind == "application/json" and answer.content:  # not of HEAD
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"]
        assert error["code"]


bodies = st.one_of(
    near(CHAT).map(dumped),
    near(CHAT).map(lambda body: dumped(body, ascii_only=False)),
    near(CREATE).map(dumped),
    broken_texts,
    deep.map(lambda nested: b'{"model": "m", "messages": ' + nested + b"}"),
)


def test_bodies_of_any_content_are_answered(ask: Ask) -> None:
    paths = st.sampled_from([*sorted(GENERATING), "/v1/embeddings", BATCHES, "/v1/models"])

    @budget(200)
    @given(paths, bodies)
    @example("/v1/completions", dumped(CHAT | {"stream": True, "stream_options": 3}))
    @example("/v1/chat/completions", b'{"model": "m", "messages": ' + b"[" * 100_000)
    @example("/v1/chat/completions", dumped(CHAT | {"max_tokens": 10**400, "n": 10**400}))
    def check(path: str, body: bytes) -> None:
        answered(ask("POST", path, content=body))

    check()


segments = st.one_of(
    texts.map(lambda text: quote(text, safe="", errors="surrogatepass")),
    st.binary(max_size=8).map(quote),
    st.sampled_from([FILE_ID, "batch_" + "0" * 32, "..", "", "content", "cancel", "a" * 5000]),
)


def test_paths_and_queries_of_any_content_are_answered(ask: Ask) -> None:
    queries = st.dictionaries(
        st.sampled_from(["after", "limit", "order", "purpose"]), segments, max_size=3
    )

    @budget(150)
    @given(
        st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS"]),
        st.sampled_from([FILES, BATCHES, "", "/v1"]),
        st.lists(segments, max_size=3),
        queries,
    )
    def check(method: str, root: str, more: list[str], query: dict[str, str]) -> None:
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        answered(ask(method, f"{'/'.join([root, *more]) or '/'}?{asked}"))

    check()


fields = st.tuples(
    st.sampled_from([b"file", b"purpose", b"expires_after[seconds]", b"expires_after[anchor]"])
    | st.binary(max_size=8),
    st.sampled_from([b"batch", b"created_at", b"3600", b"9" * 40, b""]) | st.binary(max_size=20),
    st.sampled_from([b"", b'; filename="a"', b'; filename="\xff"', b"; filename*=utf-8''%ff"]),
)


def form_of(parts: list[tuple[bytes, bytes, bytes]]) -> bytes:
    return b"".join(
        b'--b\r\nContent-Disposition: form-data; name="' + name + b'"' + more + b"\r\n\r\n" + value
        + b"\r\n"
        for name, value, more in parts
    ) + b"--b--\r\n"  # fmt: skip


def test_forms_of_any_content_are_answered(ask: Ask) -> None:
    kinds = st.sampled_from(
        [b"multipart/form-data; boundary=b", b"multipart/form-data; boundary=\xff", b"text/plain",
         b'multipart/form-data; boundary="b', b"multipart/form-data; boundary=" + b"b" * 5000]
    )  # fmt: skip
    whole = [(b"purpose", b"batch", b""), (b"file", b"{}\n", b'; filename="a"')]

    @budget(150)
    @given(kinds, st.lists(fields, max_size=4).map(form_of) | st.binary(max_size=60))
    @example(b"multipart/form-data; boundary=b", form_of(whole))
    @example(
        b"multipart/form-data; boundary=b",
        form_of([*whole, (b"expires_after[seconds]", b"9" * 5000, b"")]),
    )
    def check(kind: bytes, body: bytes) -> None:
        answered(ask("POST", FILES, content=body, headers=[(b"content-type", kind)]))

    check()


def test_headers_of_any_content_are_answered(ask: Ask) -> None:
    names = st.sampled_from(
        [b"authorization", b"x-api-key", b"x-request-id", b"content-type", b"content-length",
         b"origin", b"access-control-request-method", b"accept-encoding"]
    )  # fmt: skip
    printable = st.binary(max_size=30).map(lambda data: data.translate(None, b"\r\n\x00"))

    @budget(100)
    @given(st.lists(st.tuples(names, printable | st.just(b"9" * 5000)), max_size=4))
    def check(headers: list[tuple[bytes, bytes]]) -> None:
        answered(ask("POST", "/v1/chat/completions", content=dumped(CHAT), headers=headers))

    check()


@budget(150)
@given(
    st.lists(near(BATCH_LINE).map(dumped) | broken_texts, max_size=8),
    st.sampled_from([b"\n", b"\r\n"]),
)
@example([b"\xef\xbb\xbf"], b"\n")
def test_each_bad_line_of_a_batch_is_named_by_its_number(rows: list[bytes], end: bytes) -> None:
    content = end.join(row.replace(b"\n", b"").replace(b"\r", b"") for row in rows)
    lines = lines_of(io.BytesIO(content), 1 << 20)
    checked = check(lines, "/v1/chat/completions", "m", 1000, 1 << 20)
    for error in checked.errors:
        assert error.message
        assert error.line is None or 1 <= error.line <= len(rows)
    told = {error.line for error in checked.errors}
    for number, row in enumerate(rows, 1):
        try:
            good = isinstance(json.loads(row), dict)
        except (ValueError, RecursionError):
            good = row_of(row) is None  # blank lines are no rows
        assert good or number in told or len(checked.errors) == MAX_ERRORS
