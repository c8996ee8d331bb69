"""How many replicas there should be: up with demand at once, down slowly, never out of bounds."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from phi4ray.serve.autoscaling import (
    AutoscalingPolicyConfig,
    Decision,
    ReplicaLoad,
    Window,
    decide,
)

CAPACITY = 1000.0


def policy(**settings: Any) -> AutoscalingPolicyConfig:
    return AutoscalingPolicyConfig.model_validate(
        {"min_replicas": 1, "max_replicas": 10, "target_occupancy": 0.5, **settings}
    )


class Fleet:
    """A service whose replicas take `start_s` to start, under a given demand in tokens."""

    def __init__(
        self, config: AutoscalingPolicyConfig, target: int = 1, start_s: float = 60.0
    ) -> None:
        self.config, self.target, self.start_s = config, target, start_s
        self.now = 1_000_000.0
        self.ready_at = [self.now] * target
        self.state: dict[str, Any] = {}
        self.last: Decision | None = None

    def step(self, demand: float, held: float = 0, seconds: float = 1.0) -> int:
        self.now += seconds
        running = sum(at <= self.now for at in self.ready_at)
        share = demand / running if running else 0.0
        loads = [ReplicaLoad(CAPACITY, min(share, CAPACITY), max(0.0, share - CAPACITY))] * running
        self.last = decide(
            self.config,
            loads,
            target=self.target,
            held_requests=held,
            now_s=self.now,
            state=json.loads(json.dumps(self.state)),
        )
        self.state, self.target = self.last.state, self.last.replicas
        self.ready_at = sorted(self.ready_at)[: self.target]
        self.ready_at += [self.now + self.start_s] * (self.target - len(self.ready_at))
        return self.target


@pytest.mark.parametrize(
    ("demand", "replicas"),
    [(0, 1), (499, 1), (500, 1), (501, 2), (1000, 2), (2600, 6), (100_000, 10)],
)
def test_demand_in_tokens_against_the_target_share_of_the_caches(
    demand: float, replicas: int
) -> None:
    assert Fleet(policy()).step(demand) == replicas


def test_replicas_that_are_starting_count_so_that_a_backlog_does_not_order_more() -> None:
    fleet = Fleet(policy())
    assert {fleet.step(3000) for _ in range(59)} == {6}


def test_what_waits_counts_like_what_runs() -> None:
    loads = [ReplicaLoad(CAPACITY, 300, 700)]
    found = decide(policy(), loads, target=1, held_requests=0, now_s=0, state={})
    assert found.replicas == 2
    assert "1,000 tokens" in found.reason


def test_a_spike_shorter_than_the_delay_starts_nothing() -> None:
    fleet = Fleet(policy(upscale_delay_s=10))
    for _ in range(30):
        fleet.step(100)
    assert {fleet.step(3000) for _ in range(5)} == {1}
    assert {fleet.step(100) for _ in range(20)} == {1}
    assert [fleet.step(3000) for _ in range(13)][-1] == 6


def test_replicas_go_only_after_their_absence_was_possible_for_the_whole_delay() -> None:
    fleet = Fleet(policy(downscale_delay_s=100), target=6)
    for _ in range(200):
        fleet.step(2900)
    assert {fleet.step(400) for _ in range(95)} == {6}
    fleet.step(2400)  # a last burst needs five, or six with the band
    assert {fleet.step(400) for _ in range(95)} == {6}
    assert [fleet.step(400) for _ in range(20)][-1] == 1


def test_a_demand_at_the_edge_does_not_flap() -> None:
    fleet = Fleet(policy(downscale_delay_s=5, dead_band=0.1))
    counts = [fleet.step(1000 + (20 if step % 2 else -20)) for step in range(400)]
    assert set(counts[10:]) == {3}


def test_the_last_replica_goes_after_silence_and_comes_for_the_first_request() -> None:
    fleet = Fleet(policy(min_replicas=0, downscale_delay_s=10, downscale_to_zero_delay_s=50))
    fleet.step(10)
    assert {fleet.step(0) for _ in range(45)} == {1}
    assert [fleet.step(0) for _ in range(10)][-1] == 0
    assert fleet.step(0, held=1) == 1
    assert {fleet.step(0, held=1) for _ in range(59)} == {1}


def test_bounds_follow_the_schedule() -> None:
    office = Window(
        days=("mon", "tue", "wed", "thu", "fri"), start="08:00", end="20:00",
        timezone="Europe/Berlin", min_replicas=3, max_replicas=8,
    )  # fmt: skip
    config = policy(min_replicas=0, max_replicas=4, schedule=[office.model_dump()])
    at = {
        "monday noon": datetime(2026, 11, 23, 12, tzinfo=UTC),
        "monday 07:30 in Berlin": datetime(2026, 11, 23, 6, 30, tzinfo=UTC),
        "monday 08:30 in Berlin": datetime(2026, 11, 23, 7, 30, tzinfo=UTC),
        "sunday noon": datetime(2026, 11, 22, 12, tzinfo=UTC),
    }
    found = {name: config.bounds(moment.timestamp()) for name, moment in at.items()}
    assert found == {
        "monday noon": (3, 8),
        "monday 07:30 in Berlin": (0, 4),
        "monday 08:30 in Berlin": (3, 8),
        "sunday noon": (0, 4),
    }
    assert config.widest == (0, 8)


def test_a_window_may_go_over_midnight() -> None:
    night = Window(days=("fri",), start="22:00", end="06:00", min_replicas=0)
    assert night.holds(datetime(2026, 11, 20, 23, tzinfo=UTC).timestamp())  # friday
    assert night.holds(datetime(2026, 11, 21, 5, tzinfo=UTC).timestamp())  # saturday
    assert not night.holds(datetime(2026, 11, 21, 23, tzinfo=UTC).timestamp())


@pytest.mark.parametrize(
    "settings",
    [
        {"min_replicas": 5, "max_replicas": 4},
        {"schedule": [{"start": "08:00", "end": "09:00", "min_replicas": 11}]},
        {"schedule": [{"start": "08:00", "end": "09:00", "min_replicas": 1, "timezone": "Mars"}]},
        {"target_occupancy": 0},
        {"target": 0.5},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        policy(**settings)


demands = st.lists(st.floats(0, 20_000), min_size=1, max_size=60)


@given(demands, st.integers(0, 3), st.integers(3, 9), st.floats(0, 120))
def test_bounds_hold_and_the_state_is_json_whatever_happens(
    trace: list[float], least: int, most: int, start_s: float
) -> None:
    fleet = Fleet(policy(min_replicas=least, max_replicas=most), max(1, least), start_s)
    for demand in trace:
        assert least <= fleet.step(demand, held=float(demand > 10_000), seconds=7.0) <= most
        assert len(json.dumps(fleet.state)) < 100_000


@given(demands, st.floats(0, 20_000), st.floats(0, 20_000))
def test_more_demand_never_means_fewer_replicas(
    before: list[float], one: float, other: float
) -> None:
    found = []
    for demand in sorted((one, other)):
        fleet = Fleet(policy(downscale_delay_s=20))
        for earlier in before:
            fleet.step(earlier, seconds=5.0)
        found.append(fleet.step(demand))
    assert found == sorted(found)


@given(demands, st.floats(0, 20_000), st.floats(0, 300))
def test_under_a_constant_demand_the_count_settles(
    before: list[float], demand: float, start_s: float
) -> None:
    fleet = Fleet(policy(downscale_delay_s=50), start_s=start_s)
    for earlier in before:
        fleet.step(earlier, seconds=5.0)
    for _ in range(100):
        fleet.step(demand, seconds=5.0)
    assert len({fleet.step(demand, seconds=5.0) for _ in range(100)}) == 1
