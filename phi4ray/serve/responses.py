"""Errors over ASGI in the shape in which OpenAI's clients read them."""

import json
from collections.abc import Mapping

from starlette.types import Send

from phi4ray.protocol import Json


def error_body(code: str, message: str, kind: str) -> Json:
    """An OpenAI error object."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def send_error(
    send: Send,
    status: int,
    code: str,
    message: str,
    *,
    kind: str = "invalid_request_error",
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answer a request that the engine never sees."""
    body = json.dumps(error_body(code, message, kind)).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **(headers or {}),
    }
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
