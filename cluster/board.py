"""What workers tell the driver and each other while they work, and the one word for them: stop.

A small actor on the driver's node. Nothing depends on it for correctness: a board that was lost
and restarted has forgotten only what progress shows, how often engines died, and who took what.
"""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from phi4ray.batch.worker import WorkerStats
from phi4ray.errors import Phi4rayError

SILENT_S = 15.0
"""A worker that has not reported for so long is not shown any more."""

LOST_S = 120.0
"""One that has not for so long is gone, and so is one that was expected and has not come."""

SETTLE_S = 3.0
"""So long after its start a board may not have heard of all who knew its predecessor."""

MAX_FRUITLESS = 3
"""Starts, and deaths of engines, that bring no finished shard, before a worker may not go on."""


@dataclass(frozen=True, slots=True)
class Idle:
    """A worker whose engine cannot start: where, why, and the shards that Ray gave it."""

    node: str
    node_id: str
    error: Phi4rayError
    shards: frozenset[int] = frozenset()


class Board:
    """The actor; workers are named by their logical place, so that a restart takes it over.

    `expected` workers are about to start, whatever they tell.
    """

    def __init__(self, expected: int = 1) -> None:
        self._began = time.monotonic()
        self._expected = expected
        self._stats: dict[str, tuple[float, WorkerStats]] = {}
        self._stopping = False
        self._starting: set[str] = set()
        self._idle: dict[str, Idle] = {}
        self._taken: dict[int, str] = {}
        self._fruitless_starts: dict[str, int] = {}
        self._fruitless_deaths = 0
        self._news: list[str] = []
        self._failure: Phi4rayError | None = None

    def starting(self, worker: str) -> bool:
        """Ask whether a worker may start its engine: False after too many starts for nothing."""
        self._starting.add(worker)
        self._idle.pop(worker, None)
        # What it had taken over is lost with the process that it was.
        self._taken = {shard: by for shard, by in self._taken.items() if by != worker}
        starts = self._fruitless_starts[worker] = self._fruitless_starts.get(worker, 0) + 1
        return starts <= MAX_FRUITLESS

    def started(self, worker: str) -> None:
        """Note that an engine came up."""
        self._starting.discard(worker)
        self._fruitless_starts[worker] = 0
        self._stats[worker] = time.monotonic(), WorkerStats()

    def idles(self, worker: str, idle: Idle) -> bool:
        """Note that a worker has no engine; returns whether it shall go on waiting.

        Its shards are others' to take. It raises its error where `hopeless`.
        """
        self._starting.discard(worker)
        self._stats.pop(worker, None)
        self._idle[worker] = idle
        return not self._stopping

    def _others(self) -> bool:
        since = time.monotonic() - LOST_S
        return bool(self._starting) or any(at > since for at, _ in self._stats.values())

    def hopeless(self) -> bool:
        """Whether no worker has an engine or is about to have one: those without wait for none."""
        age_s = time.monotonic() - self._began
        decided = len(self._idle) >= self._expected or age_s > LOST_S
        return age_s > SETTLE_S and decided and not self._others()

    def idle(self) -> dict[str, Idle]:
        """The workers without an engine, where others have one or are about to."""
        return self._idle if self._others() else {}

    def engine_died(self, worker: str, why: str) -> bool:
        """Ask whether a worker may be replaced: False after too many deaths in a row."""
        self._fruitless_deaths += 1
        may = self._fruitless_deaths <= MAX_FRUITLESS * max(1, len(self.stats()))
        if may:
            self._starting.add(worker)
            self._news.append(f"{why}; Ray starts another")
        return may

    def news(self) -> list[str]:
        """What has happened since the last call, for people."""
        news, self._news = self._news, []
        return news

    def shard_finished(self, worker: str) -> int | None:
        """Note progress; gives the worker a shard of those without an engine, if there is one.

        Engines that die now and then are no reason to give up.
        """
        self._fruitless_deaths = 0
        shards = (shard for idle in self._idle.values() for shard in idle.shards)
        left = min((shard for shard in shards if shard not in self._taken), default=None)
        if left is not None:
            self._taken[left] = worker
        return left

    def failed(self, error: Phi4rayError) -> None:
        """Note why the job fails, as it was raised: Ray's way to the driver adds its own words."""
        self._failure = self._failure or error

    def failure(self) -> Phi4rayError | None:
        """Why the job fails."""
        return self._failure

    def report(self, worker: str, stats: WorkerStats) -> bool:
        """Take a worker's stats; returns whether it shall go on."""
        self._stats[worker] = time.monotonic(), stats
        return not self._stopping

    def stats(self) -> dict[str, WorkerStats]:
        """The latest stats of the workers that still report."""
        since = time.monotonic() - SILENT_S
        return {name: stats for name, (at, stats) in self._stats.items() if at > since}

    def stop(self) -> None:
        """Tell every worker, when it reports next, to drop what it does."""
        self._stopping = True


def start_board(expected: int) -> Any:
    """Start a board on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board)
    return actor.options(scheduling_strategy=here).remote(expected)
