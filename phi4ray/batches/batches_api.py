"""`/v1/batches`: what is asked for goes into the store, and what the runner wrote is shown."""

from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from phi4ray.batches.config import window_s
from phi4ray.batches.door import Door, after, owner_of_request, page
from phi4ray.batches.params import ApiError, CreateBatch, ListBatches, parsed
from phi4ray.batches.records import (
    BATCH_ID,
    BatchRequest,
    BatchState,
    new_batch_id,
    shown_batch,
)
from phi4ray.batches.store import Key
from phi4ray.protocol import Json
from phi4ray.serve.state import State


class BatchesApi:
    """OpenAI's Batches API. `model` is what the service calls its model."""

    def __init__(self, door: Door, model: str) -> None:
        self._door, self._store, self._model = door, door.store, model

    async def create(self, request: Request) -> Response:
        """`POST /v1/batches`."""
        state, owner = State.of(request.scope), owner_of_request(request)
        if state.body is None:
            raise ApiError(400, "invalid_json", "The body must be a JSON object.")
        if state.models is not None and self._model not in state.models:
            message = f"This API key may not use the model {self._model!r}."
            raise ApiError(403, "model_not_allowed", message)
        asked = parsed(CreateBatch, state.body)
        windows = self._door.config.completion_windows
        if asked.completion_window not in windows:
            message = f"Invalid 'completion_window': it may be {', '.join(windows)}."
            raise ApiError(400, "invalid_value", message, "completion_window")
        file = await self._door.file(owner, asked.input_file_id)
        if file.purpose != "batch":
            message = f"The file's purpose is {file.purpose!r}, not 'batch'."
            raise ApiError(400, "invalid_value", message, "input_file_id")
        now_s, expires_after = self._door.clock(), asked.output_expires_after
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
        await self._door.once("batch", partial(self._store.create_batch, owner, batch))
        # Not read again: where that failed, the client would try again, and have two batches.
        return JSONResponse(shown_batch(batch, BatchState(), None, self._model))

    async def list(self, request: Request) -> Response:
        """`GET /v1/batches`: newest first."""
        query, owner = parsed(ListBatches, request.query_params), owner_of_request(request)
        ids = await self._door.thread(self._store.batch_ids, owner)
        ids = after(ids, query.after, BATCH_ID, newest_first=True)
        return page(await self._door.listed(self._shown, owner, ids, query.limit), query.limit)

    async def get(self, request: Request) -> Response:
        """`GET /v1/batches/{id}`."""
        return JSONResponse(await self._found(_key(request)))

    async def cancel(self, request: Request) -> Response:
        """`POST /v1/batches/{id}/cancel`: rows that are answered stay."""
        key = _key(request)
        batch = await self._found(key)
        if batch["status"] in ("validating", "in_progress"):
            await self._door.thread(self._store.cancel, key, self._door.clock())
            # Only what is not finalizing after that is sure to see it: the runner looks once more
            # when it is.
            batch = await self._found(key)
        if batch["status"] not in ("cancelling", "cancelled"):
            message = f"Cannot cancel a batch with status '{batch['status']}'."
            raise ApiError(400, "invalid_status", message)
        return JSONResponse(batch)

    async def _found(self, key: Key) -> Json:
        found = await self._door.thread(self._shown, key.owner, key.id)
        if found is None:
            raise ApiError(404, "not_found", f"No batch found with id '{key.id}'.", "batch_id")
        return found

    def _shown(self, owner: str, batch_id: str) -> Json | None:
        key = Key(owner, batch_id)
        request = self._store.request(key) if BATCH_ID.fullmatch(batch_id) else None
        if request is None:
            return None
        # In this order: the runner removes the wish to cancel after it wrote the end.
        cancel_at = self._store.cancel_at(key)
        return shown_batch(request, self._store.state(key), cancel_at, self._model)


def _key(request: Request) -> Key:
    return Key(owner_of_request(request), request.path_params["batch_id"])
