"""How many replicas there should be, from the tokens of KV cache that requests need. Pure.

Ray Serve's own policy counts requests, which says little where one request needs a hundred times
the memory of another. This one counts tokens, but not only those in flight. A step of an engine
takes t0 + n * t for n tokens, so requests on a replica take 1 + n / half_speed_tokens times as long
as alone, and it is busy to n / (n + half_speed_tokens) (processor sharing). Where replicas are
added, each has fewer tokens and is done with them sooner: tokens in flight fall faster than
replicas grow, and a policy that takes them for the demand orders too many, then gives too many
back, and so on for ever. What does not depend on the number of replicas is the work that arrives:

    tokens that arrive a second / tokens that a busy replica releases a second

The latter is learned from the running fleet, over minutes. Beside arriving work count a backlog,
and a rise that will go on while replicas start. Starting replicas count as if they were there, so
that nothing is ordered twice. Up is fast, because requests wait; down is slow, because starting
again costs minutes.

The fewer and the more unequal requests are, the more what arrives in some seconds differs from what
arrives for long. How much is known from the squares of their demand: see `_noise`. What that
explains is no rise, and no reason for another count.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from phi4ray.config import Config
from phi4ray.serve.rate import AGE_S, VARIANCE_PER_S
from phi4ray.serve.schedule import Window

Cause = Literal[
    "steady", "demand", "backlog", "trend", "idle", "held", "batch", "schedule", "bounds"
]
CAUSES: Final[tuple[Cause, ...]] = get_args(Cause)
"""`demand`, `backlog`, `trend`: more are needed for what arrives, what waits, what will arrive.
`idle`: fewer were needed for a while. `held`: a request waits for the first replica. `batch`:
batch jobs start the first one, or keep what online requests do not need. `schedule`, `bounds`: more
or fewer are needed, but the window or the configuration does not let."""

LEARNED_HALF_LIFE_S = 300.0
NOISE_WINDOWS = 6
NOISE_DEVIATIONS = 3.0
"""What is usual, and its noise, are known from so many times `trend_s`; a rise is above both, and
above so many standard deviations of what independent requests explain."""

QUIET_TOKENS_PER_S = 1.0


class AutoscalingPolicyConfig(Config):
    """Bounds, target and pace. The defaults do for engines whose speed was never measured."""

    min_replicas: int = Field(1, ge=0, description="0: none while nobody asks")
    max_replicas: int = Field(1, ge=1)
    target_occupancy: float = Field(
        0.7, gt=0, le=1, description="Share of a KV cache that demand should fill at most"
    )
    target_slowdown: float = Field(
        4.0, gt=1, description="How many times as long as alone a request should take at most"
    )
    half_speed_tokens: float = Field(
        20_000.0,
        gt=0,
        description="Tokens in flight at which a request takes twice as long as alone. Rather too "
        "few than too many: the count then moves in smaller steps, else it may swing",
    )
    headroom_replicas: float = Field(
        0.5, ge=0, description="Kept free for a sudden rise, beside what the targets leave"
    )
    dead_band: float = Field(
        0.1, ge=0, description="Demand may grow by this share before a replica given up is missed"
    )
    trend_s: float = Field(20.0, gt=0, description="Time over which a rise of work is measured")
    trend_growth: float = Field(
        0.35, ge=0, description="Share above the usual from which on work is taken to rise"
    )
    lookahead_s: float = Field(
        100.0,
        ge=0,
        description="A rise is taken to go on so long: as a replica takes to start; 0: it is not",
    )
    drain_s: float = Field(60.0, gt=0, description="A backlog should be worked off in this time")
    upscale_delay_s: float = Field(0.0, ge=0, description="Demand must last so long first")
    downscale_delay_s: float = Field(300.0, ge=0, description="So must its absence")
    downscale_to_zero_delay_s: float = Field(600.0, ge=0, description="And so must silence")
    sleep_delay_s: float | None = Field(
        None,
        gt=0,
        description="After so long without a request a replica sleeps: it gives its GPU's memory "
        "back, keeps the weights in the host's, and wakes in about a second; None: never",
    )
    batch_replicas: int = Field(
        0,
        ge=0,
        description="Replicas that batch jobs keep from being scaled in. They start the first one "
        "where there is none, and no other; with 0 not even that",
    )
    schedule: tuple[Window, ...] = Field((), description="The first window that holds, counts")

    @model_validator(mode="after")
    def _check(self) -> "AutoscalingPolicyConfig":
        for window in (None, *self.schedule):
            least, most = self._bounds(window)
            if most < least:
                raise ValueError(f"max_replicas {most} is below min_replicas {least}")
        last_s = self.downscale_to_zero_delay_s
        if self.sleep_delay_s is not None and not self.widest[0] and self.sleep_delay_s >= last_s:
            raise ValueError(
                f"sleep_delay_s {self.sleep_delay_s:g} is not below downscale_to_zero_delay_s "
                f"{last_s:g}: the last replica would go and never sleep"
            )
        return self

    def _bounds(self, window: Window | None) -> tuple[int, int]:
        if window is None:
            return self.min_replicas, self.max_replicas
        return window.min_replicas, window.max_replicas or self.max_replicas

    def window(self, now_s: float) -> Window | None:
        """The window that holds at a moment."""
        return next((window for window in self.schedule if window.holds(now_s)), None)

    def bounds(self, now_s: float) -> tuple[int, int]:
        """Fewest and most replicas at a moment."""
        return self._bounds(self.window(now_s))

    @property
    def widest(self) -> tuple[int, int]:
        """Fewest and most replicas at any moment."""
        every = [self._bounds(window) for window in (None, *self.schedule)]
        return min(least for least, _ in every), max(most for _, most in every)


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica tells of itself: its KV capacity, and the expected demand of requests.

    Used is what admitted ones hold, queued what waiting ones will hold. Those that were turned
    away have arrived too. `batch_tokens` is what rows of batch jobs hold beside them, `batch_rows`
    how many there are, those included that wait for slack. `arrived_squares_per_s` sums the
    squared demands of those that arrive.
    """

    capacity_tokens: float
    used_tokens: float
    queued_tokens: float
    arrived_tokens_per_s: float
    released_tokens_per_s: float
    batch_tokens: float = 0.0
    batch_rows: float = 0.0
    arrived_squares_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas, why in a word and in words, and what the next decision needs (JSON)."""

    replicas: int
    cause: Cause
    reason: str
    state: dict[str, Any]


class _Look(NamedTuple):
    """What one look found: arriving work, and replicas wanted by it for going up and down."""

    at_s: float
    work: float
    up: int
    down: int


class _Rates(NamedTuple):
    """Of the whole fleet, a second: tokens that arrive, their squares, tokens that are released,
    and by how many busy replicas."""

    arrived: float
    squares: float
    released: float
    busy: float


class _Learned(NamedTuple):
    """The sums of `_Rates` over the past, with a half-life of `LEARNED_HALF_LIFE_S`."""

    at_s: float
    arrived: float = 0.0
    squares: float = 0.0
    released: float = 0.0
    busy_s: float = 0.0

    def then(self, rates: _Rates, now_s: float) -> "_Learned":
        passed_s = max(0.0, min(now_s - self.at_s, LEARNED_HALF_LIFE_S))
        kept = 0.5 ** (passed_s / LEARNED_HALF_LIFE_S)
        sums = (kept * sum_ + passed_s * rate for sum_, rate in zip(self[1:], rates, strict=True))
        return _Learned(now_s, *sums)


def _noise(learned: _Learned, rates: _Rates, work: float, per_s: float) -> float:
    """The standard deviation of arriving work, did the same number of requests come for ever.

    One large request says at once how unequal they are, many small ones before it keep it said.
    """
    tokens = rates.squares / rates.arrived if rates.arrived else 0.0
    if learned.arrived:
        tokens = max(tokens, learned.squares / learned.arrived)
    return math.sqrt(VARIANCE_PER_S * work * tokens / per_s)


def _rise(
    config: AutoscalingPolicyConfig, looks: Sequence[_Look], work: float, noise: float, now_s: float
) -> float:
    """What work will have grown by when replicas ordered now have started; 0 if that is noise."""
    aged = [((now_s - look.at_s) / config.trend_s, look) for look in looks]
    past = [look for age, look in aged if 1.0 <= age <= NOISE_WINDOWS]
    lately = [look for age, look in aged if 0.5 <= age <= 1.5]
    if not lately or not past or aged[0][0] < NOISE_WINDOWS / 2 or not config.lookahead_s:
        return 0.0  # not known for long enough, or not wanted
    usual = fmean(look.work for look in past)
    deviation = math.sqrt(fmean((look.work - usual) ** 2 for look in past))
    least = max(usual * config.trend_growth, NOISE_DEVIATIONS * max(deviation, noise))
    if work <= usual + least:
        return 0.0
    passed_s = now_s - fmean(look.at_s for look in lately)
    slope = (work - fmean(look.work for look in lately)) / passed_s
    return max(0.0, slope * (AGE_S + config.lookahead_s))


def decide(
    config: AutoscalingPolicyConfig,
    loads: Sequence[ReplicaLoad],
    *,
    target: int,
    held_requests: float,
    open_shards: int = 0,
    now_s: float,
    state: Mapping[str, Any],
) -> Decision:
    """The number of replicas that there should be.

    `loads` are of the replicas that run, `target` is how many were last asked for (those still
    starting included), `held_requests` are waiting outside because no replica is there.

    wanted = (arriving work + backlog + rise) / (busy share at the targets) + headroom, rounded up.
    Of what differs from usual in the arriving work, a standard deviation of its noise is left out.
    More than `target`: after `upscale_delay_s` that many, the fewest wanted in that time. Less,
    even with `dead_band` more work: the most wanted within `downscale_delay_s`; but while there
    is batch work no fewer than `batch_replicas`, if there are so many. Of none, batch work makes
    one within that budget; the last one goes when nobody has asked for long.
    """
    known = [load.capacity_tokens for load in loads if load.capacity_tokens > 0]
    capacity = fmean(known) if known else float(state.get("capacity_tokens", 0.0))
    half = config.half_speed_tokens
    aim = min(config.target_occupancy * capacity, (config.target_slowdown - 1) * half)
    # Beside batch rows a request takes longer, and holds its tokens for longer, than it would.
    held = [
        load.used_tokens * half / (half + load.batch_tokens) + load.queued_tokens for load in loads
    ]
    arrived = sum(load.arrived_tokens_per_s for load in loads)
    released = sum(load.released_tokens_per_s for load in loads)
    busy = sum(tokens / (tokens + half) for tokens in held)
    squares = sum(load.arrived_squares_per_s for load in loads)
    rates = _Rates(arrived, squares, released, busy)
    learned = _Learned(*state.get("learned", (now_s,))).then(rates, now_s)

    # In proportion to the tokens where replicas have more than they should, which is too much.
    seen, backlog, noise = max(busy, sum(held) / (aim + half)), 0.0, 0.0
    if learned.released and learned.busy_s:
        per_s = learned.released / learned.busy_s
        seen = min(seen, arrived / per_s)
        noise = _noise(learned, rates, seen, per_s)
        backlog = sum(max(0.0, tokens - aim) for tokens in held) / (per_s * config.drain_s)

    asked = any(held) or arrived >= QUIET_TOKENS_PER_S or held_requests > 0
    batch = open_shards > 0 or any(load.batch_rows for load in loads)
    budget = config.batch_replicas if batch else 0
    # Nothing was later than now: the clock was set back, and what is known begins again.
    asked_s = now_s if asked or budget else min(now_s, float(state.get("asked_s", now_s)))
    since_s = min(now_s, float(state.get("since_s", now_s)))
    longest_s = max(
        NOISE_WINDOWS * config.trend_s, config.upscale_delay_s, config.downscale_delay_s
    )
    looks = [
        look
        for look in (_Look(*told) for told in state.get("looks", ()))
        if now_s - longest_s - 1 <= look.at_s <= now_s
    ]

    def within(delay_s: float) -> list[_Look]:
        return [look for look in looks if now_s - look.at_s <= delay_s]

    def wanted(work: float) -> int:
        if not capacity:
            return 1 if held_requests else target
        if not asked:
            return 0
        return max(1, math.ceil(work * (aim + half) / aim + config.headroom_replicas - 1e-9))

    rise = _rise(config, looks, seen, noise, now_s)
    usual = fmean([seen, *(look.work for look in within(NOISE_WINDOWS * config.trend_s))])
    # What noise explains of a difference is none.
    work = usual + math.copysign(max(0.0, abs(seen - usual) - noise), seen - usual)
    steady = fmean([work, *(look.work for look in within(config.trend_s))])
    up = wanted(work + backlog + rise)
    down = max(up, wanted(steady * (1 + config.dead_band) + backlog + rise))
    # One look a second is enough, and keeps the state small.
    if looks and now_s - looks[-1].at_s < 1.0:
        last = looks.pop()
        looks.append(_Look(last.at_s, last.work, min(last.up, up), max(last.down, down)))
    else:
        looks.append(_Look(now_s, seen, up, down))

    least, most = config.bounds(now_s)
    rising = min([up, *(look.up for look in within(config.upscale_delay_s))])
    falling = max([down, *(look.down for look in within(config.downscale_delay_s))])
    known_s = now_s - since_s
    cause: Cause = "steady"
    replicas = target
    if held_requests and not target:
        cause, replicas = "held", max(1, rising)
    elif budget and not target:
        cause, replicas = "batch", 1
    elif rising > target and known_s >= config.upscale_delay_s:
        replicas = rising
        if wanted(work) >= rising:
            cause = "demand"
        else:
            cause = "backlog" if wanted(work + backlog) >= rising else "trend"
    elif falling < target and known_s >= config.downscale_delay_s:
        quiet = now_s - asked_s >= config.downscale_to_zero_delay_s
        replicas = max(falling, 0 if quiet else 1)
        cause = "idle" if replicas < target else "steady"
        if replicas < (kept := min(target, budget)):
            cause, replicas = "batch", kept
    bounded = max(least, min(most, replicas))
    if bounded != replicas:
        cause = "schedule" if config.window(now_s) else "bounds"
    return Decision(
        bounded,
        cause,
        f"{work:.2f} replicas' work arrives, {backlog:.2f} for the backlog, {rise:.2f} for the "
        f"rise; a replica should be busy to {aim / (aim + half):.0%}; {least} to {most} may run"
        if capacity
        else "no replica has told its KV capacity yet",
        {
            "capacity_tokens": capacity,
            "asked_s": asked_s,
            "since_s": since_s,
            "learned": list(learned),
            "looks": [list(look) for look in looks],
        },
    )
