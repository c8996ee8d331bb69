"""The outermost ASGI layer: request ids, one log line and the metrics of every request.

The log holds no key, no prompt and no answer.
"""

import json
import logging
import time
import uuid
from collections.abc import Awaitable

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi4ray.serve import metrics
from phi4ray.serve.paths import OPEN, of_batches
from phi4ray.serve.state import KEY, State

logger = logging.getLogger("phi4ray.access")


def log_to_stderr() -> None:
    """Have this package's log lines on stderr, from INFO on, whatever the host process does."""
    package = logging.getLogger("phi4ray")
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s %(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False


class Observe:
    """Gives each request its `phi4ray.serve.state.State`, and tells what became of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._open: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; see the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = _request_id(scope)
        state = State(request_id, get_route_path(scope))
        if request_id in self._open:
            # The engine's count goes by it: two at once must not be one.
            state.engine_request_id = f"{request_id}-{uuid.uuid4().hex[:8]}"
            _set_request_id(scope, state.engine_request_id)
        self._open.add(state.engine_request_id)
        scope.setdefault("state", {})[KEY] = state
        first_byte_s = None
        streams = False

        # No coroutine of its own: every chunk of every stream goes through here.
        def observed(message: Message) -> Awaitable[None]:
            nonlocal first_byte_s, streams
            if message["type"] == "http.response.start":
                state.status = message["status"]
                if state.engine_request_id != request_id:
                    message = _named(message, request_id)
                streams = _streams(message)
            elif first_byte_s is None and message.get("body"):
                first_byte_s = time.perf_counter() - began
            return send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            self._open.discard(state.engine_request_id)
            if streams and state.status == 200 and first_byte_s is not None:
                metrics.TTFT.observe(first_byte_s)
            self._tell(scope, state, first_byte_s, time.perf_counter() - began)

    def _tell(self, scope: Scope, state: State, first_byte_s: float | None, total_s: float) -> None:
        path = state.path.rstrip("/") or "/"
        # A client that hung up before its answer began has no status: 499, as nginx says it.
        status = state.status or 499
        known = path if path in metrics.PATHS else "other"
        metrics.REQUESTS.labels(known, str(status), state.tenant or "").inc()
        if path in OPEN:
            if status < 400:
                return
        elif not of_batches(path):  # a file takes its time, and is no answer
            metrics.DURATION.observe(total_s)
        if state.usage:
            tenant = state.tenant or ""
            metrics.TOKENS.labels("prompt", tenant).inc(state.usage.prompt_tokens)
            metrics.TOKENS.labels("completion", tenant).inc(state.usage.completion_tokens)
        line = {
            "request_id": state.request_id,
            "method": scope["method"],
            "path": path,
            "status": status,
            "tenant": state.tenant,
            "queued_ms": round(state.queued_s * 1e3, 1),
            "first_byte_ms": None if first_byte_s is None else round(first_byte_s * 1e3, 1),
            "total_ms": round(total_s * 1e3, 1),
            "prompt_tokens": state.usage.prompt_tokens if state.usage else None,
            "completion_tokens": state.usage.completion_tokens if state.usage else None,
        }
        logger.info(json.dumps({name: value for name, value in line.items() if value is not None}))


def _streams(start: Message) -> bool:
    """Whether an answer comes piece by piece: of another one the first byte says nothing."""
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start.get("headers", ())
    )


def _request_id(scope: Scope) -> str:
    """The client's `X-Request-Id`, or a new one, which vLLM then reads from the same header."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return str(value.decode("latin-1"))
    request_id = uuid.uuid4().hex
    _set_request_id(scope, request_id)
    return request_id


def _set_request_id(scope: Scope, request_id: str) -> None:
    others = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    scope["headers"] = [*others, (b"x-request-id", request_id.encode("latin-1"))]


def _named(start: Message, request_id: str) -> Message:
    """An answer that names its request, if it does, as its client did."""
    headers = [
        (name, request_id.encode("latin-1") if name.lower() == b"x-request-id" else value)
        for name, value in start.get("headers", ())
    ]
    return {**start, "headers": headers}
