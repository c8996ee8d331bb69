"""The ASGI layer that lets in who may ask, as much as they may, in requests of sane size."""

import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi4ray.config import Config
from phi4ray.protocol import Json, has_more_values
from phi4ray.serve import metrics
from phi4ray.serve.body import BodyError, json_object
from phi4ray.serve.headers import is_form, is_preflight, key_of, rate_limits
from phi4ray.serve.limits import Limiter, Refused
from phi4ray.serve.paths import FILES, INVOCATIONS, OPEN, of_batches, of_clients
from phi4ray.serve.responses import send_error
from phi4ray.serve.state import State
from phi4ray.serve.tenants import KeyRing, Tenant


class GateConfig(Config):
    """Keys and sizes."""

    keys_file: str | None = Field(
        None, description="YAML with tenants and the digests of their keys; None: all may ask"
    )
    reload_interval_s: float = Field(5.0, gt=0, description="How often the file is looked at")
    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1)
    max_body_values: int = Field(
        2_000_000, ge=1, description="Commas and brackets in a body: they tell its decoded size"
    )
    max_header_bytes: int = Field(32 * 1024, ge=1, description="Names and values together")
    max_headers: int = Field(100, ge=1)
    open_paths: tuple[str, ...] = Field(
        tuple(sorted(OPEN)), description="Paths that need no key, exactly so after any route prefix"
    )


FORM_BYTES = 128 * 1024
"""What a file's body may have besides the file."""


class Gate:
    """Checks key, sizes and limits, and decodes the body once for the layers behind it.

    `demand` tells the tokens that a request to a path is expected to use. Files of up to
    `max_file_bytes` pass as they come, to a layer that counts them.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: GateConfig,
        demand: Callable[[str, Json | None], float],
        max_file_bytes: int = 0,
    ) -> None:
        """Read the keys.

        Raises:
            ConfigError: the keys file cannot be read.
        """
        self.app = app
        self.limiter = Limiter()
        self._config, self._demand = config, demand
        self._max_file_bytes = max_file_bytes
        self._keys = (
            KeyRing(Path(config.keys_file), config.reload_interval_s) if config.keys_file else None
        )
        self._open = frozenset(config.open_paths)
        self._known: tuple[Tenant, ...] = ()
        self._open_accounts(time.monotonic())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; see the ASGI specification."""
        if scope["type"] != "http":
            if scope["type"] == "websocket" and self._keys is not None:
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        state = State.of(scope)
        refuse = partial(_refuse, send)
        headers = dict(scope["headers"])
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        most = self._config.max_headers
        if size > self._config.max_header_bytes or len(scope["headers"]) > most:
            await refuse(431, "headers_too_large", "the request's headers are too large")
            return
        tenant: Tenant | None = None
        needs_key = (state.path.rstrip("/") or "/") not in self._open
        if self._keys is not None and needs_key and not is_preflight(scope, headers):
            now_s = time.monotonic()
            key = key_of(headers)
            tenant = self._keys.find(key, now_s) if key else None
            self._open_accounts(now_s)
            if tenant is None:
                problem = "is not valid" if key else "is missing: send 'Authorization: Bearer KEY'"
                await refuse(
                    401, "invalid_api_key", f"the API key {problem}",
                    headers={"www-authenticate": "Bearer"},
                )  # fmt: skip
                return
            state.tenant = tenant.name
            if tenant.disabled:
                await refuse(403, "tenant_disabled", "this API key's owner is disabled")
                return
            if not of_clients(state.path):
                await refuse(404, "not_found", "this path is not for the owners of API keys")
                return
        if tenant is not None:
            await self._limited(tenant, scope, headers, receive, send)
        elif (replay := await self._read(scope, headers, receive, send)) is not None:
            await self.app(scope, replay, send)

    def _open_accounts(self, now_s: float) -> None:
        if self._keys is not None and self._keys.tenants is not self._known:
            self._known = self._keys.tenants
            self.limiter.open(self._known, now_s)

    async def _limited(
        self,
        tenant: Tenant,
        scope: Scope,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        send: Send,
    ) -> None:
        state = State.of(scope)
        limiter = self.limiter
        # Before the body is read: none is held for who may not ask, nor more than may at once.
        lease = limiter.acquire(tenant, 0.0, time.monotonic())
        if isinstance(lease, Refused):
            await self._over_limit(tenant, lease, send)
            return
        asked = False
        try:
            replay = await self._read(scope, headers, receive, send)
            if replay is None or not await _may(tenant, scope, send):
                return
            now_s = time.monotonic()  # the body may have taken its time
            over = limiter.charge(lease, self._demand(state.path, state.body), now_s)
            asked = over is None
            if over is None:
                left = rate_limits(limiter.remaining(tenant, now_s))
                await self.app(scope, replay, _with_headers(left, send))
        finally:
            now_s = time.monotonic()
            if asked:
                limiter.release(lease, _used(state), now_s)
            else:
                limiter.cancel(lease, now_s)
        if over is not None:
            await self._over_limit(tenant, over, send)

    async def _over_limit(self, tenant: Tenant, over: Refused, send: Send) -> None:
        left = rate_limits(self.limiter.remaining(tenant, time.monotonic()))
        await _refuse(
            send, 429, "rate_limit_exceeded",
            f"the limit of {over.limit} is reached; try again in {over.retry_after_s} s",
            kind="rate_limit_error",
            headers={"retry-after": str(over.retry_after_s), **left},
        )  # fmt: skip

    async def _read(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, send: Send
    ) -> Receive | None:
        """As `_read_body`; None as well when the body was refused."""
        try:
            return await self._read_body(scope, headers, receive)
        except BodyError as error:
            await _refuse(send, *error.args)
            return None

    async def _read_body(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive
    ) -> Receive | None:
        """Read the body, put its JSON object into the state; gives a `receive` that replays it.

        None: the client hung up before it had sent everything.

        Raises:
            BodyError: no layer behind this one should see it.
        """
        state = State.of(scope)
        limit = self._config.max_body_bytes
        upload = scope["method"] == "POST" and state.path == FILES and self._max_file_bytes
        if upload:
            limit = self._max_file_bytes + FORM_BYTES
        too_large = BodyError(413, "body_too_large", f"a body may have {limit:,} bytes")
        with contextlib.suppress(ValueError):
            if int(headers.get(b"content-length", b"0")) > limit:
                raise too_large
        if upload or scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE"):
            return receive
        messages: list[Message] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            messages.append(message)
            size += len(message.get("body", b""))
            if size > limit:
                raise too_large
            if not message.get("more_body", False):
                break
        # Whatever the content type says: vLLM reads that field in another way, and what it takes
        # for JSON must not get past the limits.
        body = b"".join(m.get("body", b"") for m in messages)
        most = self._config.max_body_values
        if has_more_values(body, most):
            raise BodyError(413, "body_too_complex", f"a body may have {most:,} values")
        state.body = json_object(body)
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay


