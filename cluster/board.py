"""What workers tell the driver and each other while they work, and the one word for them: stop.

A small actor on the driver's node. Nothing depends on it for correctness: a board that was lost
and restarted has forgotten only what progress shows, how often workers died, and who took what.
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
"""Lives of a worker in a row in which no row was answered, before it may not start again."""

MAX_UNFINISHED = 10
"""Lives of a worker in a row that finished no shard, though rows were answered: these are lost with
it. Where nodes go now and then shards of an hour are finished between; where its memory does not
suffice they never are."""


@dataclass(frozen=True, slots=True)
class Idle:
    """A worker whose engine cannot start: where, why, and the shards that Ray gave it."""

    node: str
    node_id: str
    error: Phi4rayError
    shards: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Lives:
    """Those of one worker since its last finished shard; `fruitless` since its last answered row.

    `told`: how the latest one ended is known, and people have been told.
    """

    node: str
    begun: int = 0
    fruitless: int = 0
    told: bool = False


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
        self._lives: dict[str, _Lives] = {}
        self._fruitless_deaths = 0
        self._news: list[str] = []
        self._failure: Phi4rayError | None = None

    def starting(self, worker: str, node: str = "its node") -> bool:
        """Ask whether a worker may start its engine on a node: False after too many for nothing.

        Only a finished shard makes up for lives that ended: an engine that came up has done
        nothing yet, and its process may be killed at its first rows each time.
        """
        self._starting.add(worker)
        self._idle.pop(worker, None)
        # What it had taken over is lost with the process that it was.
        self._taken = {shard: by for shard, by in self._taken.items() if by != worker}
        if (lives := self._lives.get(worker)) is None:
            lives = self._lives[worker] = _Lives(node)
        elif not lives.told:
            lost = f"a worker's process on {lives.node} ended without a word: "
            why = "killed for want of memory?" if node == lives.node else "its node is gone?"
            self._news.append(f"{lost}{why} Ray starts another on {node}")
        lives.node, lives.told = node, False
        lives.begun += 1
        lives.fruitless += 1
        return lives.fruitless <= MAX_FRUITLESS and lives.begun <= MAX_UNFINISHED

    def started(self, worker: str) -> None:
        """Note that an engine came up."""
        self._starting.discard(worker)
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
        """Ask whether a worker may be replaced: False after too many deaths in a row.

        Those are of all workers together. Of one whose engine dies while others finish shards,
        `starting` counts the lives.
        """
        self._fruitless_deaths += 1
        may = self._fruitless_deaths < MAX_FRUITLESS * max(1, len(self.stats()))
        if worker in self._lives:
            self._lives[worker].told = True
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
        if (lives := self._lives.get(worker)) is not None:
            lives.begun = lives.fruitless = 0
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
        done = stats.open_shards.values()
        if worker in self._lives and any(one.rows > sum(one.errors.values()) for one in done):
            self._lives[worker].fruitless = 0
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
