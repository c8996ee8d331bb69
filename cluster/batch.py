"""The batch job on Ray: Ray Data schedules shards over an autoscaling pool of replicas."""

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ray
from rich.console import Console

from cluster.board import MAX_FRUITLESS, Idle, start_board
from cluster.environment import set_defaults
from cluster.pool import End, this_end, through_workers
from cluster.worker import RayShardWorker, receipts_of
from phi4ray.batch.executor import TICK_S, in_thread, shards_in_flight, share_of
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import Plan
from phi4ray.batch.worker import WorkerStats
from phi4ray.config import BatchConfig, EngineConfig
from phi4ray.errors import ClusterError, Phi4rayError

T = TypeVar("T")
R = TypeVar("R")

# What workers must know and cannot guess. Secrets are not among it: they come with the node.
ENVIRONMENT = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "VLLM_LOGGING_LEVEL",
    "VLLM_NO_USAGE_STATS",
    "DO_NOT_TRACK",
)


STOP_S = 10.0
"""So long workers have to drop what they do."""


def logs_wanted() -> bool:
    """Whether what workers log is to be seen: where somebody said how much of it there shall be.

    Of an engine that cannot start or dies the job tells by itself, and the rest is in Ray's logs.
    """
    return "VLLM_LOGGING_LEVEL" in os.environ


