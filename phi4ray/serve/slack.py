"""What online traffic leaves for batch rows on one replica: its slack. Pure; times are given.

vLLM's `scheduling_policy="priority"` alone does not protect online requests: a waiting request
never evicts a running one (vLLM issues 24365 and 40004), and a step with a thousand sequences
lasts long for each of them. So batch rows are given to the engine only as far as

* KV cache is free above a reserve, which follows what online requests lately held;
* a step with all its sequences and prompts lasts no longer than the time per output token that
  online requests are to keep: it is also what an online prompt waits for.

While there has been no online request for some time none of it holds, and batch fills the engine.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import Field

from phi4ray.config import Config

R = TypeVar("R")

STEP_MEMORY_S = 0.25
"""Over so long a time a step's length is averaged: a request feels the mean of many steps. No debt
of long steps is greater."""

LONGEST_STEP = 3.0
"""A step with prompts of batch rows may last so many times the time per output token."""

CREDIT_STEPS = 2.0
"""So many targets of what short steps spare are kept for the next lump: it is some steps on its
way, all of them short, and what they spare would be lost."""

ONSET = 0.2
"""Of a lump: where more online tokens than usual come while it is computed, none is fed. Requests
that gather behind a lump are a long step in their turn, behind which more gather."""

GROWTH = 1.2
"""By what the prompts that are fed at once grow at most, each time."""

LEAST_TOKENS = 16.0
"""And the fewest that they shrink to: so they grow back within seconds."""

SHED = 0.5
"""What stays of the sequences, at most, where steps are too long: online traffic that grows will go
on growing, and a row that stays a little longer costs its step and those after it."""

REST_S = 1.0
"""For so long steps must have been short enough after that, before rows are fed again: in a burst
they would be fed into every gap, and go again."""

EXCESS_STEPS = 2.0
"""Rows go when the steps since the last lump have in sum been longer than they may by so many
targets. No step counts more than one, so that a late one costs no row its place. What is a little
too long, or now longer and now shorter, mends itself before that: rows end, and none are fed."""

IDLE_OVERSUBSCRIBE = 1.25
"""What batch holds of an idle replica: a few rows wait in the engine, for its next free places."""

AHEAD_STEPS = 8.0
"""Of an idle replica: rows for so many steps wait in the engine to be begun. It takes a front end a
step or two to hand over more. All that wait go for the first online request, which waits for that
itself: a thousand of them took 100 ms on an H200 (benchmarks/RESULTS.md)."""

LEAST_AHEAD = 64.0
"""And at least so many rows, or it would not be known how many a step can begin."""

BEGUN_FADES = 0.995
"""What the most rows that a step began count, each step, of what they did."""

CACHED_TOKENS = 128.0
"""What a row counts of a lump if the engine's cache holds it: there is next to nothing of it to be
computed, but it is one more sequence in the steps to come."""


class HarvestConfig(Config):
    """How batch rows share a replica with online requests."""

    target_tpot_ms: float = Field(
        50.0,
        gt=0,
        description="Time per output token that batch rows leave to online requests: near what "
        "they have alone under load, else batch takes what a burst would need",
    )
    reserve_fraction: float = Field(
        0.05, ge=0, lt=1, description="Share of the KV cache that batch rows leave free"
    )
    reserve_half_life_s: float = Field(
        10.0, gt=0, description="Half-life of the memory of what online requests held"
    )
    prefill_tokens: int = Field(
        2048, ge=1, description="Most prompt tokens of batch rows in one step of the engine"
    )
    idle_s: float = Field(
        30.0, ge=0, description="Without online requests for so long, batch takes the whole engine"
    )


class RecentPeak:
    """The most that was observed lately: an old peak counts half after each half-life."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._peak = 0.0
        self._at_s = -math.inf

    def observe(self, value: float, now_s: float) -> float:
        """Count a value; gives the peak as it counts now."""
        age_s = max(0.0, now_s - self._at_s)
        self._peak = max(value, self._peak * 0.5 ** (age_s / self._half_life_s))
        self._at_s = now_s
        return self._peak


