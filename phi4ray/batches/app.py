"""The HTTP door of the Batch API: `/v1/files` and `/v1/batches`, of any replica.

Nothing is kept here: every request is answered from the store, in threads, so that the event
loop goes on streaming online answers.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from phi4ray.batches.config import BatchesConfig, window_s
from phi4ray.batches.params import (
    ApiError,
    CreateBatch,
    ExpiresAfter,
    ListBatches,
    ListFiles,
    parsed,
)
from phi4ray.batches.records import (
    BATCH_ID,
    FILE_ID,
    BatchRequest,
    FileRecord,
    Piece,
    new_batch_id,
    new_file_id,
    shown_batch,
)
from phi4ray.batches.store import Key, Store, owner_of
from phi4ray.batches.upload import FormError, UploadForm
from phi4ray.errors import StorageError
from phi4ray.protocol import Json
from phi4ray.serve.paths import of_batches
from phi4ray.serve.responses import error_body, send_error
from phi4ray.serve.state import State
from phi4ray.storage import Writer

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

STORE_THREADS = 16
BUFFER_BYTES = 1 << 20
"""An upload or download holds about so much, besides what the store's writer does."""


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
            self._door = _application(_Door(config, model, clock))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; see the ASGI specification."""
        if scope["type"] != "http" or not of_batches(scope["path"]):
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


class _Door:
    def __init__(self, config: BatchesConfig, model: str, clock: Callable[[], float]) -> None:
        self._config, self._model, self._clock = config, model, clock
        self._store = Store(config.store)
        self._threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="phi4ray-files")

    async def _thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(function, *args, **kwargs))

    # Files

    async def create_file(self, request: Request) -> Response:
        """`POST /v1/files`: the content goes to the store as it comes."""
        owner, now_s = _owner(request), self._clock()
        file_id = new_file_id(now_s)
        name = self._store.content_name(owner, file_id)
        try:
            form = UploadForm(request.headers.get("content-type", ""))
            async with self._created(name) as writer:
                size = await self._take(request, form, writer)
                life_s = self._life_s(form)
        except FormError as error:
            raise ApiError(400, "invalid_form", str(error)) from error
        record = FileRecord(
            id=file_id,
            filename=form.filename or "file",
            purpose="batch",
            created_at=int(now_s),
            expires_at=None if life_s is None else int(now_s + life_s),
            pieces=(Piece(name=name, size=size),),
        )
        await self._thread(self._store.write_file, owner, record)
        return JSONResponse(record.shown())

    async def _take(self, request: Request, form: UploadForm, writer: Writer) -> int:
        """Write the form's file; gives its size in bytes."""
        held, size = bytearray(), 0
        async for data in request.stream():
            content = form.feed(data)
            size += len(content)
            if size > self._config.max_file_bytes:
                raise ApiError(
                    413, "file_too_large",
                    f"The file is larger than the {self._config.max_file_mib:g} MiB that one may "
                    "have.", "file",
                )  # fmt: skip
            held += content
            if len(held) >= BUFFER_BYTES:
                await self._thread(writer.write, bytes(held))
                held.clear()
        if not form.whole:
            raise FormError("the form ends too early")
        if form.filename is None:
            raise ApiError(400, "missing_required_parameter", "Send a 'file'.", "file")
        await self._thread(writer.write, bytes(held))
        return size

    def _life_s(self, form: UploadForm) -> float | None:
        purpose = form.field("purpose")
        if purpose is None:
            message = "Send a 'purpose': this service takes files with the purpose 'batch'."
            raise ApiError(400, "missing_required_parameter", message, "purpose")
        if purpose != "batch":
            message = f"The purpose {purpose!r} is not supported: this service takes 'batch'."
            raise ApiError(400, "invalid_value", message, "purpose")
        given = {
            name: value
            for name in ("anchor", "seconds")
            if (value := form.field(f"expires_after[{name}]")) is not None
        }
        if not given:
            return self._config.file_expiry_s
        return float(parsed(ExpiresAfter, given).seconds)

    @contextlib.asynccontextmanager
    async def _created(self, name: str) -> AsyncIterator[Writer]:
        """`phi4ray.storage.Storage.create` in threads."""
        creating = self._store.storage.create(self._store.uri(name))
        writer = await self._thread(creating.__enter__)
        try:
            yield writer
        except BaseException:
            # Also when the client is gone and this task is being cancelled.
            await asyncio.shield(self._thread(creating.__exit__, *sys.exc_info()))
            raise
        await self._thread(creating.__exit__, None, None, None)

    async def list_files(self, request: Request) -> Response:
        """`GET /v1/files`: newest first, unless asked for otherwise."""
        query = parsed(ListFiles, request.query_params)
        ids = await self._thread(self._store.file_ids, _owner(request))
        ids = _after(ids, query.after, FILE_ID, newest_first=query.order == "desc")
        now_s = self._clock()

        def fits(record: FileRecord | None) -> bool:
            return (
                record is not None
                and not record.expired(now_s)
                and query.purpose in (None, record.purpose)
            )

        found: list[FileRecord] = []
        step = min(query.limit + 1, 256)
        for start in range(0, len(ids), step):
            some = await self._gather(self._store.file, _owner(request), ids[start : start + step])
            found += [record for record in some if record is not None and fits(record)]
            if len(found) > query.limit:
                break
        return _page([record.shown() for record in found], query.limit)

    async def get_file(self, request: Request) -> Response:
        """`GET /v1/files/{id}`."""
        return JSONResponse((await self._file(request)).shown())

    async def file_content(self, request: Request) -> Response:
        """`GET /v1/files/{id}/content`: streamed from the store."""
        record = await self._file(request)
        return StreamingResponse(
            self._content(record),
            media_type="application/octet-stream",
            headers={"content-length": str(record.size)},
        )

    async def _content(self, record: FileRecord) -> AsyncIterator[bytes]:
        for piece in record.pieces:
            if not piece.size:
                continue
            stream = await self._thread(self._store.storage.open, self._store.uri(piece.name))
            try:
                while data := await self._thread(stream.read, BUFFER_BYTES):
                    yield data
            finally:
                stream.close()

    async def delete_file(self, request: Request) -> Response:
        """`DELETE /v1/files/{id}`, unless a batch that has not ended reads it."""
        record = await self._file(request)
        owner = _owner(request)
        for key in await self._thread(self._store.open_batches, owner):
            batch = await self._thread(self._store.request, key)
            if batch is not None and batch.input_file_id == record.id:
                if (await self._thread(self._store.state, key)).ended:
                    continue
                message = f"The file is read by {key.id}: cancel that first, or wait for its end."
                raise ApiError(400, "file_in_use", message, "file_id")
        await self._thread(self._store.delete_file, owner, record)
        return JSONResponse({"id": record.id, "object": "file", "deleted": True})

    async def _file(self, request: Request) -> FileRecord:
        return await self._known_file(_owner(request), request.path_params["file_id"])

    async def _known_file(self, owner: str, file_id: str) -> FileRecord:
        found = None
        if FILE_ID.fullmatch(file_id):
            found = await self._thread(self._store.file, owner, file_id)
        if found is None or found.expired(self._clock()):
            raise ApiError(404, "not_found", f"No such File object: {file_id}", "file_id")
        return found

    # Batches

    async def create_batch(self, request: Request) -> Response:
        """`POST /v1/batches`."""
        state, owner, now_s = State.of(request.scope), _owner(request), self._clock()
        if state.body is None:
            raise ApiError(400, "invalid_json", "The body must be a JSON object.")
        if state.models is not None and self._model not in state.models:
            message = f"This API key may not use the model {self._model!r}."
            raise ApiError(403, "model_not_allowed", message)
        asked = parsed(CreateBatch, state.body)
        windows = self._config.completion_windows
        if asked.completion_window not in windows:
            message = f"Invalid 'completion_window': it may be {', '.join(windows)}."
            raise ApiError(400, "invalid_value", message, "completion_window")
        file = await self._known_file(owner, asked.input_file_id)
        if file.purpose != "batch":
            message = f"The file's purpose is {file.purpose!r}, not 'batch'."
            raise ApiError(400, "invalid_value", message, "input_file_id")
        expires_after = asked.output_expires_after
        batch = BatchRequest(
            id=new_batch_id(now_s),
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=asked.completion_window,
            created_at=int(now_s),
            expires_at=int(now_s + window_s(asked.completion_window)),
            metadata=asked.metadata,
            output_expires_after_s=expires_after.seconds if expires_after else None,
        )
        await self._thread(self._store.create_batch, owner, batch)
        return await self._batch(Key(owner, batch.id))

    async def list_batches(self, request: Request) -> Response:
        """`GET /v1/batches`: newest first."""
        query, owner = parsed(ListBatches, request.query_params), _owner(request)
        ids = await self._thread(self._store.batch_ids, owner)
        ids = _after(ids, query.after, BATCH_ID, newest_first=True)[: query.limit + 1]
        shown = await self._gather(self._shown, owner, ids)
        return _page([batch for batch in shown if batch is not None], query.limit)

    async def get_batch(self, request: Request) -> Response:
        """`GET /v1/batches/{id}`."""
        return await self._batch(_batch_key(request))

    async def cancel_batch(self, request: Request) -> Response:
        """`POST /v1/batches/{id}/cancel`: rows that are answered stay."""
        key = _batch_key(request)
        batch = await self._thread(self._shown, key.owner, key.id)
        status = batch["status"] if batch is not None else None
        if status in ("finalizing", "completed", "failed", "expired"):
            message = f"Cannot cancel a batch with status '{status}'."
            raise ApiError(400, "invalid_status", message)
        if status in ("validating", "in_progress"):
            await self._thread(self._store.cancel, key, self._clock())
        return await self._batch(key)

    async def _batch(self, key: Key) -> Response:
        found = await self._thread(self._shown, key.owner, key.id)
        if found is None:
            raise ApiError(404, "not_found", f"No batch found with id '{key.id}'.", "batch_id")
        return JSONResponse(found)

    def _shown(self, owner: str, batch_id: str) -> Json | None:
        key = Key(owner, batch_id)
        request = self._store.request(key) if BATCH_ID.fullmatch(batch_id) else None
        if request is None:
            return None
        # In this order: the runner removes the wish to cancel after it wrote the end.
        cancel_at = self._store.cancel_at(key)
        return shown_batch(request, self._store.state(key), cancel_at, self._model)

    async def _gather(
        self, function: Callable[[str, str], R], owner: str, ids: Iterable[str]
    ) -> list[R]:
        return list(await asyncio.gather(*(self._thread(function, owner, one) for one in ids)))