class RayExecutor:
    """A `phi4ray.batch.executor.Executor` on the Ray cluster that this process is connected to."""

    worker: Any = RayShardWorker
    """The class that answers shards; benchmarks put one without an engine in its place."""

    def __init__(self, console: Console) -> None:
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of its every step
        self._console = console
        self._board: Any = None
        self._stats: dict[str, WorkerStats] = {}
        self._idle: dict[str, Idle] = {}
        self._environment = {"VLLM_LOGGING_LEVEL": "WARNING"} | {
            name: os.environ[name] for name in ENVIRONMENT if name in os.environ
        }

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """See `phi4ray.batch.executor.Executor.map`: one task an item, a window of them ahead."""
        window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        running: deque[Any] = deque()
        task = _apply.options(name=f"phi4ray:{getattr(function, 'func', function).__name__}")
        try:
            for item in items:
                running.append(task.remote(function, item, self._environment))
                if len(running) >= window:
                    yield ray.get(running.popleft())
            while running:
                yield ray.get(running.popleft())
        except ray.exceptions.RayError as error:
            raise translated(error) from error
        finally:
            for ref in running:
                ray.cancel(ref, force=True)

    def stats(self) -> Mapping[str, WorkerStats]:
        """See `phi4ray.batch.executor.Executor.stats`."""
        self._stats = self._asked("stats", self._stats)
        return self._stats

    def run_shards(
        self, config: BatchConfig, plan: Plan, pending: Sequence[int]
    ) -> Iterator[Receipt | None]:
        """See `phi4ray.batch.executor.Executor.run_shards`."""
        self._warn_of_missing(config.engine)
        left = dict.fromkeys(pending)
        self._idle = {}
        fruitless = 0
        while left:
            before = len(left)
            yield from self._run_some(config, plan, left)
            # What workers without an engine had, when no other was left to take it, is run again.
            fruitless = fruitless + 1 if len(left) == before else 0
            if fruitless and not self._idle:
                raise ClusterError(f"Ray lost {before} shards: the same command goes on with them")
            if fruitless == MAX_FRUITLESS:
                raise next(idle.error for idle in self._idle.values())

    def _run_some(
        self, config: BatchConfig, plan: Plan, left: dict[int, None]
    ) -> Iterator[Receipt | None]:
        """Run shards over one pool of replicas; those that are done are `left` no longer."""
        engine = config.engine
        most = min(config.max_replicas or self._fits(engine), len(left))
        fewest = min(config.min_replicas, most)
        at_hand = min(most, self._at_hand(engine))
        self._board = board = start_board(expected=at_hand)
        receipts: queue.SimpleQueue[Receipt] = queue.SimpleQueue()
        at_once = share_of(len(left), at_hand, shards_in_flight(config, plan))
        data = through_workers(
            self.worker,
            {
                "config": config,
                "plan": ray.put(plan),
                "board": board,
                "environment": self._environment,
            },
            list(left),
            engine,
            fewest=fewest,
            first=max(fewest, at_hand),
            most=most,
            at_once=at_once,
            broken={idle.node_id for idle in self._idle.values()},
        )
        stopped = threading.Event()
        end = End()

        def work() -> None:
            this_end.set(end)
            for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
                for receipt in receipts_of(batch):
                    receipts.put(receipt)
                if stopped.is_set():  # what is queued is given up; the board ends what runs
                    break

        def stop() -> None:
            stopped.set()
            ray.get(board.stop.remote())
            # A replica that starts, or is waited for, cannot hear of it.
            end.at = time.monotonic() + (STOP_S if self.stats() else 0.0)

        looked_at = time.monotonic()
        try:
            for receipt in in_thread(work, receipts, stop):
                if receipt is not None:
                    left.pop(receipt.shard, None)
                if (now := time.monotonic()) - looked_at >= TICK_S:
                    looked_at = now
                    self._tell()
                    self._look_for_idle(left)
                yield receipt
        except Exception as error:
            raise ray.get(board.failure.remote()) or translated(error) from error
        finally:
            self.stats()
            self._board = None
            ray.kill(board)

    def _tell(self) -> None:
        news: list[str] = self._asked("news", [])
        for line in news:
            self._console.print(line, style="yellow")

    def _look_for_idle(self, left: Mapping[int, None]) -> None:
        """Tell of workers without an engine, and let them go when nothing else is left."""
        told = {idle.node for idle in self._idle.values()}
        found: Mapping[str, Idle] = self._asked("idle", {})
        self._idle |= found
        for idle in found.values():
            if idle.node not in told:
                told.add(idle.node)
                self._console.print(
                    f"no engine starts on {idle.node}, the job goes on without it: "
                    f"{type(idle.error).__name__}: {idle.error}",
                    style="yellow",
                )
        held = {shard for idle in found.values() for shard in idle.shards}
        # Whoever takes over one of them tells of it with one of its own.
        if found and left.keys() <= held:
            ray.get(self._board.stop.remote())

    def _asked(self, method: str, otherwise: T) -> T:
        """What the board says; where it does not, because it is restarted, what is known stands."""
        if self._board is None:
            return otherwise
        ready, _ = ray.wait([getattr(self._board, method).remote()], timeout=1.0)
        found: T = ray.get(ready[0]) if ready else otherwise
        return found

    def _fits(self, engine: EngineConfig) -> int:
        """The replicas that an autoscaling cluster may come to hold: for GPUs, no bound of ours.

        CPU replicas all want every core of their node, so there is one a node.
        """
        if engine.gpus_per_replica:
            return 1 << 16
        return sum(node["Alive"] for node in ray.nodes())

    def _at_hand(self, engine: EngineConfig) -> int:
        """The replicas that the cluster has room for as it is."""
        if engine.gpus_per_replica:
            gpus = ray.cluster_resources().get("GPU", 0)
            return max(1, int(gpus // engine.gpus_per_replica))
        return max(1, self._fits(engine))

    def _warn_of_missing(self, engine: EngineConfig) -> None:
        total = ray.cluster_resources()
        wanted = {"GPU": engine.gpus_per_replica, "CPU": engine.num_cpus}
        for name, amount in wanted.items():
            if amount > total.get(name, 0):
                self._console.print(
                    f"a replica needs {amount:g} {name}, the cluster has {total.get(name, 0):g}: "
                    "waiting for nodes to join",
                    style="yellow",
                )


@ray.remote(max_retries=3)
def _apply(function: Callable[[Any], Any], item: Any, environment: Mapping[str, str]) -> Any:
    set_defaults(environment)
    return function(item)


def translated(error: BaseException) -> BaseException:
    """Give the error that a worker raised on purpose, out of the layers that Ray puts around it."""
    seen: set[int] = set()
    inner: BaseException | None = error
    while inner is not None and id(inner) not in seen:
        if isinstance(inner, Phi4rayError) and not isinstance(inner, ray.exceptions.RayError):
            return inner
        seen.add(id(inner))
        inner = getattr(inner, "cause", None) or inner.__cause__ or inner.__context__
    summary = str(error).strip().splitlines() or [""]
    return ClusterError(
        f"Ray failed the job: {type(error).__name__}: {summary[-1]}. The same command goes on from "
        "the parts that are done"
    )
