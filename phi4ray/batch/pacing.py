"""How many rows to have in flight, in tokens of KV cache, and in which order. Pure but for waiting.

The engine admits requests by itself as blocks get free. What it needs from us is a queue that
never runs dry, and not one so long that a shard's rows lie in it for minutes: so rows are handed
over until their expected demand is `OVERSUBSCRIBE` times what the KV cache and the sequence limit
hold.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence

from phi4ray.protocol import KVState

OVERSUBSCRIBE = 2.0
PREFIX_CHARS = 2048


class Pacer:
    """Hands out the engine's room for rows: the lowest rank first, then first come first served."""

    def __init__(self, kv: KVState, oversubscribe: float = OVERSUBSCRIBE) -> None:
        self.max_rows = max(1, int(kv.max_num_seqs * oversubscribe))
        self.max_tokens = max(1.0, kv.capacity_tokens * oversubscribe)
        self.rows = 0
        self.tokens = 0.0
        self._came = itertools.count()
        self._waiting: list[tuple[int, int, Callable[[], float], asyncio.Future[float]]] = []

    async def acquire(self, demand: Callable[[], float], rank: int = 0) -> float:
        """Wait until a row may go; gives the tokens that it holds from then on.

        `demand` is asked when the row's turn comes: by then, finished rows have taught more.
        """
        loop = asyncio.get_running_loop()
        place: asyncio.Future[float] = loop.create_future()
        heapq.heappush(self._waiting, (rank, next(self._came), demand, place))
        loop.call_soon(self._let_in)  # or it would pass those that are let in and not awake yet
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.release(place.result())
            raise

    def release(self, tokens: float) -> None:
        """Give a row's room back, to the next ones that wait."""
        self.rows -= 1
        self.tokens -= tokens
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            _, _, demand, place = self._waiting[0]
            if not place.cancelled():
                tokens = demand()
                if not self._fits(tokens):
                    return
                self.rows += 1
                self.tokens += tokens
                place.set_result(tokens)
            heapq.heappop(self._waiting)

    def _fits(self, tokens: float) -> bool:
        # One row is always let in: the engine, not a guess, refuses what can never fit.
        within = self.rows < self.max_rows and self.tokens + tokens <= self.max_tokens
        return not self.rows or within


def rank_of(limit: int | None) -> int:
    """Long answers before short ones, by powers of two of their limit.

    So none is left running alone at the end (longest processing time first, Graham 1969). Limits
    that are alike are of one rank, so that shards end in their order.
    """
    # A row without a limit may be the longest of all.
    return -(limit.bit_length() if limit is not None else 64)


def order(requests: Sequence[tuple[str, int | None]]) -> list[int]:
    """The order in which a shard's requests ask for room, given as (prompt, max tokens).

    By rank; among equals sorted by prompt, so that requests with a shared prefix meet while its
    blocks are in the prefix cache.
    """

    def key(index: int) -> tuple[int, str]:
        prompt, limit = requests[index]
        return rank_of(limit), prompt[:PREFIX_CHARS]

    return sorted(range(len(requests)), key=key)
