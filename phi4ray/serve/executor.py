"""The driver's side of a job table: the executor of batch jobs on the replicas of a service."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from phi4ray.batch.executor import TICK_S, Executor, shards_in_flight
from phi4ray.batch.jobtable import ENGINE_DIED, Job, News, waits_for
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import Plan
from phi4ray.batch.worker import WorkerStats
from phi4ray.batches.executors import stopped_executor
from phi4ray.config import BatchConfig
from phi4ray.protocol import RowError

T = TypeVar("T")
R = TypeVar("R")


class TableExecutor:
    """A `phi4ray.batch.executor.Executor` for what a `phi4ray.batch.jobtable.JobTable` hands out.

    `ask` calls a method of the table, wherever it lives, by its name. `tasks` is what `map` runs
    on. `stopped` is asked at each tick: from when it gives an error, that is what every row without
    an answer gets, see `ShardWorker.stop`. `say` is told in words what a job waits for that no
    replica works on. With `same_engine` the job ends where the application gets another engine than
    the plan's.
    """

    def __init__(
        self,
        application: str,
        ask: Callable[..., Any],
        tasks: Executor,
        stopped: Callable[[], RowError | None],
        say: Callable[[str], None],
        *,
        same_engine: bool = True,
    ) -> None:
        self._application = application
        self._ask = ask
        self._tasks = tasks
        self._stopped = stopped
        self._say = say
        self._same_engine = same_engine
        self._stats: Mapping[str, WorkerStats] = {}

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
        name = f"{plan.plan_id}-{uuid.uuid4().hex[:8]}"
        lanes = shards_in_flight(config, plan)
        job = Job(
            name, config, plan.plan_id, lanes, config.weight, config.priority, self._same_engine
        )
        todo = dict.fromkeys(pending)
        seen, waiting = 0, ""
        stopping: RowError | None = None
        self._ask("submit", job, list(todo))
        try:
            while todo:
                news: News | None = self._ask("poll", name, seen)
                if news is None:  # the table was lost, and is a new one
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
                if given_up := [shard for shard in news.given_up if shard in todo]:
                    self._say(
                        f"given up are shards {given_up}, with each of which replica after replica "
                        f"went down: their rows get the error {ENGINE_DIED.code}. If the replicas' "
                        "logs say that the engine died, look for the row that kills it"
                    )
                    gone = stopped_executor(ENGINE_DIED).run_shards(config, plan, given_up)
                    for made in gone:
                        if made is None or todo.pop(made.shard, ...) is None:
                            yield made
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
