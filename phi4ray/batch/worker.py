"""A shard worker: reads a shard's rows, has a replica answer them, writes the part.

Several shards run at once in one worker. Of all their rows, those that may take longest go to the
engine first, those that share a prefix together, and rows alike in the order of the shards: nothing
waits for a whole shard to finish.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import pyarrow as pa
import tenacity

from phi4ray.batch.carried import decode_schema
from phi4ray.batch.files import Reader
from phi4ray.batch.pacing import Pacer, rank_of
from phi4ray.batch.parts import (
    Receipt,
    Result,
    make_receipt,
    part_table,
    read_part,
    read_receipt,
    receipt_of,
    results_of,
    write_part,
)
from phi4ray.batch.plan import Plan, Shard
from phi4ray.batch.rows import Defaults, Request, record_id, to_request
from phi4ray.config import BatchConfig
from phi4ray.demand import Lengths, max_tokens_of, prompt_of
from phi4ray.errors import ObjectNotFoundError, TransientStorageError
from phi4ray.protocol import Answer, Replica, RowError, refusal

RETRY_STATUS = frozenset({408, 429, 500, 502, 503, 504})

BACKOFF_S = 0.2
MAX_BACKOFF_S = 10.0
"""A row waits so long after its first failed try, then twice as long each time, up to the most."""

storage_retry = tenacity.retry(
    retry=tenacity.retry_if_exception_type(TransientStorageError),
    wait=tenacity.wait_random_exponential(multiplier=1, max=60),
    stop=tenacity.stop_after_delay(600),
    reraise=True,
)
"""Rides out an outage of the store: a shard's answers are worth ten minutes of waiting."""


@dataclass(frozen=True, slots=True)
class _Row:
    result: Result
    request: Request | None