async def _may(tenant: Tenant, scope: Scope, send: Send) -> bool:
    """Whether a tenant may name the model that a request names; refuses it if not."""
    state = State.of(scope)
    state.priority = tenant.priority
    state.models = may = tenant.models
    if may is None or of_batches(state.path):  # a batch names a file, no model
        return True
    message = ""
    if state.path == INVOCATIONS:
        # Which model that asks for a header says, and not the body.
        message = f"this API key may use {', '.join(may)} only: ask at /v1, not at {INVOCATIONS}"
    # vLLM gives a request that names no model its first one, whichever that is.
    elif state.body is not None and state.body.get("model") not in may:
        message = f"'model' must be one that this API key may use: {', '.join(may)}"
    elif is_form(scope):
        message = (
            f"this API key may use {', '.join(may)} only, and forms are not looked into: send JSON"
        )
    if message:
        await _refuse(send, 403, "model_not_allowed", message)
    return not message


def _with_headers(fields: Mapping[str, str], send: Send) -> Send:
    extra = [(name.encode(), value.encode()) for name, value in fields.items()]

    # No coroutine of its own: every chunk of every stream goes through here.
    def with_headers(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        return send(message)

    return with_headers


def _used(state: State) -> float | None:
    """Tokens that a request has used; None if nobody counted them."""
    if state.usage is not None:
        return state.usage.prompt_tokens + state.usage.completion_tokens
    return 0.0 if state.status >= 400 else None


async def _refuse(send: Send, status: int, code: str, message: str, **options: Any) -> None:
    metrics.REJECTED.labels(code).inc()
    await send_error(send, status, code, message, **options)
