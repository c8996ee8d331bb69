"""The executors of batches: whatever the host gives, watched; and one for what is stopped."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

from phi4ray.batch.executor import Executor, InProcessExecutor
from phi4ray.batch.parts import Receipt
from phi4ray.batch.plan import Plan
from phi4ray.batch.worker import WorkerStats
from phi4ray.config import BatchConfig, Endpoint
from phi4ray.protocol import Answer, Json, KVState, RowError

T = TypeVar("T")
R = TypeVar("R")

Executors = Callable[[Callable[[], RowError | None]], Executor]
"""Makes the executor of one batch. It asks the function given, about every second, whether to
stop answering: the error it gets is then that of every row without an answer, as
`phi4ray.batch.worker.ShardWorker.stop` does it. What is answered stays."""

Stats = Mapping[str, WorkerStats]

Look = Callable[[Receipt | None, Stats], None]
"""Told of each receipt, and at each tick, with the workers' stats."""

Closing = Generator[Receipt | None, None, None]


class WatchedExecutor:
    """An executor whose shards are looked at as they are answered."""

    def __init__(self, inner: Executor, look: Look) -> None:
        self._inner, self._look = inner, look

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """See `Executor.map`."""
        return self._inner.map(function, items)

    def stats(self) -> Stats:
        """See `Executor.stats`."""
        return self._inner.stats()

    def run_shards(
        self, config: BatchConfig, plan: Plan, pending: Sequence[int]
    ) -> Iterator[Receipt | None]:
        """See `Executor.run_shards`."""
        running = cast(Closing, self._inner.run_shards(config, plan, pending))
        # An error keeps its frames, and these the iterator: left to itself it would go on.
        with contextlib.closing(running) as receipts:
            for receipt in receipts:
                self._look(receipt, self._inner.stats())
                yield receipt


class _NoEngine:
    """The replica of a batch that is stopped: it is never asked."""

    async def start(self) -> None:
        """See `phi4ray.protocol.Replica.start`."""

    async def complete(self, endpoint: Endpoint, body: Json) -> Answer:
        """See `phi4ray.protocol.Replica.complete`."""
        raise AssertionError("a stopped batch asks no engine")

    def kv(self) -> KVState:
        """See `phi4ray.protocol.Replica.kv`."""
        return KVState(1 << 40, 0, 0, 0, max_num_seqs=1024, max_model_len=1 << 20)

    async def stop(self) -> None:
        """See `phi4ray.protocol.Replica.stop`."""


def stopped_executor(error: RowError) -> Executor:
    """Gives every row this error, without an engine."""
    return InProcessExecutor(lambda _: _NoEngine(), lambda: error)
