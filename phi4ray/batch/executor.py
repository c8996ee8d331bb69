"""Where shards run: the seam between a job and whatever hosts its workers.

`cluster.batch.RayExecutor` runs them on Ray; `InProcessExecutor` runs them here, in this process.
"""

import asyncio
import contextlib
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import uvloop

from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import Plan
from phi4ray.batch.worker import ShardWorker, WorkerStats
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.engines import make_replica
from phi4ray.protocol import Replica, RowError

T = TypeVar("T")
R = TypeVar("R")

TICK_S = 0.5

FILLS = 16
"""How many times the rows of the shards in flight fill a replica.

A shard is in flight until its longest answer has ended. With few of them, all soon wait for one
such row each, and the engine has nothing else to do: with four fills 512 rows in flight fell to 2
where lengths were heavy-tailed (benchmarks/RESULTS.md).
"""

MAX_IN_FLIGHT = 128

IN_FLIGHT_BYTES = 1 << 30
"""What the shards that a replica works on may have as input; decoded they take several times it."""


class Executor(Protocol):
    """Runs the two kinds of work of a job."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of the items; items are taken only a little ahead of results.

        Each item is a task, and the function goes with each: what it holds must not grow with the
        job.
        """
        ...

    def run_shards(
        self, config: BatchConfig, plan: Plan, pending: Sequence[int]
    ) -> Iterator[Receipt | None]:
        """Answer shards; yields each one's receipt as it is written, and None about every
        `TICK_S` so that the caller can show progress. Closing the iterator stops the work.

        Raises:
            EngineStartError: the engine cannot start, with the cause.
            EngineDeadError: engines die again and again without finishing a shard.
            Phi4rayError: whatever a worker raised.
        """
        ...

    def stats(self) -> Mapping[str, WorkerStats]:
        """The latest stats of every worker, by its name."""
        ...


def shards_in_flight(config: BatchConfig, plan: Plan, rows: int | None = None) -> int:
    """Shards that one replica works on at once: enough rows to fill it so many times, and one more.

    `rows` are those that are asked of a shard, in the mean; None: all.

    Some of the rows are with the engine or next in its queue (`phi4ray.batch.pacing`), from the
    others the longest are chosen. One shard is being read or written meanwhile. Of large rows
    there are fewer at once: `IN_FLIGHT_BYTES` of input.
    """
    if config.shards_in_flight is not None:
        return config.shards_in_flight
    shards = max(1, len(plan.shards))
    mean_rows = max(1, plan.rows // shards if rows is None else rows)
    mean_bytes = max(1, plan.prompt_bytes * mean_rows // max(1, plan.rows))
    wanted = 1 + -(-FILLS * config.engine.max_num_seqs // mean_rows)
    return max(2, min(MAX_IN_FLIGHT, wanted, IN_FLIGHT_BYTES // mean_bytes))


def share_of(shards: int, replicas: int, wanted: int) -> int:
    """Shards that a replica takes at once, so that the first to start leave the others theirs."""
    return min(wanted, max(2, -(-shards // replicas)))


class InProcessExecutor:
    """One replica in this process: tests, laptops, and a single GPU without a cluster.

    `stopped` is asked about every `TICK_S`, and once before the first row: an error that it gives
    becomes that of every row which is not answered yet, see `ShardWorker.stop`.
    """

    def __init__(
        self,
        make: Callable[[EngineConfig], Replica] = make_replica,
        stopped: Callable[[], RowError | None] = lambda: None,
    ) -> None:
        self._make = make
        self._stopped = stopped
        self._worker: ShardWorker | None = None

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """See `Executor.map`."""
        return map(function, items)

    def stats(self) -> Mapping[str, WorkerStats]:
        """See `Executor.stats`."""
        return {"local": self._worker.stats()} if self._worker else {}

    def run_shards(
        self, config: BatchConfig, plan: Plan, pending: Sequence[int]
    ) -> Iterator[Receipt | None]:
        """See `Executor.run_shards`."""
        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        receipts: queue.SimpleQueue[Receipt] = queue.SimpleQueue()
        main = loop.create_task(self._run(config, plan, pending, receipts.put))

        def stop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
                loop.call_soon_threadsafe(main.cancel)

        try:
            yield from in_thread(lambda: _run_loop(loop, main), receipts, stop)
        finally:
            self._worker = None

    async def _run(
        self,
        config: BatchConfig,
        plan: Plan,
        pending: Sequence[int],
        done: Callable[[Receipt], None],
    ) -> None:
        replica = self._make(config.engine)
        await replica.start()
        try:
            self._worker = worker = ShardWorker(config, plan, replica)
            todo = iter(pending)

            async def lane() -> None:
                for index in todo:
                    done(await worker.run(index))

            watch = asyncio.create_task(self._watch(worker))
            await asyncio.sleep(0)  # its first look comes before the first row
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(shards_in_flight(config, plan)):
                        group.create_task(lane())
            finally:
                watch.cancel()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        finally:
            await replica.stop()

    async def _watch(self, worker: ShardWorker) -> None:
        while (error := self._stopped()) is None:
            await asyncio.sleep(TICK_S)
        worker.stop(error)


def _run_loop(loop: asyncio.AbstractEventLoop, main: asyncio.Task[None]) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def in_thread(
    work: Callable[[], None], results: "queue.SimpleQueue[T]", stop: Callable[[], None]
) -> Iterator[T | None]:
    """Run work in a thread; yields what it puts into `results`, and None at least each `TICK_S`.

    Raises what the work raises, after all it had put. A consumer that goes away calls `stop` and
    waits for the thread's end.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="phi4ray-shards") as pool:
        running = pool.submit(work)
        wake: Any = results  # or the end would be noticed only after a tick
        running.add_done_callback(lambda _: wake.put(None))
        try:
            while not (ended := running.done()) or not results.empty():
                try:
                    yield results.get(timeout=0 if ended else TICK_S)
                except queue.Empty:
                    yield None
            running.result()
        finally:
            if not running.done():
                stop()


def threaded(function: Callable[[T], R], items: Iterable[T], threads: int = 32) -> list[R]:
    """Results in order, for short requests to the store that only wait."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
