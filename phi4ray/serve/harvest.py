"""Batch rows on a replica that serves online traffic: in its slack, and out of the way at once.

Each replica decides for itself, whenever a request comes or goes and at every step of its engine.
A row that must make way is aborted, and goes first when there is room again: what it has generated
is a part of its prompt then (`phi4ray.preemption`), which the engine's prefix cache mostly holds.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from phi4ray.serve.admission import Admission
from phi4ray.serve.fair import FairQueue
from phi4ray.serve.rate import Rate
from phi4ray.serve.slack import (
    CACHED_TOKENS,
    HarvestConfig,
    RecentPeak,
    Slack,
    StepControl,
    slack,
)

T = TypeVar("T")

LARGE_FRACTION = 0.125
"""A row that is to hold more of the KV cache delays no others while it cannot fit."""


@dataclass(eq=False, slots=True)
class _Row:
    job: str
    number: int
    priority: int
    tokens: float
    prompt_tokens: float
    wake: asyncio.Future[None]
    begun: int = 0
    cached_until: float | None = None
    """When the engine has been given so many tokens, its cache no longer holds this row."""
    task: "asyncio.Future[Any] | None" = None


class Harvest:
    """The batch rows of one replica. For one event loop."""

    def __init__(
        self,
        config: HarvestConfig,
        admission: Admission,
        *,
        prefix_caching: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.tokens = 0.0
        """Expected demand of the rows that the engine has."""
        self.aborted = 0
        """Rows that made way since start."""
        self._admission = admission
        self._prefix_caching = prefix_caching
        self._clock = clock
        self._recent = RecentPeak(config.reserve_half_life_s)
        self._control = self._new_control()
        self._arriving = Rate(self._control.lump_s)
        self._queue: FairQueue[_Row] = FairQueue()
        self._jobs: dict[str, int] = {}
        self._rows: set[_Row] = set()
        self._passed_over: dict[_Row, None] = {}
        """Large rows that would not fit if they were the only ones, oldest first."""
        self._numbers = itertools.count()
        self._begun = itertools.count()
        self._given_tokens = 0.0
        """Of KV cache, to whatever came, since start."""
        self._online_at_s: float | None = None
        self._idle = True
        admission.on_change = self.update
        admission.on_arrival = self._arrived

    def _new_control(self) -> StepControl[_Row]:
        return StepControl(self.config.target_tpot_ms / 1e3, self.config.prefill_tokens)

    @property
    def rows(self) -> int:
        """Rows that the engine has."""
        return len(self._rows)

    def running(self, job: str) -> int:
        """Rows of one job that the engine has."""
        return sum(row.job == job for row in self._rows)

    def waiting(self, job: str) -> int:
        """Rows of one job that wait for slack."""
        passed_over = sum(row.job == job for row in self._passed_over)
        return self._queue.waiting(job) + passed_over

    @property
    def all_waiting(self) -> int:
        """Rows of all jobs that wait for slack."""
        return sum(map(self.waiting, self._jobs))

    def join(self, job: str, weight: float = 1.0, priority: int = 0) -> None:
        """Let a job's rows come, or change what share they get."""
        self._jobs[job] = priority
        self._queue.join(job, weight, priority)

    def leave(self, job: str) -> None:
        """Forget a job whose rows have all ended."""
        self._jobs.pop(job, None)
        self._queue.leave(job)

    async def run(
        self, job: str, tokens: float, prompt_tokens: float, work: Callable[[], Awaitable[T]]
    ) -> T:
        """Do a row's work when there is slack for it; again, if it had to make way.

        `tokens` is what it will hold of the KV cache, `prompt_tokens` the part that is prompt.
        """
        loop = asyncio.get_running_loop()
        tokens = min(tokens, self._admission.capacity_tokens)
        row = _Row(
            job, next(self._numbers), self._jobs[job], tokens, prompt_tokens, loop.create_future()
        )
        try:
            while True:
                self._queue.push(job, row.number, row)
                self.update()
                await row.wake
                if row in self._rows:
                    row.task = task = asyncio.ensure_future(work())
                    try:
                        return await task
                    except asyncio.CancelledError:
                        if row in self._rows or _cancelled():
                            raise
                row.task, row.wake = None, loop.create_future()
        finally:
            row.wake.cancel()
            self._passed_over.pop(row, None)
            self._give_back(row)

    def step(self, running: int, step_s: float | None, begun: int) -> None:
        """Take note of a step of the engine; see `phi4ray.protocol.OnlineReplica.on_step`."""
        self._control.observe(step_s, running, begun)
        self.update()

    def update(self) -> None:
        """Have rows make way, or hand over more, as the slack is now."""
        room = self._observe()
        if self.tokens > room.keep_tokens or self.rows > room.keep_sequences:
            self._shrink(room)
        self._take_up_again(room)
        while (row := self._queue.head()) is not None:
            if row.wake.done():  # its job does not want it any more
                self._queue.pop()
                continue
            fits = self.tokens + row.tokens <= room.tokens and self.rows + 1 <= room.sequences
            control = self._control
            paced = (
                control.idle_ready() if self._idle else control.ready(self._rising_tokens_per_s())
            )
            # Where there is nothing else any row may go, however large and slow.
            if (fits and paced) or self._alone():
                self._queue.pop(row.tokens)
                self._begin(row)
            elif self._fits_alone(row, room):
                return
            else:
                self._queue.pop()
                self._passed_over[row] = None

    def _fits_alone(self, row: _Row, room: Slack) -> bool:
        """Whether it is worth that others wait until it fits."""
        large = row.tokens > LARGE_FRACTION * self._admission.capacity_tokens
        return not large or row.tokens <= room.tokens

    def _take_up_again(self, room: Slack) -> None:
        for row in list(self._passed_over):
            if self._fits_alone(row, room) or self._alone():
                del self._passed_over[row]
                self._queue.push(row.job, row.number, row)

    def _arrived(self, tokens: float, now_s: float) -> None:
        self._arriving.add(tokens, now_s)
        self._given_tokens += tokens

    def _alone(self) -> bool:
        """Whether the engine has nothing else to do."""
        return not (self._rows or self._online())

    def _online(self) -> bool:
        return self._admission.running > 0 or self._admission.crowded

    def _rising_tokens_per_s(self) -> float:
        usual = self._admission.arrived_tokens_per_s
        return self._arriving.per_s(self._clock()) - usual

    def _observe(self) -> Slack:
        online, now = self._admission, self._clock()
        if self._online():
            self._online_at_s = now
        since_s = self._online_at_s
        idle = since_s is None or now - since_s > self.config.idle_s
        if self._idle and not idle:
            # The engine would begin them in few and long steps, for which online requests wait. No
            # work is lost, and they come again as the new control lets them.
            for row in self._control.unseen:
                self._abort(row)
            self._control = self._new_control()  # steps of a full engine tell nothing
        self._idle = idle
        return slack(
            self.config,
            capacity_tokens=online.capacity_tokens,
            max_num_seqs=online.max_num_seqs,
            online_tokens=online.used_tokens,
            online_sequences=online.sequences,
            recent_tokens=self._recent.observe(online.used_tokens, now),
            step_sequences=self._control.keep,
            idle=self._idle,
            crowded=online.crowded,
        )

    def _begin(self, row: _Row) -> None:
        row.begun = next(self._begun)
        self._rows.add(row)
        self.tokens += row.tokens
        self._control.feed(row, self._to_compute(row))
        self._given_tokens += row.tokens
        row.wake.set_result(None)

    def _to_compute(self, row: _Row) -> float:
        if row.cached_until is None:
            return row.prompt_tokens
        # What is gone from the cache may be all of a row that had nearly ended.
        cached = self._prefix_caching and self._given_tokens < row.cached_until
        return min(CACHED_TOKENS, row.tokens) if cached else row.tokens

    def _give_back(self, row: _Row) -> None:
        if row in self._rows:
            self._remove(row)
            self.update()

    def _remove(self, row: _Row) -> None:
        self._rows.remove(row)
        self._control.forget(row)
        self.tokens = self.tokens - row.tokens if self._rows else 0.0

    def _shrink(self, room: Slack) -> None:
        """Abort down to where rows are handed over, or the next request would abort again."""
        least = 0 if self._online() else 1
        if self._control.must_shed:  # else only a place or tokens lack
            self._control.shrunk()
        for row in sorted(self._rows, key=lambda row: (-row.priority, -row.begun)):
            if self.rows <= least or (self.tokens <= room.tokens and self.rows <= room.sequences):
                return
            self._abort(row)

    def _abort(self, row: _Row) -> None:
        begun = not self._control.awaits(row)
        self._remove(row)
        if begun:
            # Freed blocks are taken again in the order in which they were freed.
            free = self._admission.capacity_tokens - self._admission.used_tokens - self.tokens
            row.cached_until = self._given_tokens + free - row.tokens
        self._queue.refund(row.job, row.tokens)
        self.aborted += 1
        if row.task is not None:
            row.task.cancel()


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
