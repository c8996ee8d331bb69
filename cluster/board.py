"""What workers tell the driver while they work, and the one word it has for them: stop.

A small actor on the driver's node. Nothing depends on it for correctness: a board that was lost
and restarted has forgotten only what progress shows and how often engines died.
"""

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from phi4ray.batch.worker import WorkerStats
from phi4ray.errors import Phi4rayError

SILENT_S = 15.0
"""A worker that has not reported for so long is not shown any more."""

MAX_FRUITLESS = 3
"""Starts, and deaths of engines, that bring no finished shard, before a worker may not go on."""


class Board:
    """The actor; workers are named by their logical place, so that a restart takes it over."""

    def __init__(self) -> None:
        self._stats: dict[str, tuple[float, WorkerStats]] = {}
        self._stopping = False
        self._fruitless_starts: dict[str, int] = {}
        self._fruitless_deaths = 0
        self._failure: Phi4rayError | None = None

    def starting(self, worker: str) -> bool:
        """Ask whether a worker may start its engine: False after too many starts for nothing."""
        starts = self._fruitless_starts[worker] = self._fruitless_starts.get(worker, 0) + 1
        return starts <= MAX_FRUITLESS

    def started(self, worker: str) -> None:
        """Note that an engine came up."""
        self._fruitless_starts[worker] = 0

    def engine_died(self) -> bool:
        """Ask whether a worker may be replaced: False after too many deaths in a row."""
        self._fruitless_deaths += 1
        return self._fruitless_deaths <= MAX_FRUITLESS * max(1, len(self._stats))

    def shard_finished(self) -> None:
        """Note progress: engines that die now and then are no reason to give up."""
        self._fruitless_deaths = 0

    def failed(self, error: Phi4rayError) -> None:
        """Note why the job fails, as it was raised: Ray's way to the driver adds its own words."""
        self._failure = self._failure or error

    def failure(self) -> Phi4rayError | None:
        """The first error of a worker."""
        return self._failure

    def report(self, worker: str, stats: WorkerStats) -> bool:
        """Take a worker's stats; returns whether it shall go on."""
        self._stats[worker] = time.monotonic(), stats
        return not self._stopping

    def stats(self) -> dict[str, WorkerStats]:
        """The latest stats of the workers that still report."""
        since = time.monotonic() - SILENT_S
        self._stats = {name: entry for name, entry in self._stats.items() if entry[0] > since}
        return {name: stats for name, (_, stats) in self._stats.items()}

    def stop(self) -> None:
        """Tell every worker, when it reports next, to drop what it does."""
        self._stopping = True


def start_board() -> Any:
    """Start a board on this node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board)
    return actor.options(scheduling_strategy=here).remote()
