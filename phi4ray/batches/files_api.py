"""`/v1/files`: uploads go to the store as they come, downloads come from it as they go."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from phi4ray.batches.door import Door, after, owner_of_request, page
from phi4ray.batches.params import ApiError, ExpiresAfter, ListFiles, parsed
from phi4ray.batches.records import FILE_ID, FileRecord, Piece, new_file_id
from phi4ray.batches.upload import FormError, UploadForm
from phi4ray.serve.gate import FORM_BYTES
from phi4ray.storage import Writer

BUFFER_BYTES = 1 << 20
"""An upload or download holds about so much, besides what the store's writer does."""


class FilesApi:
    """OpenAI's Files API, for files of batches."""

    def __init__(self, door: Door) -> None:
        self._door, self._store, self._config = door, door.store, door.config

    async def create(self, request: Request) -> Response:
        """`POST /v1/files`: the content goes to the store as it comes."""
        owner, now_s = owner_of_request(request), self._door.clock()
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
        await self._door.once("file", partial(self._store.write_file, owner, record))
        return JSONResponse(record.shown())

    async def _take(self, request: Request, form: UploadForm, writer: Writer) -> int:
        """Write the form's file; gives its size in bytes."""
        held, size, received = bytearray(), 0, 0
        async for data in request.stream():
            content = form.feed(data)
            size, received = size + len(content), received + len(data)
            if size > self._config.max_file_bytes:
                most = f"{self._config.max_file_mib:g} MiB"
                message = f"The file is larger than the {most} that one may have."
                raise ApiError(413, "file_too_large", message, "file")
            if received - size > FORM_BYTES:
                raise FormError("the form holds too much besides the file")
            held += content
            if len(held) >= BUFFER_BYTES:
                await self._door.thread(writer.write, bytes(held))
                held.clear()
        if not form.whole:
            raise FormError("the form ends too early")
        if form.filename is None:
            raise ApiError(400, "missing_required_parameter", "Send a 'file'.", "file")
        await self._door.thread(writer.write, bytes(held))
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
        writer = await self._door.thread(creating.__enter__)
        try:
            yield writer
        except BaseException:
            # Also when the client is gone and this task is being cancelled.
            await asyncio.shield(self._door.thread(creating.__exit__, *sys.exc_info()))
            raise
        await self._door.thread(creating.__exit__, None, None, None)

    async def list(self, request: Request) -> Response:
        """`GET /v1/files`: newest first, unless asked for otherwise."""
        query, owner = parsed(ListFiles, request.query_params), owner_of_request(request)
        ids = await self._door.thread(self._store.file_ids, owner)
        ids = after(ids, query.after, FILE_ID, newest_first=query.order == "desc")
        now_s = self._door.clock()

        def wanted(record: FileRecord) -> bool:
            return not record.expired(now_s) and query.purpose in (None, record.purpose)

        found = await self._door.listed(self._store.file, owner, ids, query.limit, wanted)
        return page([record.shown() for record in found], query.limit)

    async def get(self, request: Request) -> Response:
        """`GET /v1/files/{id}`."""
        return JSONResponse((await self._record(request)).shown())

    async def content(self, request: Request) -> Response:
        """`GET /v1/files/{id}/content`: streamed from the store."""
        record = await self._record(request)
        options: dict[str, Any] = {
            "media_type": "application/octet-stream",
            "headers": {"content-length": str(record.size)},
        }
        if request.method == "HEAD":  # Starlette's routes answer it as GET, and read everything
            return Response(**options)
        return StreamingResponse(self._pieces(record), **options)

    async def _pieces(self, record: FileRecord) -> AsyncIterator[bytes]:
        for piece in record.pieces:
            uri = self._store.uri(piece.name)
            stream = await self._door.thread(self._store.storage.open, uri)
            try:
                while data := await self._door.thread(stream.read, BUFFER_BYTES):
                    yield data
            finally:
                # Where the client hung up in a read, this waits for it; and this task is cancelled.
                await asyncio.shield(self._door.thread(stream.close))

    async def delete(self, request: Request) -> Response:
        """`DELETE /v1/files/{id}`, unless a batch that has not ended reads it."""
        record, owner = await self._record(request), owner_of_request(request)
        reader = await self._door.thread(self._store.reader_of, owner, record.id)
        if reader is not None:
            message = f"The file is read by {reader}: cancel that first, or wait for its end."
            raise ApiError(400, "file_in_use", message, "file_id")
        await self._door.thread(self._store.delete_file, owner, record)
        return JSONResponse({"id": record.id, "object": "file", "deleted": True})

    async def _record(self, request: Request) -> FileRecord:
        return await self._door.file(owner_of_request(request), request.path_params["file_id"])
