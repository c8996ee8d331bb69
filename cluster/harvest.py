"""Batch jobs on the replicas of a running Serve application: the actor between, and both its ends.

    ServeExecutor (driver) ── submit, poll ──► JobBoard ◄── exchange ── every replica

No row and no answer passes here: replicas read inputs and write parts themselves.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ray

from cluster.shared import NAMESPACE, shared_actor
from phi4ray.batch.executor import TICK_S, Executor, shards_in_flight
from phi4ray.batch.jobtable import Job, JobTable, News, Orders, Report, waits_for
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import Plan
from phi4ray.batch.worker import WorkerStats
from phi4ray.batches.executors import stopped_executor
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.errors import ClusterError
from phi4ray.protocol import RowError
from phi4ray.serve.shards import ShardHost

T = TypeVar("T")
R = TypeVar("R")

EXCHANGE_S = 0.25
IDLE_S = 1.0
"""So often a replica without jobs asks for one."""
LOST_S = 60.0
"""So long a driver waits for the actor in the middle to come back."""

logger = logging.getLogger(__name__)


class JobBoard:
    """The actor: a `phi4ray.batch.jobtable.JobTable` with a clock. Forgets all when restarted."""

    def __init__(self) -> None:
        self._table = JobTable(time.monotonic())

    def engine(self) -> EngineConfig | None:
        """What the replicas run, once one was heard of."""
        return self._table.engine

    def open_shards(self, engine: EngineConfig, batch_replicas: int) -> int:
        """See `JobTable.open_shards`."""
        return self._table.open_shards(engine, batch_replicas, time.monotonic())

    def submit(self, job: Job, pending: Sequence[int]) -> None:
        """See `JobTable.submit`."""
        self._table.submit(job, pending, time.monotonic())

    def poll(self, name: str, seen: int) -> News | None:
        """See `JobTable.poll`."""
        return self._table.poll(name, seen, time.monotonic())

    def forget(self, name: str) -> None:
        """See `JobTable.forget`."""
        self._table.forget(name)

    def stop(self, name: str, error: RowError) -> None:
        """See `JobTable.stop`."""
        self._table.stop(name, error)

    def exchange(self, report: Report) -> Orders:
        """See `JobTable.exchange`."""
        return self._table.exchange(report, time.monotonic())


def _board_name(application: str) -> str:
    return f"phi4ray-jobs-{application}"


def job_board(application: str) -> Any:
    """The application's board; started if it does not run."""
    return shared_actor(JobBoard, _board_name(application))


async def host_shards(application: str, host: ShardHost) -> None:
    """Exchange with the application's board for as long as this replica lives."""
    board = job_board(application)
    while True:
        report = host.report()
        try:
            host.obey(report, await board.exchange.remote(report))
        except ray.exceptions.RayError:
            logger.warning("the actor of batch jobs is away; their rows go on")
        # A shard that is done is told at once, but not each of many small ones by itself.
        await asyncio.sleep(EXCHANGE_S / 10)
        try:
            async with asyncio.timeout(EXCHANGE_S if host.working else IDLE_S):
                await host.changed.wait()
        except TimeoutError:
            pass
        host.changed.clear()


class ServeExecutor:
    """A `phi4ray.batch.executor.Executor` on the replicas of a running application.

    `tasks` is what `map` runs on. `stopped` is asked at each tick: from when it gives an error,
    that is what every row without an answer gets, see `ShardWorker.stop`. `say` is told in words
    what a job waits for that no replica works on.

    Raises:
        ClusterError: no such application runs on the cluster that this process is connected to.
    """

    def __init__(
        self,
        application: str,
        tasks: Executor,
        stopped: Callable[[], RowError | None] = lambda: None,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self._application = application
        self._tasks = tasks
        self._stopped = stopped
        self._say = say
        self._stats: Mapping[str, WorkerStats] = {}
        try:
            self._board = ray.get_actor(_board_name(application), NAMESPACE)
        except ValueError:
            raise ClusterError(
                f"no application {application!r} of phi4ray runs on this cluster: start it with "
                "`python jobs/serve.py`, or look for its name with `serve status`"
            ) from None

    def engine(self) -> EngineConfig:
        """What the application's replicas run.

        Raises:
            ClusterError: none of them has been heard of for `LOST_S`.
        """
        until = time.monotonic() + LOST_S
        while (found := self._ask("engine")) is None:
            if time.monotonic() > until:
                raise ClusterError(
                    f"no replica of {self._application!r} is running: see `serve status`"
                )
            time.sleep(EXCHANGE_S)
        engine: EngineConfig = found
        return engine

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """See `Executor.map`."""
        return self._tasks.map(function, items)

    def stats(self) -> Mapping[str, WorkerStats]:
        """See `Executor.stats`."""
        return self._stats

    def run_shards(
        self, config: BatchConfig, plan: Plan, pending: Sequence[int]
    ) -> Iterator[Receipt | None]:
        """See `Executor.run_shards`."""
        lanes = shards_in_flight(config, plan)
        name = f"{plan.plan_id}-{uuid.uuid4().hex[:8]}"
        job = Job(name, config, plan.plan_id, lanes, config.weight, config.priority)
        todo = dict.fromkeys(pending)
        self._ask("submit", job, list(todo))
        seen = 0
        stopping: RowError | None = None
        waiting = ""
        try:
            while todo:
                news: News | None = self._ask("poll", name, seen)
                if news is None:  # it was restarted
                    self._ask("submit", job, list(todo))
                    seen, stopping = 0, None
                    continue
                self._stats = news.stats
                for receipt in news.receipts:
                    seen += 1
                    if todo.pop(receipt.shard, ...) is None:
                        yield receipt
                if news.failure is not None:
                    raise news.failure
                if (waits := waits_for(self._application, news)) != waiting:
                    waiting = waits
                    if waiting:
                        self._say(waiting)
                if stopping is None:
                    if stopping := self._stopped():
                        self._ask("stop", name, stopping)
                elif not news.leased:
                    # What no replica has begun needs none.
                    yield from stopped_executor(stopping).run_shards(config, plan, list(todo))
                    return
                if todo:
                    yield None
                    time.sleep(TICK_S / 2)
        finally:
            self._stats = {}
            self._ask("forget", name)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the board, through its restarts."""
        until = time.monotonic() + LOST_S
        while True:
            try:
                return ray.get(getattr(self._board, method).remote(*arguments), timeout=LOST_S)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                if time.monotonic() > until:
                    raise ClusterError(
                        f"the application {self._application!r} is gone: the same command goes on "
                        "from the parts that are done, once it runs again"
                    ) from error
                time.sleep(EXCHANGE_S)
