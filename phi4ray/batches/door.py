"""What the two halves of the Batch API's HTTP door share: the store in threads, pages of lists."""

import asyncio
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from phi4ray.batches.config import BatchesConfig
from phi4ray.batches.params import ApiError
from phi4ray.batches.records import FILE_ID, FileRecord
from phi4ray.batches.store import Store, owner_of, readable
from phi4ray.errors import StorageError, TransientStorageError
from phi4ray.protocol import Json
from phi4ray.serve.state import State

P = ParamSpec("P")
T = TypeVar("T")

STORE_THREADS = 16

PAGE_RECORDS = 256
"""Records that are read at once when files or batches are listed."""

logger = logging.getLogger(__name__)


class Door:
    """The store, for an event loop that must not wait for it."""

    def __init__(self, config: BatchesConfig, clock: Callable[[], float]) -> None:
        """Raises:
        ConfigError: there is no such kind of store.
        """
        self.config, self.clock = config, clock
        self.store = Store(config.store)
        self._threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="phi4ray-files")

    async def thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a call that blocks."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(function, *args, **kwargs))

    async def once(self, what: str, write: Callable[[], None]) -> None:
        """Have a write done that makes another object each time that a client repeats it.

        Raises:
            ApiError: the store did not say whether it was; for no client to repeat by itself.
        """
        try:
            await self.thread(write)
        except TransientStorageError as error:
            message = (
                f"The object store did not say whether the {what} was taken: look for it in the "
                f"list of {what}s before you send it again."
            )
            logger.error("a %s may be taken or not: %s", what, error)
            raise ApiError(500, "outcome_unknown", message) from error

    async def listed(
        self,
        read: Callable[[str, str], T | None],
        owner: str,
        ids: list[str],
        limit: int,
        wanted: Callable[[T], bool] = lambda _: True,
    ) -> list[T]:
        """The first of an owner's objects that are wanted, in the order of these ids.

        One more than `limit`, if there are as many. What this version cannot read is passed over:
        an older one may have to live with what a newer one wrote.
        """
        found: list[T] = []
        step = min(limit + 1, PAGE_RECORDS)
        for start in range(0, len(ids), step):
            each = (self.thread(readable, read, owner, one) for one in ids[start : start + step])
            found += [
                record
                for record in await asyncio.gather(*each)
                if record is not None and not isinstance(record, StorageError) and wanted(record)
            ]
            if len(found) > limit:
                break
        return found[: limit + 1]

    async def file(self, owner: str, file_id: str) -> FileRecord:
        """A file's record.

        Raises:
            ApiError: the owner has no such file, or not any more.
        """
        found = None
        if FILE_ID.fullmatch(file_id):
            found = await self.thread(self.store.file, owner, file_id)
        if found is None or found.expired(self.clock()):
            raise ApiError(404, "not_found", f"No such File object: {file_id}", "file_id")
        return found


def owner_of_request(request: Request) -> str:
    """The folder of whoever sent a request."""
    return owner_of(State.of(request.scope).tenant)


def after(
    ids: list[str], last: str | None, form: re.Pattern[str], *, newest_first: bool
) -> list[str]:
    """The ids, given oldest first, that come after the last one of a page, if it is gone or not.

    Raises:
        ApiError: that is no id.
    """
    if last is not None and not form.fullmatch(last):
        raise ApiError(400, "invalid_value", f"Invalid 'after': {last!r} is no id.", "after")
    if newest_first:
        return [one for one in reversed(ids) if last is None or one < last]
    return [one for one in ids if last is None or one > last]


def page(found: list[Json], limit: int) -> Response:
    """OpenAI's list of at most `limit` objects; one more tells that there are more."""
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
