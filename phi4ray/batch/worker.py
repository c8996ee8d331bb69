"""A shard worker: reads a shard's rows, has a replica answer them, writes the part.

Several shards run at once in one worker, see `phi4ray.batch.answers`.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import pyarrow as pa
import tenacity

from phi4ray.batch.answers import Answers, Done
from phi4ray.batch.carried import conform, decode_schema, lasting
from phi4ray.batch.files import Reader
from phi4ray.batch.parts import (
    COLUMNS,
    Receipt,
    Result,
    encode_part,
    failed_rows,
    make_receipt,
    part_reader,
    put_part,
    read_part,
    read_receipt,
    receipt_of,
    results_of,
    row_name,
)
from phi4ray.batch.plan import Plan, Shard, Slice
from phi4ray.batch.reads import Reads
from phi4ray.batch.rows import BrokenRow, Defaults, Request, record_id, to_request
from phi4ray.config import BatchConfig
from phi4ray.errors import ObjectNotFoundError, TransientStorageError
from phi4ray.protocol import Replica, RowError

storage_retry = tenacity.retry(
    retry=tenacity.retry_if_exception_type(TransientStorageError),
    wait=tenacity.wait_random_exponential(multiplier=1, max=60),
    stop=tenacity.stop_after_delay(600),
    reraise=True,
)
"""Rides out an outage of the store: a shard's answers are worth ten minutes of waiting."""

REWRITTEN_AT_ONCE = 2
"""Parts held whole to put rows into: one waits for the store while the other is encoded."""


Rows = tuple[list[Result], list[Request | None], pa.Table]
"""Rows without answers, what to ask for each that is no error, and what is carried."""


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
        self._reads = Reads(plan.inputs, storage_retry(self._read))
        self._answers = Answers(config, replica)
        self._encoding = asyncio.Lock()
        self._rewriting = asyncio.Semaphore(REWRITTEN_AT_ONCE)

    def stop(self, error: RowError) -> None:
        """Give every row that is not answered yet this error; those in flight are aborted.

        Rows that are answered keep their answers, so that open shards are written whole. To be
        called on the worker's event loop; a second call changes nothing.
        """
        self._answers.stop(error)

    def stats(self) -> WorkerStats:
        """A snapshot for progress; may be taken from any thread."""
        kv = self._replica.kv()
        return WorkerStats(
            rows_in_flight=self._answers.pacer.rows,
            kv_used_fraction=kv.used_tokens / max(1, kv.capacity_tokens),
            running=kv.running,
            waiting=kv.waiting,
            open_shards=self._answers.open,
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
        with self._reads.queued(shard.slices) as read:
            try:
                return await asyncio.to_thread(
                    storage_retry(read_receipt), self._config.output, self._plan, index
                )
            except ObjectNotFoundError:
                pass
            began = time.monotonic()
            results, requests, carried = _joined(await read())
        with self._answers.closing(index):
            await self._answers.answer(index, results, requests)
            return await self._write(shard, results, carried, began)

    async def _rerun_errors(self, shard: Shard) -> Receipt:
        began = time.monotonic()
        failed, new, requests = await self._read_failed(shard)
        if not failed:  # a task that is run again, after its part was written
            return await asyncio.to_thread(
                storage_retry(read_receipt), self._config.output, self._plan, shard.index
            )
        with self._answers.closing(shard.index):
            await self._answers.answer(shard.index, new, requests)
            async with self._rewriting:
                table = await asyncio.to_thread(
                    storage_retry(read_part), self._config.output, self._plan, shard.index
                )
                rows = await asyncio.to_thread(results_of, table)
                for at, result in zip(failed, new, strict=True):
                    if rows[at].error_code is not None:  # else another worker was faster
                        rows[at] = replace(result, attempts=rows[at].attempts + result.attempts)
                carried, before = table.drop_columns(COLUMNS.names), receipt_of(table.schema)
                carried, _ = conform(carried, lasting(carried.schema))  # of an earlier version
                del table  # `rows` hold what it held
                return await self._write(shard, rows, carried, began, before)

    async def _read_failed(
        self, shard: Shard
    ) -> tuple[list[int], list[Result], list[Request | None]]:
        """The places of its failed rows, these without answers, and what to ask for each.

        Many shards are rerun at once: what is kept of each meanwhile is only this.
        """
        with self._reads.queued(shard.slices) as read:
            failed = await asyncio.to_thread(
                storage_retry(failed_rows), self._config.output, self._plan, shard.index
            )
            if not failed:
                return [], [], []
            rows, requests, _ = _joined(await read())
        return failed, [rows[at] for at in failed], [requests[at] for at in failed]

    def _read(self, piece: Slice) -> Rows:
        results: list[Result] = []
        requests: list[Request | None] = []
        uri = self._plan.inputs[piece.file].uri
        records = self._reader.read(piece)
        for number, record in enumerate(records.rows, piece.row_start):
            name = row_name(uri, number)
            request: Request | RowError
            if isinstance(record, RowError):
                row_id = record.id if isinstance(record, BrokenRow) else None
                request = record
            else:
                row_id, request = record_id(record), to_request(record, self._defaults)
            result = Result(row_id or name, uri, number)
            if isinstance(request, RowError):
                error = RowError(request.code, f"{name}: {request.message}")
                results.append(result.failed(error))
                requests.append(None)
            else:
                results.append(result)
                requests.append(request)
        return results, requests, records.carried

    async def _write(
        self,
        shard: Shard,
        results: list[Result],
        carried: pa.Table,
        began: float,
        before: Receipt | None = None,
    ) -> Receipt:
        """Write a part, or put it in the place of the one with the receipt `before`."""
        # The wall clock may be set meanwhile: it tells when, and never how long.
        finished_at = time.time()
        started_at = finished_at - (time.monotonic() - began)
        receipt = make_receipt(self._plan.plan_id, shard.index, results, started_at, finished_at)
        if before is not None:
            first = min(before.started_at, started_at)
            receipt = receipt.model_copy(update={"started_at": first, "rerun_at": started_at})

        async with self._encoding:  # it takes several times the memory of what it writes
            data = await asyncio.to_thread(
                lambda: encode_part(part_reader(results, carried, receipt))
            )

        @storage_retry
        def put() -> Receipt:
            replacing = before is not None
            return put_part(self._config.output, self._plan, receipt, data, replacing=replacing)

        return await asyncio.to_thread(put)


def _joined(slices: Sequence[Rows]) -> Rows:
    results, requests, carried = zip(*slices, strict=True)
    return list(chain(*results)), list(chain(*requests)), pa.concat_tables(carried)