def _owner(request: Request) -> str:
    return owner_of(State.of(request.scope).tenant)


def _batch_key(request: Request) -> Key:
    return Key(_owner(request), request.path_params["batch_id"])


def _after(ids: list[str], after: str | None, form: Any, *, newest_first: bool) -> list[str]:
    """The ids that come after one, which itself may be gone by now."""
    if after is not None and not form.fullmatch(after):
        raise ApiError(400, "invalid_value", f"Invalid 'after': {after!r} is no id.", "after")
    if newest_first:
        ids = ids[::-1]
        return [one for one in ids if after is None or one < after]
    return [one for one in ids if after is None or one > after]


def _page(found: list[Json], limit: int) -> Response:
    data = found[:limit]
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > limit,
        }
    )


def _application(door: _Door) -> Starlette:
    files, batches = "/v1/files", "/v1/batches"
    return Starlette(
        routes=[
            Route(files, door.create_file, methods=["POST"]),
            Route(files, door.list_files, methods=["GET"]),
            Route(f"{files}/{{file_id}}", door.get_file, methods=["GET"]),
            Route(f"{files}/{{file_id}}", door.delete_file, methods=["DELETE"]),
            Route(f"{files}/{{file_id}}/content", door.file_content, methods=["GET"]),
            Route(batches, door.create_batch, methods=["POST"]),
            Route(batches, door.list_batches, methods=["GET"]),
            Route(f"{batches}/{{batch_id}}", door.get_batch, methods=["GET"]),
            Route(f"{batches}/{{batch_id}}/cancel", door.cancel_batch, methods=["POST"]),
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
            return _error(503, "store_failed", f"the object store failed: {error}", None)
        case HTTPException():
            return _error(error.status_code, "not_found", error.detail, None)
    return Response(status_code=400)  # the client is gone: nobody reads it


def _error(status: int, code: str, message: str, param: str | None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body: Mapping[str, Any] = error_body(code, message, kind)
    return JSONResponse({"error": {**body["error"], "param": param}}, status)
