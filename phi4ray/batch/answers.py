"""Rows on their way to one replica and back: those of all the shards that a worker has open.

Of all these rows, those that may take longest go to the engine first, those that share a prefix
together, and rows alike in the order of the shards: nothing waits for a whole shard to finish.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from phi4ray.batch.pacing import Pacer, Waiting, rank_of
from phi4ray.batch.parts import Result
from phi4ray.batch.rows import Request
from phi4ray.config import BatchConfig
from phi4ray.demand import MOST_TOKENS, Lengths, Size, max_tokens_of, prompt_of, sequences_of
from phi4ray.protocol import Answer, Replica, RowError, refusal

RETRY_STATUS = frozenset({408, 429, 500, 502, 503, 504})

BACKOFF_S = 0.2
MAX_BACKOFF_S = 10.0
"""A row waits so long after its first failed try, then twice as long each time, up to the most."""


HELD_BYTES = 4 << 30
"""What the answers of a replica's open shards may come to take, as they are held, before another
shard is begun: they are there until the shard's last row has ended, and nodes have some tens of GiB
a GPU. Without logprobs or many choices they stay far below it."""

LOGPROB_BYTES = 16
TOKEN_BYTES = 8
GUESSES = 64
"""What an answer takes as it is held, for each token's logprob and for each token, until answers
have told: the guess counts as so many of them."""


@dataclass(frozen=True, slots=True)
class Done:
    """Finished rows, added up. `errors` counts those without an answer, by code."""

    rows: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Done") -> "Done":
        errors = dict(self.errors)
        for code, rows in other.errors.items():
            errors[code] = errors.get(code, 0) + rows
        return Done(
            self.rows + other.rows,
            errors,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    @classmethod
    def of(cls, result: Result) -> "Done":
        """One finished row."""
        return cls(
            rows=1,
            errors={} if result.error_code is None else {result.error_code: 1},
            prompt_tokens=result.prompt_tokens or 0,
            completion_tokens=result.completion_tokens or 0,
        )


class Answers:
    """Has one replica answer the rows of the shards that are open. For one event loop."""

    def __init__(self, config: BatchConfig, replica: Replica) -> None:
        self.pacer = Pacer(replica.kv())
        self.lengths = Lengths()
        self._config = config
        self._replica = replica
        self._in_flight: set[asyncio.Task[None]] = set()
        self._open: dict[int, _Shard] = {}
        self._waiting: list[_Shard] = []
        self._answered = 0
        self._answered_bytes = 0
        self._stop: RowError | None = None

    def stop(self, error: RowError) -> None:
        """Give every row that is not answered yet this error; those in flight are aborted.

        A second call changes nothing.
        """
        if self._stop is None:
            self._stop = error
            for task in self._in_flight:
                task.cancel()

    async def answer(
        self, shard: int, results: list[Result], requests: list[Request | None]
    ) -> None:
        """Have every row with a request answered, in its place; the others are errors already.

        It begins when there is room for its answers, see `HELD_BYTES`; one shard always goes on.
        Requests are taken out of their list as their turns come.

        Raises:
            EngineDeadError: the replica is gone.
        """
        begins = _Shard(self, shard, results, requests)
        self._waiting.append(begins)
        self.let_in()
        try:
            await begins.let_in.wait()
        finally:
            if begins in self._waiting:
                self._waiting.remove(begins)
        await begins.answer()

    @property
    def open(self) -> dict[int, Done]:
        """What is answered of each open shard. May be asked from any thread."""
        return {index: shard.done for index, shard in self._open.copy().items()}

    @contextlib.contextmanager
    def closing(self, shard: int) -> Iterator[None]:
        """Where a shard is answered and written; at the end its answers are held no longer."""
        try:
            yield
        finally:
            self._open.pop(shard, None)
            self.let_in()

    def held(self, result: Result) -> None:
        """Note what an answer takes."""
        self._answered += 1
        self._answered_bytes += result.held_bytes
        self.let_in()

    def let_in(self) -> None:
        """Begin the shards that wait, in their order, as far as there is room."""
        while self._waiting and (not self._open or self._fits(self._waiting[0])):
            shard = self._waiting.pop(0)
            self._open[shard.index] = shard
            shard.let_in.set()

    def _fits(self, shard: "_Shard") -> bool:
        guess = GUESSES * shard.guess_bytes + self._answered_bytes
        a_row = guess / (GUESSES + self._answered)
        shards = [*self._open.values(), shard]
        rows = sum(len(one.results) - one.done.rows for one in shards)
        return sum(one.held_bytes for one in shards) + rows * a_row <= HELD_BYTES

    async def one(self, row: Result, request: Request) -> Result:
        """Answer one row, or give it the error of `stop`."""
        if self._stop is not None:
            return row.failed(self._stop)
        task = asyncio.current_task()
        assert task is not None
        self._in_flight.add(task)
        try:
            return await self._try(row, request)
        except asyncio.CancelledError:
            # Cancelled by `stop`, and by nobody else besides.
            if self._stop is None or task.uncancel():
                raise
            return row.failed(self._stop)
        finally:
            self._in_flight.discard(task)

    async def _try(self, row: Result, request: Request) -> Result:
        for attempt in itertools.count(1):
            started = time.perf_counter()
            answer = await within(
                self._config.request_timeout_s,
                self._replica.complete(request.endpoint, request.body),
            )
            latency_s = time.perf_counter() - started
            if answer.status not in RETRY_STATUS or attempt >= self._config.max_attempts:
                break
            pause_s = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** min(attempt, 16))
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        return replace(row.answered(answer).pack(), attempts=attempt, latency_s=latency_s)


class _Shard:
    """The rows of one shard: `phi4ray.batch.pacing.Rows`. A row has a task from its turn on."""

    def __init__(
        self,
        answers: Answers,
        shard: int,
        results: list[Result],
        requests: list[Request | None],
    ) -> None:
        self.index = shard
        self.results = results
        self.done = Done()
        self.held_bytes = 0
        self.let_in = asyncio.Event()
        asked = [guess_bytes(request) for request in requests if request is not None]
        self.guess_bytes = sum(asked) / max(1, len(asked))
        self._answers = answers
        self._requests = requests
        self._waiting: dict[int, Waiting] = {}
        self._all_begun = asyncio.Event()
        self._tasks = asyncio.TaskGroup()

    async def answer(self) -> None:
        try:
            async with self._tasks:
                try:
                    await self._begin_all()
                finally:
                    self._withdraw()
        except BaseExceptionGroup as failures:
            # One cause and not a group, so that it keeps its type over process borders.
            raise failures.exceptions[0] from None

    async def _begin_all(self) -> None:
        for at, request in enumerate(self._requests):
            if request is None:
                self._count(self.results[at])
            else:
                limit = max_tokens_of(request.body, request.endpoint)
                rank, prompt = rank_of(limit), prompt_of(request.body)
                self._waiting[at] = self._answers.pacer.push(self, at, rank, prompt)
        if self._waiting:
            await self._all_begun.wait()

    def demand(self, row: Waiting) -> float:
        request = self._requests[row.at]
        assert request is not None
        return self._answers.lengths.demand(*Size.of(request.body, request.endpoint))

    def begin(self, row: Waiting, tokens: float) -> None:
        request, self._requests[row.at] = self._requests[row.at], None
        assert request is not None
        del self._waiting[row.at]
        if not self._waiting:
            self._all_begun.set()
        task = self._tasks.create_task(self._answer_row(row, request))
        # Not in the task: one that is cancelled before it runs never does.
        task.add_done_callback(lambda _: self._answers.pacer.release(tokens))

    async def _answer_row(self, row: Waiting, request: Request) -> None:
        size = Size.of(request.body, request.endpoint)
        try:
            result = self.results[row.at] = await self._answers.one(self.results[row.at], request)
        except BaseException:
            self._withdraw()  # before there is room for them: this shard is given up
            raise
        self._count(result)
        self.held_bytes += result.held_bytes
        self._answers.held(result)
        if result.prompt_tokens:
            self._answers.lengths.observe(
                size.chars,
                result.prompt_tokens - size.ids,
                result.completion_tokens or 0,
                size.sequences,
            )

    def _withdraw(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for row in waiting.values():
            self._answers.pacer.withdraw(row)

    def _count(self, result: Result) -> None:
        self.done += Done.of(result)


def guess_bytes(request: Request) -> float:
    """What an answer may take as it is held, before one is known: `logprobs` make up most of it."""
    body, path = request.body, request.endpoint
    tokens = max_tokens_of(body, path) or 1024 * sequences_of(body, path)
    asked = [body.get(name) for name in ("logprobs", "top_logprobs")]
    logprobs = max((int(number) for number in asked if isinstance(number, int)), default=0)
    logprobs = min(logprobs, MOST_TOKENS)  # it may have any number of digits
    return tokens * (TOKEN_BYTES + LOGPROB_BYTES * (1 + logprobs if logprobs > 0 else 0))


async def within(timeout_s: float | None, answer: Awaitable[Answer]) -> Answer:
    """Wait for an answer; gives a 408 when it takes longer than a job allows a row."""
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError:
        return refusal("timeout", f"no answer within request_timeout_s={timeout_s}", status=408)
