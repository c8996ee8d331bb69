"""The fake engine's OpenAI application: enough of the API for tests of what is around an engine."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette._utils import get_route_path
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from phi4ray.config import Endpoint
from phi4ray.errors import EngineDeadError
from phi4ray.protocol import Json, Replica, refusal

CHAT: Endpoint = "/v1/chat/completions"
COMPLETIONS: Endpoint = "/v1/completions"


def fake_app(
    replica: Replica,
    model: str,
    chunk_s: float,
    begun: Callable[[str], None],
    finished: Callable[[str, Json], None],
    aborted: Callable[[str, Json], None],
) -> Starlette:
    """Chat and completions, streamed or not, models and health.

    A stream sends its answer a character at a time, `chunk_s` apart. `begun` is told the
    request's id, as vLLM words it, `finished` its usage as well, and `aborted` that of a stream
    that was given up.
    """

    async def answer(request: Request) -> Response:
        endpoint: Any = get_route_path(request.scope)
        try:
            body = json.loads(await request.body())
            assert isinstance(body, dict)
        except (ValueError, AssertionError):
            reply = refusal("invalid_json", "the body is not a JSON object")
            return JSONResponse(reply.body, reply.status)
        prefix = "chatcmpl" if endpoint == CHAT else "cmpl"
        engine_id = f"{prefix}-{request.headers.get('x-request-id', 'none')}"
        begun(engine_id)
        try:
            reply = await replica.complete(endpoint, body)
        except EngineDeadError as error:
            reply = refusal("engine_dead", str(error), 500)
        if reply.status != 200:
            return JSONResponse(reply.body, reply.status)
        usage = reply.body["usage"]
        if not body.get("stream"):
            finished(engine_id, usage)
            return JSONResponse(reply.body)
        choice = reply.body["choices"][0]
        text = choice["message"]["content"] if endpoint == CHAT else choice["text"]
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            reply = refusal("invalid_type", "'stream_options' is not an object")
            return JSONResponse(reply.body, reply.status)

        async def events() -> AsyncIterator[str]:
            sent = 0
            try:
                for character in text:
                    await asyncio.sleep(chunk_s)
                    sent += 1
                    yield _event(reply.body, {**_part(endpoint, character), "finish_reason": None})
            except (asyncio.CancelledError, GeneratorExit):
                tokens = usage["completion_tokens"] * sent // len(text)
                aborted(engine_id, usage | {"completion_tokens": tokens})
                raise
            yield _event(reply.body, {**_part(endpoint, ""), "finish_reason": "stop"})
            finished(engine_id, usage)
            if options.get("include_usage"):
                yield _event(reply.body, None, usage)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model"}]})

    async def health(_: Request) -> Response:
        return Response()

    return Starlette(
        routes=[
            Route(CHAT, answer, methods=["POST"]),
            Route(COMPLETIONS, answer, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ]
    )


def _part(endpoint: str, text: str) -> Json:
    return (
        {"index": 0, "delta": {"content": text}}
        if endpoint == CHAT
        else {
            "index": 0,
            "text": text,
        }
    )


def _event(body: Json, choice: Json | None, usage: Json | None = None) -> str:
    kind = "chat.completion.chunk" if body["object"] == "chat.completion" else body["object"]
    chunk = {"id": body["id"], "object": kind, "created": 0, "model": body["model"]}
    chunk["choices"] = [] if choice is None else [choice]
    return f"data: {json.dumps(chunk | ({'usage': usage} if usage else {}))}\n\n"