class StepControl(Generic[R]):
    """Feeds batch rows to the engine so that its steps last no longer, in the mean, than they may.

    A step lasts as long as its sequences' next tokens and its prompts' tokens take together, and a
    fixed time more if there are prompts at all (11 ms on an H200, beside 27 ms for a thousand of
    their tokens: benchmarks/RESULTS.md). So prompts are fed many at once and not with each step:
    what a step is longer than its target is a debt, which shorter steps pay back, and without debt
    the next lump is due. A lump is as large as makes a step of `LONGEST_STEP` targets, which an
    online request may have to wait for.

    Rows take their time through the front end. One lump at a time is on that way: else a front end
    with much to do would gather several, and the engine get them all in one step.

    Only when nothing is fed and steps stay too long all the same, as when online requests come in
    numbers, rows must go: so many that the rest makes steps of the right length, and at least
    half. Then none are fed until steps have been short enough for some time.
    """

    def __init__(self, target_s: float, most_tokens: int) -> None:
        self._target_s = target_s
        self._most_tokens = most_tokens
        self._lump_tokens = float(most_tokens)
        self._longest_s = 0.0  # of the steps since the lump was fed
        self._credit = 0.0
        self._debt_s = 0.0
        self._unseen: dict[R, None] = {}
        """Rows that were fed and are not in a step yet, oldest first."""
        self._most_begun = 0.0  # in one of the last steps
        # Of the last steps: how many, how long, with how many sequences; old ones fade.
        self._steps = 0.0
        self._seconds = 0.0
        self._sequences = 0.0
        self._excess = 0.0  # in targets, of the steps since the last lump
        self._rest_s = 0.0

    @property
    def lump_s(self) -> float:
        """How long a step with a lump may last."""
        return LONGEST_STEP * self._target_s

    def ready(self, rising_tokens_per_s: float = 0.0) -> bool:
        """Whether another prompt may be fed.

        `rising_tokens_per_s` is by how much more online demand comes now than it did of late.
        """
        gathering = rising_tokens_per_s * self.lump_s
        paced = self._credit > 0 and self._rest_s <= 0
        return paced and gathering <= ONSET * self._lump_tokens

    def idle_ready(self) -> bool:
        """Whether another row may be fed while there are no online requests, however long steps
        get: where the engine could else begin all that it has before more can come."""
        return len(self._unseen) < max(LEAST_AHEAD, AHEAD_STEPS * self._most_begun)

    def feed(self, row: R, prompt_tokens: float) -> None:
        """Spend credit on a row; a long prompt overdraws it, and the next ones wait longer."""
        if not self._unseen:
            self._longest_s = 0.0
        self._credit -= prompt_tokens
        self._unseen[row] = None

    def awaits(self, row: R) -> bool:
        """Whether a row was fed and is in no step yet."""
        return row in self._unseen

    @property
    def unseen(self) -> tuple[R, ...]:
        """All such rows, oldest first."""
        return tuple(self._unseen)

    def forget(self, row: R) -> None:
        """A row has ended or gone, whether the engine had begun it or not."""
        self._unseen.pop(row, None)

    def observe(self, step_s: float | None, running: int, begun: int) -> None:
        """Count one step: its length, the sequences in it, and how many had their first token.

        No length: there was no sequence that could have waited for its next token.
        """
        self._most_begun = max(float(begun), BEGUN_FADES * self._most_begun)
        if step_s is None:
            self._rest_s = 0.0
        else:
            self._remember(step_s, running)
        if self._unseen:
            self._look_out(begun)
        if not self._unseen and self._debt_s <= 0:
            self._credit = min(self._credit, 0.0) + self._lump_tokens

    def _remember(self, step_s: float, running: int) -> None:
        kept = math.exp(-step_s / STEP_MEMORY_S)
        self._steps = kept * self._steps + 1
        self._seconds = kept * self._seconds + step_s
        self._sequences = kept * self._sequences + running
        self._rest_s = REST_S if self._rest_s > 0 and self._too_long > 1 else self._rest_s - step_s
        self._longest_s = max(self._longest_s, step_s)
        more_s = step_s - self._target_s
        self._debt_s = min(
            STEP_MEMORY_S, max(-CREDIT_STEPS * self._target_s, self._debt_s + more_s)
        )
        # Of a long burst without rows no more is kept than the first short steps make good.
        excess = self._excess + min(1.0, more_s / self._target_s)
        self._excess = min(EXCESS_STEPS + 1, max(0.0, excess))

    def _look_out(self, begun: int) -> None:
        """See the lump arrive, and make the next one larger or smaller by how long that took."""
        self._excess = 0.0
        # Online requests count as well, which lets the next lump go a little early.
        for row in list(itertools.islice(self._unseen, begun)):
            del self._unseen[row]
        if self._unseen:
            return
        too_long = self._longest_s / self.lump_s
        change = min(GROWTH, max(1 / GROWTH**4, 1 / too_long)) if too_long else GROWTH
        self._lump_tokens = max(LEAST_TOKENS, min(self._most_tokens, change * self._lump_tokens))

    @property
    def must_shed(self) -> bool:
        """Whether steps are so long that rows must go."""
        return self._excess > EXCESS_STEPS

    @property
    def keep(self) -> float:
        """Sequences, online ones included, that may stay."""
        if not self.must_shed:
            return math.inf
        return self._sequences / self._steps * min(SHED, 1 / self._too_long)

    def shrunk(self) -> None:
        """Rows have gone: whether more must go, only steps without them tell."""
        self._steps = self._seconds = self._sequences = self._excess = 0.0
        self._rest_s = REST_S

    @property
    def _too_long(self) -> float:
        """The mean of the last steps, as a multiple of the target."""
        return self._seconds / self._steps / self._target_s if self._steps else 0.0


@dataclass(frozen=True, slots=True)
class Slack:
    """Tokens of KV cache and sequences that batch rows may hold.

    Over `keep_*` rows are aborted; up to the others rows are handed over.
    """

    tokens: float
    sequences: float
    keep_tokens: float
    keep_sequences: float


def slack(
    config: HarvestConfig,
    *,
    capacity_tokens: float,
    max_num_seqs: int,
    online_tokens: float,
    online_sequences: int,
    recent_tokens: float,
    step_sequences: float,
    idle: bool,
    crowded: bool,
) -> Slack:
    """What batch rows may hold of a replica.

    `online_*` is what admitted online requests are expected to hold, `recent_tokens` the most that
    they lately did, `step_sequences` is `StepControl.keep`; `crowded`: online requests wait.
    """
    if crowded:
        return Slack(0, 0, 0, 0)
    if idle:
        tokens = IDLE_OVERSUBSCRIBE * capacity_tokens
        sequences = max(1.0, IDLE_OVERSUBSCRIBE * max_num_seqs)
        return Slack(tokens, sequences, tokens, sequences)
    free = capacity_tokens - online_tokens
    unreserved = capacity_tokens * (1 - config.reserve_fraction) - max(online_tokens, recent_tokens)
    places = min(max_num_seqs, step_sequences) - online_sequences
    return Slack(
        tokens=max(0.0, min(free, unreserved)),
        sequences=max(0.0, places),
        keep_tokens=max(0.0, free),
        keep_sequences=max(0.0, places),
    )
