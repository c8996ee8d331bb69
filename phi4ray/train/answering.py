"""Who answers an evaluation's requests: a batch job of ours, or an OpenAI endpoint.

An `Answerer` takes requests and gives what `read` makes of each OpenAI response, in their order:
responses with the log-probabilities of long prompts would fill the memory. A request that stays
without an answer is an error: a score over the rest would be another benchmark's.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import httpx
from pydantic_core import from_json, to_json
from rich.console import Console
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from phi4ray.batch.executor import Executor
from phi4ray.batch.parts import read_part, results_of
from phi4ray.batch.planning import stored_plan
from phi4ray.batch.rows import Request
from phi4ray.batch.run import run_batch
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.errors import EngineError, PreconditionError
from phi4ray.protocol import Json
from phi4ray.storage import join, storage_for

T = TypeVar("T")

ATTEMPTS = 6
RETRIED = (408, 429, 500, 502, 503, 504)


class Answerer(Protocol):
    """Gives `read(position, response)` for each request."""

    def __call__(self, requests: Sequence[Request], read: Callable[[int, Json], T]) -> list[T]:
        """Answer all requests.

        Raises:
            EngineError: one of them has no answer.
        """
        ...


class BatchAnswerer:
    """Answers by batch jobs below a folder: on all replicas there are, and resumed if cut off.

    A job's folder is named by its engine and requests: the same evaluation finds its answers again.
    """

    def __init__(
        self, engine: EngineConfig, folder: str, executor: Executor, console: Console
    ) -> None:
        self.engine, self._folder = engine, folder
        self._executor, self._console = executor, console

    def __call__(self, requests: Sequence[Request], read: Callable[[int, Json], T]) -> list[T]:
        """See `Answerer`.

        Raises:
            EngineError: one of them has no answer.
            Phi4rayError: see `phi4ray.batch.run.run_batch`.
        """
        lines = b"".join(
            to_json({"custom_id": str(at), "url": request.endpoint, "body": request.body}) + b"\n"
            for at, request in enumerate(requests)
        )
        asked = hashlib.sha256(lines + self.engine.model_dump_json().encode())
        folder = join(self._folder, asked.hexdigest()[:16])
        rows = join(folder, "rows.jsonl")
        with contextlib.suppress(PreconditionError):  # an earlier run's, and the same
            storage_for(rows).write_new(rows, lines)
        config = BatchConfig(input=(rows,), output=join(folder, "answers"), engine=self.engine)
        run_batch(config, self._executor, self._console)
        plan = stored_plan(config.output)
        found: dict[int, T] = {}
        for shard in plan.shards:
            for row in results_of(read_part(config.output, plan, shard.index)):
                if row.error_code is not None or row.response is None:
                    raise EngineError(
                        f"request {row.id} of {rows} has no answer: {row.error_code}: "
                        f"{row.error_message}"
                    )
                found[int(row.id)] = read(int(row.id), from_json(row.response))
        return [found[at] for at in range(len(requests))]


class EndpointAnswerer:
    """Answers by an OpenAI server; `base_url` ends in /v1."""

    def __init__(
        self, base_url: str, model: str, *, api_key: str = "none", concurrency: int = 128
    ) -> None:
        self._url, self._model = base_url.rstrip("/").removesuffix("/v1"), model
        self._headers = {"authorization": f"Bearer {api_key}"}
        self._concurrency = concurrency

    def __call__(self, requests: Sequence[Request], read: Callable[[int, Json], T]) -> list[T]:
        """See `Answerer`.

        Raises:
            EngineError: the server refuses one, or fails it again and again.
        """
        return asyncio.run(self._answer(requests, read))

    async def _answer(self, requests: Sequence[Request], read: Callable[[int, Json], T]) -> list[T]:
        limits = httpx.Limits(max_connections=self._concurrency)
        async with httpx.AsyncClient(timeout=None, limits=limits, headers=self._headers) as client:
            gate = asyncio.Semaphore(self._concurrency)

            async def one(at: int, request: Request) -> T:
                async with gate:
                    return read(at, await self._ask(client, request))

            return list(await asyncio.gather(*map(one, range(len(requests)), requests)))

    async def _ask(self, client: httpx.AsyncClient, request: Request) -> Json:
        body = {**request.body, "model": self._model}
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(ATTEMPTS),
                wait=_pause,
                retry=retry_if_exception_type((httpx.TransportError, _Busy)),
                reraise=True,
            ):
                with attempt:
                    reply = await client.post(f"{self._url}{request.endpoint}", json=body)
                    if reply.status_code in RETRIED:
                        raise _Busy(reply)
        except (httpx.TransportError, _Busy) as error:
            raise EngineError(f"{self._url} does not answer: {error}") from error
        if reply.status_code != 200:
            raise EngineError(
                f"{self._url} refused a request with {reply.status_code}: {reply.text[:500]}"
            )
        answer: Json = reply.json()
        return answer


class _Busy(Exception):
    """The server cannot answer now; `after_s` is when it asked to be asked again."""

    def __init__(self, reply: httpx.Response) -> None:
        super().__init__(f"status {reply.status_code}: {reply.text[:500]}")
        stated = reply.headers.get("retry-after", "")
        self.after_s = float(stated) if stated.isdigit() else 0.0


_backoff = wait_random_exponential(max=60)


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return max(_backoff(state), error.after_s if isinstance(error, _Busy) else 0.0)
