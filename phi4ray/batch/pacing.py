"""How many rows to have in flight, in tokens of KV cache, and which go next. Pure but for waiting.

The engine admits requests by itself as blocks get free. What it needs from us is a queue that
never runs dry, and not one so long that a shard's rows lie in it for minutes: so rows are handed
over until their expected demand is `OVERSUBSCRIBE` times what the KV cache and the sequence limit
hold.
"""

import asyncio
import heapq
import itertools
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

from phi4ray.protocol import KVState

OVERSUBSCRIBE = 2.0

KIN_CHARS = 256
"""Prompts that share so much more than all that wait are kin: some four blocks of the cache."""

FOLLOWERS = 31
"""So many kin may pass others after the row that was due.

Their prefix is then computed once for 32 rows at best. More would gain a thirty-second at most, and
have more shards in work at once, whose finished rows are lost with the replica.
"""


@dataclass(frozen=True, slots=True)
class _Row:
    """One that waits."""

    rank: int
    came: int
    prompt: str
    demand: Callable[[], float]
    place: asyncio.Future[float]


class Pacer:
    """Hands out the engine's room for rows: the lowest rank first, then first come first served.

    But after a row those that share its prefix may go before others of its rank, at most
    `FOLLOWERS` of them, in the order of their prompts: so they meet while the prefix's blocks are
    in the cache, out of all shards that are open.
    """

    def __init__(self, kv: KVState, oversubscribe: float = OVERSUBSCRIBE) -> None:
        self.max_rows = max(1, int(kv.max_num_seqs * oversubscribe))
        self.max_tokens = max(1.0, kv.capacity_tokens * oversubscribe)
        self.rows = 0
        self.tokens = 0.0
        self._came = itertools.count()
        # All that wait, and some that no longer do: by rank and age, and of each rank by prompt.
        self._by_age: list[tuple[int, int, _Row]] = []
        self._by_prompt: dict[int, list[tuple[str, int, _Row]]] = {}
        self._leader: _Row | None = None
        self._followers = 0

    async def acquire(self, demand: Callable[[], float], rank: int = 0, prompt: str = "") -> float:
        """Wait until a row may go; gives the tokens that it holds from then on.

        `demand` is asked when the row's turn comes: by then, finished rows have taught more.
        """
        loop = asyncio.get_running_loop()
        row = _Row(rank, next(self._came), prompt, demand, loop.create_future())
        heapq.heappush(self._by_age, (rank, row.came, row))
        insort(self._by_prompt.setdefault(rank, []), (prompt, row.came, row))
        loop.call_soon(self._let_in)  # or it would pass those that are let in and not awake yet
        try:
            return await row.place
        except asyncio.CancelledError:
            if row.place.done() and not row.place.cancelled():
                self.release(row.place.result())
            raise

    def release(self, tokens: float) -> None:
        """Give a row's room back, to the next ones that wait."""
        self.rows -= 1
        self.tokens -= tokens
        self._let_in()

    def _let_in(self) -> None:
        while (eldest := self._eldest()) is not None:
            kin = self._kin(eldest.rank)
            row = kin or eldest
            tokens = row.demand()
            if not self._fits(tokens):
                return
            self.rows += 1
            self.tokens += tokens
            if kin is None:
                self._leader, self._followers = row, 0
            else:
                self._followers += 1
            self._forget(row)
            row.place.set_result(tokens)

    def _eldest(self) -> _Row | None:
        """The row that is due."""
        while self._by_age:
            row = self._by_age[0][2]
            if not row.place.done():
                return row
            heapq.heappop(self._by_age)
            self._forget(row)
        return None

    def _kin(self, rank: int) -> _Row | None:
        """The next one that may follow the last row that was due."""
        if self._leader is None or self._leader.rank != rank or self._followers == FOLLOWERS:
            return None
        rows = self._by_prompt[rank]
        # What all share is in the cache anyway: of the first and the last, so of all between.
        chars = common_chars(rows[0][0], rows[-1][0]) + KIN_CHARS
        prefix = self._leader.prompt[:chars]
        at = bisect_left(rows, (prefix,))
        while len(prefix) == chars and at < len(rows) and rows[at][0].startswith(prefix):
            kin = rows[at][2]
            if not kin.place.done():
                return kin
            del rows[at]
        return None

    def _forget(self, row: _Row) -> None:
        rows = self._by_prompt[row.rank]
        at = bisect_left(rows, (row.prompt, row.came))
        if at < len(rows) and rows[at][1] == row.came:
            del rows[at]

    def _fits(self, tokens: float) -> bool:
        # One row is always let in: the engine, not a guess, refuses what can never fit.
        within = self.rows < self.max_rows and self.tokens + tokens <= self.max_tokens
        return not self.rows or within


def common_chars(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return bisect_left(
        range(min(len(one), len(other))), True, key=lambda n: one[: n + 1] != other[: n + 1]
    )


def rank_of(limit: int | None) -> int:
    """Long answers before short ones, by powers of two of their limit.

    So none is left running alone at the end (longest processing time first, Graham 1969). Limits
    that are alike are of one rank, so that shards end in their order.
    """
    # A row without a limit may be the longest of all.
    return -(limit.bit_length() if limit is not None else 64)
