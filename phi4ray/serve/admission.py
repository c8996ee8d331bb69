"""Admission by tokens of KV cache: who goes to the engine now, who waits, who is told to come back.

vLLM takes every request at once and lets it wait for as long as it takes; a client that was told
429 in time can go elsewhere, one that waits for minutes cannot. So requests are handed to the
engine while their expected demand fits its KV cache and its sequences, and wait here otherwise,
by priority and then by arrival, for a bounded time.
"""

import asyncio
import contextlib
import heapq
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from pydantic import Field

from phi4ray.config import Config
from phi4ray.serve.rate import Rate

LONGEST_RETRY_S = 60


class AdmissionConfig(Config):
    """When a request waits, and when it is turned away."""

    queue_timeout_s: float = Field(
        30.0, ge=0, description="Longest wait for room in the KV cache; then 429"
    )
    max_queued_requests: int = Field(
        1024, ge=0, description="Waiting requests a replica holds; the next one gets 429 at once"
    )
    oversubscribe: float = Field(
        1.0, gt=0, description="Expected demand admitted, as a multiple of the KV cache"
    )


class OverloadedError(Exception):
    """There is no room, and there was none for as long as a request may wait."""

    def __init__(self, retry_after_s: int, waited_s: float) -> None:
        super().__init__(retry_after_s, waited_s)
        self.retry_after_s = retry_after_s
        self.waited_s = waited_s

    def __str__(self) -> str:
        return (
            f"The engine has no room for this request; it waited {self.waited_s:.1f} s. "
            f"Try again in {self.retry_after_s} s."
        )


@dataclass(slots=True)
class Totals:
    """What has happened since start, for metrics."""

    admitted: int = 0
    rejected: int = 0
    queued_s: float = 0.0


@dataclass(order=True, slots=True)
class _Place:
    priority: int
    arrival: int
    tokens: float = field(compare=False)
    sequences: int = field(compare=False)
    granted: asyncio.Future[None] = field(compare=False)


class Admission:
    """The room of one engine, in tokens and in sequences. For one event loop."""

    def __init__(
        self,
        config: AdmissionConfig,
        *,
        capacity_tokens: int,
        max_num_seqs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.capacity_tokens = max(1.0, capacity_tokens * config.oversubscribe)
        self.max_num_seqs = max_num_seqs
        self.running = 0
        """Requests that have room."""
        self.sequences = 0
        """Sequences that the engine has for them."""
        self.used_tokens = 0.0
        self.totals = Totals()
        self._clock = clock
        self._queue: list[_Place] = []
        self._arrivals = itertools.count()
        self._arrived, self._squares, self._released = Rate(), Rate(), Rate()
        self.on_change: Callable[[], None] = _nothing
        """Called whenever a request comes, begins or goes."""
        self.on_arrival: Callable[[float, float], None] = _nothing
        """Called with the demand of each request that comes, and when."""

    @property
    def crowded(self) -> bool:
        """Whether requests wait; costs nothing."""
        return bool(self._queue)

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return sum(not place.granted.done() for place in self._queue)

    @property
    def queued_tokens(self) -> float:
        """Their demand."""
        return sum(place.tokens for place in self._queue if not place.granted.done())

    @property
    def arrived_tokens_per_s(self) -> float:
        """Demand of the requests that come, those that are turned away included."""
        return self._arrived.per_s(self._clock())

    @property
    def arrived_squares_per_s(self) -> float:
        """The squares of these demands, added up: they tell how unequal requests are."""
        return self._squares.per_s(self._clock())

    @property
    def released_tokens_per_s(self) -> float:
        """Demand of the requests that end."""
        return self._released.per_s(self._clock())

    def has_room(self, tokens: float, sequences: int = 1) -> bool:
        """Whether a request of this demand would not have to wait."""
        return not self._queue and self._fits(min(tokens, self.capacity_tokens), sequences)

    @contextlib.asynccontextmanager
    async def admit(
        self, tokens: float, priority: int = 0, sequences: int = 1
    ) -> AsyncIterator[float]:
        """Hold room for a request inside the block; gives the seconds it waited.

        A request that is larger than the whole cache counts as all of it. So does one of more
        sequences than the engine has at once: it goes through them in turns. Lower `priority` goes
        first, as in vLLM.

        Raises:
            OverloadedError: there was no room in time.
        """
        tokens = min(tokens, self.capacity_tokens)
        sequences = min(sequences, self.max_num_seqs)
        began = self._clock()
        self._arrived.add(tokens, began)
        self._squares.add(tokens * tokens, began)
        self.on_arrival(tokens, began)
        await self._acquire(tokens, priority, sequences)
        waited_s = self._clock() - began
        self.totals.admitted += 1
        self.totals.queued_s += waited_s
        try:
            yield waited_s
        finally:
            self._release(tokens, sequences)

    async def _acquire(self, tokens: float, priority: int, sequences: int) -> None:
        if self.has_room(tokens, sequences):
            self._take(tokens, sequences)
            return
        began = self._clock()
        if self.queued >= self.config.max_queued_requests or not self.config.queue_timeout_s:
            raise self._overloaded(tokens, began)
        granted = asyncio.get_running_loop().create_future()
        place = _Place(priority, next(self._arrivals), tokens, sequences, granted)
        heapq.heappush(self._queue, place)
        self.on_change()
        self._grant()  # those in front may all have given up
        try:
            async with asyncio.timeout(self.config.queue_timeout_s):
                await place.granted
        except BaseException as error:
            # Room may have been granted in the moment in which the wait ended.
            if place.granted.done() and not place.granted.cancelled():
                if isinstance(error, TimeoutError):
                    return
                self._release(tokens, sequences)
            place.granted.cancel()
            self._grant()  # it may have been the head that the others waited behind
            if isinstance(error, TimeoutError):
                raise self._overloaded(tokens, began) from None
            raise

    def _fits(self, tokens: float, sequences: int) -> bool:
        within = (
            self.sequences + sequences <= self.max_num_seqs
            and self.used_tokens + tokens <= self.capacity_tokens
        )
        return not self.running or within

    def _take(self, tokens: float, sequences: int) -> None:
        self.running += 1
        self.sequences += sequences
        self.used_tokens += tokens
        self.on_change()

    def _release(self, tokens: float, sequences: int) -> None:
        self.running -= 1
        self.sequences -= sequences
        self.used_tokens -= tokens
        if not self.running:
            self.used_tokens = 0.0  # what rounding has left
        self._released.add(tokens, self._clock())
        self._grant()
        self.on_change()

    def _grant(self) -> None:
        while self._queue:
            place = self._queue[0]
            if place.granted.done():
                heapq.heappop(self._queue)
            elif self._fits(place.tokens, place.sequences):
                heapq.heappop(self._queue)
                self._take(place.tokens, place.sequences)
                place.granted.set_result(None)
            else:
                return

    def _overloaded(self, tokens: float, began: float) -> OverloadedError:
        self.totals.rejected += 1
        now = self._clock()
        return OverloadedError(self.retry_after_s(tokens, now), now - began)

    def retry_after_s(self, tokens: float, now: float) -> int:
        """When a request of this demand would have room, at the rate at which tokens get free.

        (demand of all that wait + its own - what is free now) / tokens released a second.
        """
        wanted = self.queued_tokens + tokens - (self.capacity_tokens - self.used_tokens)
        rate = self._released.per_s(now)
        wait_s = wanted / rate if rate > 0 else self.config.queue_timeout_s
        return max(1, min(LONGEST_RETRY_S, math.ceil(wait_s)))


def _nothing(*_: float) -> None:
    pass
