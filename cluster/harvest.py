"""Batch jobs on the replicas of a running Serve application: the actor between, and both its ends.

    TableExecutor (driver) ── submit, poll ──► JobBoard ◄── exchange ── every replica

No row and no answer passes here: replicas read inputs and write parts themselves.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from cluster.shared import NAMESPACE, shared_actor
from phi4ray.batch.executor import Executor
from phi4ray.batch.jobtable import Job, JobTable, News, Orders, Report
from phi4ray.config import EngineConfig
from phi4ray.errors import ClusterError
from phi4ray.protocol import RowError
from phi4ray.serve.executor import TableExecutor
from phi4ray.serve.shards import ShardHost

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
        except Exception:  # nobody waits for this task, which would end for good
            logger.exception("what the actor of batch jobs said could not be done")
        # A shard that is done is told at once, but not each of many small ones by itself.
        await asyncio.sleep(EXCHANGE_S / 10)
        try:
            async with asyncio.timeout(EXCHANGE_S if host.working else IDLE_S):
                await host.changed.wait()
        except TimeoutError:
            pass
        host.changed.clear()


class Board:
    """An application's `JobBoard`, as drivers ask it.

    Raises:
        ClusterError: no such application runs on the cluster that this process is connected to.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        try:
            self._actor = ray.get_actor(_board_name(application), NAMESPACE)
        except ValueError:
            raise ClusterError(
                f"no application {application!r} of phi4ray runs on this cluster: start it with "
                "`python jobs/serve.py`, or look for its name with `serve status`"
            ) from None

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the board, through its restarts.

        Raises:
            ClusterError: it has been away for `LOST_S`.
        """
        until = time.monotonic() + LOST_S
        while True:
            try:
                return ray.get(getattr(self._actor, method).remote(*arguments), timeout=LOST_S)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
                if time.monotonic() > until:
                    raise ClusterError(
                        f"the application {self._application!r} is gone: the same command goes on "
                        "from the parts that are done, once it runs again"
                    ) from error
                time.sleep(EXCHANGE_S)

    def engine(self) -> EngineConfig:
        """What the application's replicas run.

        Raises:
            ClusterError: none of them has been heard of for `LOST_S`.
        """
        until = time.monotonic() + LOST_S
        while (found := self.ask("engine")) is None:
            if time.monotonic() > until:
                raise ClusterError(
                    f"no replica of {self._application!r} is running: see `serve status`"
                )
            time.sleep(EXCHANGE_S)
        engine: EngineConfig = found
        return engine

    def executor(
        self,
        tasks: Executor,
        stopped: Callable[[], RowError | None] = lambda: None,
        say: Callable[[str], None] = logger.warning,
        *,
        same_engine: bool = True,
    ) -> TableExecutor:
        """Make the executor of a job on the application's replicas."""
        return TableExecutor(
            self._application, self.ask, tasks, stopped, say, same_engine=same_engine
        )
