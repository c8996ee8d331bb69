"""The HTTP door of the Batch API: `/v1/files` and `/v1/batches`, of any replica.

Nothing is kept here: every request is answered from the store, in threads, so that the event
loop goes on streaming online answers.
"""

import json
import logging
import time
from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from phi4ray.batches.batches_api import BatchesApi
from phi4ray.batches.config import BatchesConfig
from phi4ray.batches.door import Door
from phi4ray.batches.files_api import FilesApi
from phi4ray.batches.params import ApiError
from phi4ray.errors import StorageError
from phi4ray.serve.paths import BATCHES, FILES, of_batches
from phi4ray.serve.responses import error_body, send_error
from phi4ray.serve.state import State

logger = logging.getLogger(__name__)


class BatchApi:
    """Answers the Batch API's paths, and gives every other request on.

    `model` is what the service calls its model. Behind `phi4ray.serve.gate.Gate`, which says whose
    request it is.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: BatchesConfig | None,
        model: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises:
        ConfigError: there is no such kind of store.
        """
        self.app = app
        self._door: ASGIApp | None = None
        if config is not None:
            self._door = _application(Door(config, clock), model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; see the ASGI specification."""
        if scope["type"] != "http" or not of_batches(State.of(scope).path):
            await self.app(scope, receive, send)
        elif self._door is not None:
            # Starlette writes into the scope; the layers outside are to see theirs.
            await self._door(dict(scope), receive, send)
        else:
            await send_error(
                send, 404, "batches_off",
                "this service has no Batch API: its operator can switch it on by naming an object "
                "store in batches.store",
            )  # fmt: skip


def _application(door: Door, model: str) -> Starlette:
    files, batches = FilesApi(door), BatchesApi(door, model)
    return Starlette(
        routes=[
            Route(FILES, files.create, methods=["POST"]),
            Route(FILES, files.list, methods=["GET"]),
            Route(f"{FILES}/{{file_id}}", files.get, methods=["GET"]),
            Route(f"{FILES}/{{file_id}}", files.delete, methods=["DELETE"]),
            Route(f"{FILES}/{{file_id}}/content", files.content, methods=["GET"]),
            Route(BATCHES, batches.create, methods=["POST"]),
            Route(BATCHES, batches.list, methods=["GET"]),
            Route(f"{BATCHES}/{{batch_id}}", batches.get, methods=["GET"]),
            Route(f"{BATCHES}/{{batch_id}}/cancel", batches.cancel, methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys(
            (ApiError, StorageError, HTTPException, ClientDisconnect), _told
        ),
    )


async def _told(_: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            return _error(error.status, error.code, error.message, error.param)
        case StorageError():
            # Its message names buckets, which are the operator's business.
            logger.error("the object store failed: %s", error)
            return _error(503, "store_failed", "The object store failed. Try again later.", None)
        case HTTPException():
            code = "method_not_allowed" if error.status_code == 405 else "not_found"
            return _error(error.status_code, code, error.detail, None)
    return Response(status_code=499)  # the client is gone: only the log reads it


def _error(status: int, code: str, message: str, param: str | None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    told = error_body(code, message, kind)["error"]
    # What a client sent, and is quoted here, need not be UTF-8: its escapes are ASCII.
    body = json.dumps({"error": {**told, "param": param}})
    # OpenAI's clients try again otherwise, as after a 503: 500 is what may have been done already.
    headers = {"x-should-retry": "false"} if status == 500 else None
    return Response(body, status, headers, media_type="application/json")