@dataclass(frozen=True, slots=True)
class Done:
    """Finished rows, added up. `errors` counts those without an answer, by code."""

    rows: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Done") -> "Done":
        errors = dict(self.errors)
        for code, rows in other.errors.items():
            errors[code] = errors.get(code, 0) + rows
        return Done(
            self.rows + other.rows,
            errors,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What a worker does at the moment, for progress; finished shards are in their receipts.

    `open_shards` tells what is finished of each shard whose part is not written yet.
    """

    rows_in_flight: int = 0
    kv_used_fraction: float = 0.0
    running: int = 0
    waiting: int = 0
    open_shards: Mapping[int, Done] = field(default_factory=dict)


class ShardWorker:
    """Answers shards of one plan with one replica."""

    def __init__(self, config: BatchConfig, plan: Plan, replica: Replica) -> None:
        self._config = config
        self._plan = plan
        self._replica = replica
        self._defaults = Defaults.of(config)
        self._reader = Reader(
            plan.inputs, decode_schema(plan.carried), int(config.max_row_mib * (1 << 20))
        )
        self._pacer = Pacer(replica.kv())
        self._lengths = Lengths()
        self._open: dict[int, Done] = {}
        self._in_flight: set[asyncio.Task[None]] = set()
        self._stop: RowError | None = None

    def stop(self, error: RowError) -> None:
        """Give every row that is not answered yet this error; those in flight are aborted.

        Rows that are answered keep their answers, so that open shards are written whole. To be
        called on the worker's event loop; a second call changes nothing.
        """
        if self._stop is None:
            self._stop = error
            for task in self._in_flight:
                task.cancel()

    def stats(self) -> WorkerStats:
        """A snapshot for progress; may be taken from any thread."""
        kv = self._replica.kv()
        return WorkerStats(
            rows_in_flight=self._pacer.rows,
            kv_used_fraction=kv.used_tokens / max(1, kv.capacity_tokens),
            running=kv.running,
            waiting=kv.waiting,
            open_shards=self._open.copy(),
        )

    async def run(self, index: int) -> Receipt:
        """Answer one shard and write its part, unless that has been done.

        Raises:
            EngineDeadError: the replica is gone; nothing of this shard was written.
            InputError: the input is broken or has changed.
            StorageError: the part could not be written.
        """
        shard = self._plan.shards[index]
        if self._config.retry_errors:
            return await self._rerun_errors(shard)
        try:
            return await asyncio.to_thread(
                storage_retry(read_receipt), self._config.output, self._plan, index
            )
        except ObjectNotFoundError:
            pass
        began = time.monotonic()
        rows, carried = await asyncio.to_thread(storage_retry(self._read), shard)
        results = await self._answer(shard, rows)
        return await self._write(shard, results, carried, began, replacing=False)

    async def _rerun_errors(self, shard: Shard) -> Receipt:
        table = await asyncio.to_thread(
            storage_retry(read_part), self._config.output, self._plan, shard.index
        )
        began = time.monotonic()
        old = results_of(table)
        failed = [at for at, row in enumerate(old) if row.error_code is not None]
        if not failed:  # a task that is run again, after its part was written
            return receipt_of(table.schema)
        rows, carried = await asyncio.to_thread(storage_retry(self._read), shard)
        new = await self._answer(shard, [rows[at] for at in failed])
        for at, result in zip(failed, new, strict=True):
            old[at] = replace(result, attempts=old[at].attempts + result.attempts)
        return await self._write(shard, old, carried, began, replacing=True)

    def _read(self, shard: Shard) -> tuple[list["_Row"], pa.Table]:
        rows: list[_Row] = []
        tables = []
        for piece in shard.slices:
            uri = self._plan.inputs[piece.file].uri
            records = self._reader.read(piece)
            tables.append(records.carried)
            for number, record in enumerate(records.rows, piece.row_start):
                name = f"{uri}#{number}"
                if isinstance(record, RowError):
                    error = RowError(record.code, f"{name}: {record.message}")
                    rows.append(_Row(Result(name, uri, number).failed(error), None))
                    continue
                result = Result(record_id(record) or name, uri, number)
                request = to_request(record, self._defaults)
                if isinstance(request, RowError):
                    result = result.failed(RowError(request.code, f"{name}: {request.message}"))
                    rows.append(_Row(result, None))
                else:
                    rows.append(_Row(result, request))
        return rows, pa.concat_tables(tables)

    async def _answer(self, shard: Shard, rows: list["_Row"]) -> list[Result]:
        """Have every row with a request answered; the rest are errors already."""
        self._open[shard.index] = Done()
        results = [row.result for row in rows]

        async def answer(at: int, request: Request) -> None:
            prompt, limit = prompt_of(request.body), max_tokens_of(request.body)
            demand = await self._pacer.acquire(
                lambda: self._lengths.demand(len(prompt), limit), rank_of(limit), prompt
            )
            try:
                result = results[at] = await self._answer_or_stop(results[at], request)
            finally:
                self._pacer.release(demand)
            self._count(shard, result)
            if result.prompt_tokens:
                self._lengths.observe(
                    len(prompt), result.prompt_tokens, result.completion_tokens or 0
                )

        try:
            async with asyncio.TaskGroup() as group:
                for at, row in enumerate(rows):
                    if row.request is None:
                        self._count(shard, row.result)
                    else:
                        group.create_task(answer(at, row.request))
        except BaseExceptionGroup as failures:
            # One cause and not a group, so that it keeps its type over process borders.
            raise failures.exceptions[0] from None
        return results

    async def _answer_or_stop(self, row: Result, request: Request) -> Result:
        if self._stop is not None:
            return row.failed(self._stop)
        task = cast(asyncio.Task[None], asyncio.current_task())
        self._in_flight.add(task)
        try:
            return await self._answer_row(row, request)
        except asyncio.CancelledError:
            # Cancelled by `stop`, and by nobody else besides.
            if self._stop is None or task.uncancel():
                raise
            return row.failed(self._stop)
        finally:
            self._in_flight.discard(task)

    async def _answer_row(self, row: Result, request: Request) -> Result:
        for attempt in itertools.count(1):
            started = time.perf_counter()
            answer = await within(
                self._config.request_timeout_s,
                self._replica.complete(request.endpoint, request.body),
            )
            latency_s = time.perf_counter() - started
            if answer.status not in RETRY_STATUS or attempt >= self._config.max_attempts:
                break
            pause_s = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** min(attempt, 16))
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        return replace(row.answered(answer), attempts=attempt, latency_s=latency_s)

    def _count(self, shard: Shard, result: Result) -> None:
        self._open[shard.index] += Done(
            rows=1,
            errors={} if result.error_code is None else {result.error_code: 1},
            prompt_tokens=result.prompt_tokens or 0,
            completion_tokens=result.completion_tokens or 0,
        )

    async def _write(
        self,
        shard: Shard,
        results: list[Result],
        carried: pa.Table,
        began: float,
        *,
        replacing: bool,
    ) -> Receipt:
        # The wall clock may be set meanwhile: it tells when, and never how long.
        finished_at = time.time()
        started_at = finished_at - (time.monotonic() - began)
        receipt = make_receipt(self._plan.plan_id, shard.index, results, started_at, finished_at)

        @storage_retry
        def write() -> Receipt:
            table = part_table(results, carried, receipt)
            return write_part(self._config.output, self._plan, table, replacing=replacing)

        written = await asyncio.to_thread(write)
        del self._open[shard.index]
        return written


async def within(timeout_s: float | None, answer: Awaitable[Answer]) -> Answer:
    """Wait for an answer; gives a 408 when it takes longer than a job allows a row."""
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError:
        return refusal("timeout", f"no answer within request_timeout_s={timeout_s}", status=408)
