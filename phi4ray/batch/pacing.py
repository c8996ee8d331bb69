"""How many rows to have in flight, in tokens of KV cache, and which go next. Pure but for waiting.

The engine admits requests by itself as blocks get free. What it needs from us is a queue that
never runs dry, and not a longer one: it goes first come first served, so that a row with a long
answer would begin late behind whatever lies in it, and end last and alone.
"""

import asyncio
import heapq
import itertools
import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Protocol

from phi4ray.protocol import KVState

OVERSUBSCRIBE_TOKENS = 2.0
"""Expected demand handed over, as a multiple of the KV cache: of its tokens in the end a row holds
about half in the mean."""

OVERSUBSCRIBE_ROWS = 1.25
"""Rows handed over, as a multiple of the sequences that the engine runs: what waits there is more
than it can begin in a few steps."""

KIN_CHARS = 256
"""Prompts that share so much more than all that wait are kin: some four blocks of the cache."""

FOLLOWERS = 31
"""So many kin may pass others after the row that was due.

Their prefix is then computed once for 32 rows at best. More would gain a thirty-second at most, and
have more shards in work at once, whose finished rows are lost with the replica.
"""


class Rows(Protocol):
    """Whose rows they are: asked, and told, when one's turn comes."""

    def demand(self, row: "Waiting") -> float:
        """Tokens that it is expected to hold."""

    def begin(self, row: "Waiting", tokens: float) -> None:
        """Begin it, in a task of its own; the room for so many tokens is its until released."""


@dataclass(eq=False, slots=True)
class Waiting:
    """A row that waits, by its number among its owner's.

    There are thousands of them in a process that serves, and Python's collector looks through them
    all while requests wait for it: so each is one object, and neither a task nor a future.
    """

    rank: int
    came: int
    prompt: str
    rows: Rows
    at: int
    waits: bool = True

    def __lt__(self, other: "Waiting") -> bool:
        return (self.rank, self.came) < (other.rank, other.came)


def _by_prompt(row: Waiting) -> tuple[str, int]:
    return row.prompt, row.came


class Pacer:
    """Hands out the engine's room for rows: the lowest rank first, then first come first served.

    But after a row those that share its prefix may go before others of its rank, at most
    `FOLLOWERS` of them, in the order of their prompts: so they meet while the prefix's blocks are
    in the cache, out of all shards that are open. For one event loop.
    """

    def __init__(
        self,
        kv: KVState,
        *,
        tokens: float = OVERSUBSCRIBE_TOKENS,
        rows: float = OVERSUBSCRIBE_ROWS,
    ) -> None:
        self.max_rows = math.ceil(kv.max_num_seqs * rows)
        self.max_tokens = max(1.0, kv.capacity_tokens * tokens)
        self.rows = 0
        self.tokens = 0.0
        self._came = itertools.count()
        # All that wait, and of the first some that no longer do; of each rank by prompt.
        self._by_age: list[Waiting] = []
        self._by_prompt: dict[int, list[Waiting]] = {}
        self._leader: Waiting | None = None
        self._followers = 0
        self._woken = False

    def push(self, rows: Rows, at: int, rank: int = 0, prompt: str = "") -> Waiting:
        """Have a row wait for its turn, which comes in another turn of the event loop."""
        row = Waiting(rank, next(self._came), prompt, rows, at)
        heapq.heappush(self._by_age, row)
        insort(self._by_prompt.setdefault(rank, []), row, key=_by_prompt)
        self._let_in_soon()  # and not now: of all rows of a shard one is to be chosen
        return row

    def withdraw(self, row: Waiting) -> None:
        """Have a row wait no longer; one whose turn has come stays as it is."""
        if row.waits:
            self._forget(row)
            self._let_in_soon()  # and not now: all rows of its shard may be about to go

    def release(self, tokens: float) -> None:
        """Give a row's room back, to the next ones that wait."""
        self.rows -= 1
        self.tokens -= tokens
        self._let_in()

    def _let_in_soon(self) -> None:
        if not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        self._woken = False
        self._let_in()

    def _let_in(self) -> None:
        while (eldest := self._eldest()) is not None:
            kin = self._kin(eldest.rank)
            row = kin or eldest
            tokens = row.rows.demand(row)
            if not self._fits(tokens):
                return
            self.rows += 1
            self.tokens += tokens
            if kin is None:
                self._leader, self._followers = row, 0
            else:
                self._followers += 1
            self._forget(row)
            row.rows.begin(row, tokens)

    def _eldest(self) -> Waiting | None:
        """The row that is due."""
        while self._by_age and not self._by_age[0].waits:
            heapq.heappop(self._by_age)
        return self._by_age[0] if self._by_age else None

    def _kin(self, rank: int) -> Waiting | None:
        """The next one that may follow the last row that was due."""
        if self._leader is None or self._leader.rank != rank or self._followers == FOLLOWERS:
            return None
        rows = self._by_prompt[rank]
        # What all share is in the cache anyway: of the first and the last, so of all between.
        chars = common_chars(rows[0].prompt, rows[-1].prompt) + KIN_CHARS
        prefix = self._leader.prompt[:chars]
        at = bisect_left(rows, prefix, key=lambda row: row.prompt)
        if len(prefix) == chars and at < len(rows) and rows[at].prompt.startswith(prefix):
            return rows[at]
        return None

    def _forget(self, row: Waiting) -> None:
        row.waits = False
        rows = self._by_prompt[row.rank]
        del rows[bisect_left(rows, _by_prompt(row), key=_by_prompt)]

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
