"""A replica's second door: shards of batch jobs, answered in the slack of online traffic.

What the job table of the application orders is done here: plans are read from where the jobs
write, rows go through `phi4ray.serve.harvest`, parts are written by the same `ShardWorker` as
everywhere. Everything is on the replica's event loop; files are read and written in threads.
"""

import asyncio
import logging
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from phi4ray.batch.answers import within
from phi4ray.batch.identity import check_same_engine
from phi4ray.batch.jobtable import Job, Orders, Report
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import PLAN_NAME
from phi4ray.batch.planning import stored_plan
from phi4ray.batch.worker import ShardWorker, WorkerStats, storage_retry
from phi4ray.config import Endpoint, EngineConfig
from phi4ray.demand import Lengths, Size
from phi4ray.errors import ClusterError, EngineDeadError, Phi4rayError, PlanMismatchError
from phi4ray.preemption import Preemptible
from phi4ray.protocol import Answer, Json, KVState, Replica
from phi4ray.serve.harvest import Harvest
from phi4ray.storage import join

BATCH_PRIORITY = 1000
"""For the engine's own scheduler: behind every online request, should its cache run full."""


class HarvestedReplica:
    """A `phi4ray.protocol.Replica` for one job: it answers in the slack of another one."""

    def __init__(
        self, replica: Replica, harvest: Harvest, job: str, timeout_s: float | None
    ) -> None:
        self._replica = replica
        self._harvest = harvest
        self._job = job
        self._timeout_s = timeout_s
        self._lengths = Lengths()

    async def start(self) -> None:
        """The replica below has been started."""

    async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
        """See `phi4ray.protocol.Replica.complete`. Waiting for slack is not under the timeout."""
        size, demand = Size.of(body, endpoint), self._lengths.demand
        body = {**body, "priority": BATCH_PRIORITY}
        row = Preemptible()

        async def work() -> Answer:
            with row.asked():
                return await within(self._timeout_s, self._replica.complete(endpoint, body))

        answer = await self._harvest.run(
            self._job, demand(*size), demand(*size._replace(limit=0)), work
        )
        usage: Json = answer.body.get("usage") or {}
        if prompt_tokens := usage.get("prompt_tokens"):
            completion_tokens = usage.get("completion_tokens") or 0
            self._lengths.observe(
                size.chars, prompt_tokens - size.ids, completion_tokens, size.sequences
            )
        return answer

    def kv(self) -> KVState:
        """See `phi4ray.protocol.Replica.kv`."""
        return self._replica.kv()

    async def stop(self) -> None:
        """The replica below goes on."""


logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    job: Job
    worker: asyncio.Task[ShardWorker]
    lanes: dict[int, asyncio.Task[None]] = field(default_factory=dict)


class ShardHost:
    """The shards that one replica works on. For one event loop."""

    def __init__(self, name: str, engine: EngineConfig, replica: Replica, harvest: Harvest) -> None:
        self.changed = asyncio.Event()
        """Set when there is something to tell at once."""
        self._name = name
        self._engine = engine
        self._replica = replica
        self._harvest = harvest
        self._jobs: dict[str, _Running] = {}
        self._finished: list[tuple[str, Receipt]] = []
        self._failed: list[tuple[str, Phi4rayError]] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self._draining = False
        self._engine_died = False

    def drain(self, draining: bool) -> None:
        """Take no more shards and hand back those in hand: this replica is about to end.

        Its online requests may take minutes to end, and other replicas have time meanwhile. False
        takes it back.
        """
        if draining == self._draining:
            return
        self._draining = draining
        if draining:
            self._end_all(frozenset(self._jobs))
        self.changed.set()

    @property
    def working(self) -> bool:
        """Whether it takes part in a job."""
        return bool(self._jobs)

    def report(self) -> Report:
        """What to tell the job table."""
        return Report(
            replica=self._name,
            engine=self._engine,
            stats={name: _stats(running) for name, running in self._jobs.items()},
            holding={name: frozenset(running.lanes) for name, running in self._jobs.items()},
            wanted={name: self._wanted(running) for name, running in self._jobs.items()},
            finished=tuple(self._finished),
            failed=tuple(self._failed),
            draining=self._draining,
            engine_died=self._engine_died,
        )

    def obey(self, report: Report, orders: Orders) -> None:
        """Do what the table has answered to a report."""
        self._finished = self._finished[len(report.finished) :]
        self._failed = self._failed[len(report.failed) :]
        if self._draining:
            return  # the next report says so
        self._end_all(self._jobs.keys() - orders.live)
        for job in orders.new:
            if job.name not in self._jobs:
                self._harvest.join(job.name, job.weight, job.priority)
                worker = asyncio.create_task(self._worker(job))
                self._jobs[job.name] = _Running(job, worker)
        # Without those that have ended here since the report was made: the next one says so.
        for name, running in self._jobs.items():
            for shard in orders.drop.get(name, frozenset()) & running.lanes.keys():
                running.lanes.pop(shard).cancel()
            stopped, ready = orders.stop.get(name), _ready(running)
            if stopped is not None and ready is not None:
                ready.stop(stopped)
            for shard in orders.begin.get(name, ()):
                if shard not in running.lanes:
                    running.lanes[shard] = asyncio.create_task(self._lane(running, shard))

    def _wanted(self, running: _Running) -> int:
        """More shards only while rows go as they come: another replica may have room for them."""
        name = running.job.name
        if self._harvest.waiting(name) > self._harvest.running(name):
            return 0
        return max(0, running.job.lanes - len(running.lanes))

    async def _worker(self, job: Job) -> ShardWorker:
        plan = await asyncio.to_thread(storage_retry(stored_plan), job.config.output)
        if plan.plan_id != job.plan_id:
            uri = join(job.config.output, PLAN_NAME)
            raise PlanMismatchError(f"{uri} was replaced by another job: run that one elsewhere")
        if job.same_engine:
            check_same_engine(plan, self._engine)
        config = job.config.model_copy(update={"request_timeout_s": None})
        replica = HarvestedReplica(
            self._replica, self._harvest, job.name, job.config.request_timeout_s
        )
        return ShardWorker(config, plan, replica)

    async def _lane(self, running: _Running, shard: int) -> None:
        name = running.job.name
        try:
            worker = await asyncio.shield(running.worker)
            receipt = await worker.run(shard)  # `obey` replaces the list meanwhile
            self._finished.append((name, receipt))
        except EngineDeadError:
            self._engine_died = True  # this process is about to end, and tells it until then
        except Phi4rayError as error:
            self._failed.append((name, error))
        except Exception as error:
            logger.exception("shard %d of %s", shard, name)
            self._failed.append((name, ClusterError(f"shard {shard} failed: {error!r}")))
        finally:
            running.lanes.pop(shard, None)
            self.changed.set()

    def _end_all(self, names: AbstractSet[str]) -> None:
        for name in names:
            self._end(self._jobs.pop(name))

    def _end(self, running: _Running) -> None:
        name = running.job.name
        tasks = [running.worker, *running.lanes.values()]
        for task in tasks:
            task.cancel()

        async def leave() -> None:
            await asyncio.gather(*tasks, return_exceptions=True)
            if name not in self._jobs:
                self._harvest.leave(name)

        leaving = asyncio.create_task(leave())
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)


def _ready(running: _Running) -> ShardWorker | None:
    worker = running.worker
    if worker.done() and not worker.cancelled() and worker.exception() is None:
        return worker.result()
    return None


def _stats(running: _Running) -> WorkerStats:
    worker = _ready(running)
    return worker.stats() if worker else WorkerStats()
