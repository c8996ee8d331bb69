"""How many replicas there should be, from the tokens of KV cache that requests need. Pure.

Ray Serve's own policy counts requests, which says little where one request needs a hundred times
the memory of another. This one counts tokens: what admitted requests hold and what waiting ones
will hold, against a target share of the replicas' KV caches. Replicas that are starting count as
if they were there, so that a backlog does not order more and more of them. Up is fast, because
requests wait; down is slow, because starting again costs minutes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from phi4ray.config import Config

Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WEEKDAYS: tuple[Weekday, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Window(Config):
    """Other bounds for a part of the day; one that ends before it starts goes over midnight."""

    days: tuple[Weekday, ...] = Field(WEEKDAYS, min_length=1, description="Days on which it starts")
    start: time = Field(description="Local time, as '08:00'")
    end: time = Field(description="Local time, as '20:00'")
    timezone: str = Field("UTC", description="As 'Europe/Berlin'")
    min_replicas: int = Field(ge=0)
    max_replicas: int | None = Field(None, ge=1, description="None: as outside of the window")

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"there is no time zone {name!r}") from error
        return name

    def holds(self, now_s: float) -> bool:
        """Whether a moment, in Unix seconds, lies in the window."""
        now = datetime.fromtimestamp(now_s, ZoneInfo(self.timezone))
        clock, today = now.time(), now.weekday()
        if self.start <= self.end:
            return self.start <= clock < self.end and WEEKDAYS[today] in self.days
        if clock >= self.start:
            return WEEKDAYS[today] in self.days
        return clock < self.end and WEEKDAYS[today - 1] in self.days


class AutoscalingPolicyConfig(Config):
    """Bounds, target and pace."""

    min_replicas: int = Field(1, ge=0, description="0: none while nobody asks")
    max_replicas: int = Field(1, ge=1)
    target_occupancy: float = Field(
        0.7, gt=0, le=1, description="Share of the KV caches that demand should fill"
    )
    dead_band: float = Field(
        0.1, ge=0, description="Demand may grow by this share before a replica given up is missed"
    )
    upscale_delay_s: float = Field(0.0, ge=0, description="Demand must last so long first")
    downscale_delay_s: float = Field(300.0, ge=0, description="So must its absence")
    downscale_to_zero_delay_s: float = Field(600.0, ge=0, description="And so must silence")
    schedule: tuple[Window, ...] = Field((), description="The first window that holds, counts")

    @model_validator(mode="after")
    def _check(self) -> "AutoscalingPolicyConfig":
        for window in (None, *self.schedule):
            least, most = self._bounds(window)
            if most < least:
                raise ValueError(f"max_replicas {most} is below min_replicas {least}")
        return self

    def _bounds(self, window: Window | None) -> tuple[int, int]:
        if window is None:
            return self.min_replicas, self.max_replicas
        return window.min_replicas, window.max_replicas or self.max_replicas

    def bounds(self, now_s: float) -> tuple[int, int]:
        """Fewest and most replicas at a moment."""
        return self._bounds(next((w for w in self.schedule if w.holds(now_s)), None))

    @property
    def widest(self) -> tuple[int, int]:
        """Fewest and most replicas at any moment."""
        every = [self._bounds(window) for window in (None, *self.schedule)]
        return min(least for least, _ in every), max(most for _, most in every)


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica tells of itself: KV capacity, and the expected demand on it."""

    capacity_tokens: float
    used_tokens: float
    queued_tokens: float


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas, in words why, and what to hand to the next decision (JSON)."""

    replicas: int
    reason: str
    state: dict[str, Any]


def decide(
    config: AutoscalingPolicyConfig,
    loads: Sequence[ReplicaLoad],
    *,
    target: int,
    held_requests: float,
    now_s: float,
    state: Mapping[str, Any],
) -> Decision:
    """The number of replicas that there should be.

    `loads` are of the replicas that run, `target` is how many were last asked for (those still
    starting included), `held_requests` are waiting outside because no replica is there.

    wanted = demand / (target_occupancy * capacity of one), rounded up. More than `target`: after
    `upscale_delay_s` that many, the fewest wanted in that time. Less, even with `dead_band` more
    demand: the most wanted within `downscale_delay_s`.
    """
    known = [load.capacity_tokens for load in loads if load.capacity_tokens > 0]
    capacity = sum(known) / len(known) if known else float(state.get("capacity_tokens", 0.0))
    demand = sum(load.used_tokens + load.queued_tokens for load in loads)
    least, most = config.bounds(now_s)

    def wanted(tokens: float) -> int:
        if not capacity:
            return 1 if held_requests else target
        replicas = math.ceil(tokens / (config.target_occupancy * capacity) - 1e-9)
        return max(replicas, 1 if held_requests or tokens else 0)

    up, down = wanted(demand), wanted(demand * (1 + config.dead_band))
    longest = max(
        config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s
    )
    history = [
        (float(at), int(u), int(d))
        for at, u, d in state.get("history", ())
        if now_s - longest - 1 <= float(at) <= now_s
    ]
    # One entry a second is enough, and keeps the state small; the newest counts as now.
    if history and now_s - history[-1][0] < 1.0 and len(history) > 1:
        last = history.pop()
        up_kept, down_kept = min(last[1], up), max(last[2], down)
        history.append((last[0], up_kept, down_kept))
    else:
        history.append((now_s, up, down))
    since = float(state.get("since_s", now_s))

    def over(delay_s: float) -> list[tuple[int, int]]:
        return [(u, d) for at, u, d in history if now_s - at <= delay_s] + [(up, down)]

    rise = min(u for u, _ in over(config.upscale_delay_s))
    low = max(d for _, d in over(config.downscale_delay_s))
    silent = max(d for _, d in over(config.downscale_to_zero_delay_s))
    replicas, reason = target, f"demand {demand:,.0f} tokens fits {target} replicas"
    if rise > target and now_s - since >= config.upscale_delay_s:
        replicas, reason = rise, f"demand {demand:,.0f} tokens needs {rise} replicas"
    elif low < target and now_s - since >= config.downscale_delay_s:
        quiet = not silent and now_s - since >= config.downscale_to_zero_delay_s
        replicas = max(low, 0 if quiet else 1)
        reason = f"for {config.downscale_delay_s:.0f} s no more than {low} replicas were needed"
    if held_requests and not target:
        replicas, reason = max(1, replicas), "a request waits for the first replica"
    bounded = max(least, min(most, replicas))
    if bounded != replicas:
        reason += f"; bounds are {least} to {most}"
    return Decision(
        bounded,
        reason,
        {"capacity_tokens": capacity, "history": [list(h) for h in history], "since_s": since},
    )
