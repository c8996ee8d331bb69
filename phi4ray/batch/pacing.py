"""How many rows to have in flight, in tokens of KV cache, and in which order. Pure but for waiting.

The engine admits requests by itself as blocks get free. What it needs from us is a queue that
never runs dry, and not one so long that a shard's rows lie in it for minutes: so rows are handed
over until their expected demand is `OVERSUBSCRIBE` times what the KV cache and the sequence limit
hold.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

from phi4ray.protocol import KVState

OVERSUBSCRIBE = 2.0
PREFIX_CHARS = 2048


class Pacer:
    """Hands out the engine's room for rows, first come first served."""

    def __init__(self, kv: KVState, oversubscribe: float = OVERSUBSCRIBE) -> None:
        self.max_rows = max(1, int(kv.max_num_seqs * oversubscribe))
        self.max_tokens = max(1.0, kv.capacity_tokens * oversubscribe)
        self.rows = 0
        self.tokens = 0.0
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()

    def _fits(self, tokens: float) -> bool:
        # One row is always let in: the engine, not a guess, refuses what can never fit.
        within = self.rows < self.max_rows and self.tokens + tokens <= self.max_tokens
        return not self.rows or within

    async def acquire(self, tokens: float) -> None:
        """Wait until a row of so many tokens may go."""
        if self._waiting or not self._fits(tokens):
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((tokens, place))
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():
                    self.release(tokens)
                raise
        else:
            self._take(tokens)

    def release(self, tokens: float) -> None:
        """Give a row's room back, to the next ones that wait."""
        self.rows -= 1
        self.tokens -= tokens
        while self._waiting:
            wanted, place = self._waiting[0]
            if place.cancelled():
                self._waiting.popleft()
            elif self._fits(wanted):
                self._waiting.popleft()
                self._take(wanted)
                place.set_result(None)
            else:
                return

    def _take(self, tokens: float) -> None:
        self.rows += 1
        self.tokens += tokens


def order(requests: Sequence[tuple[str, int | None]]) -> list[int]:
    """The order in which to hand over a shard's requests, given as (prompt, max tokens).

    Long answers first, by powers of two of their limit, so that none is left running alone at
    the end; among equals sorted by prompt, so that requests with a shared prefix meet while its
    blocks are in the prefix cache.
    """

    def key(index: int) -> tuple[int, str]:
        prompt, limit = requests[index]
        # A row without a limit may be the longest of all.
        size = limit.bit_length() if limit is not None else 64
        return -size, prompt[:PREFIX_CHARS]

    return sorted(range(len(requests)), key=key)
