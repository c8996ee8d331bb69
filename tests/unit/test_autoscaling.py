"""How many replicas there should be: up with demand at once, down slowly, never out of bounds."""

import itertools
import json
import math
import random
import time
from concurrent.futures import Future
from datetime import UTC, datetime
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster import autoscaling
from cluster.autoscaling import OpenShards, ScaleByTokens
from phi4ray.config import EngineConfig
from phi4ray.serve.autoscaling import (
    CAUSES,
    AutoscalingPolicyConfig,
    Decision,
    ReplicaLoad,
    decide,
)
from phi4ray.serve.config import serve_config
from phi4ray.serve.rate import Rate
from phi4ray.serve.schedule import Window

CAPACITY = 100_000.0
HALF = 1000.0
SECONDS_ALONE = 2.0
"""Tokens in flight that make requests take twice as long, and how long they take alone."""
TOKENS_PER_S = HALF / SECONDS_ALONE
"""What a replica that has much to do gets done."""


def policy(**settings: Any) -> AutoscalingPolicyConfig:
    given = {"max_replicas": 10, "half_speed_tokens": HALF, "target_slowdown": 4.0}
    return AutoscalingPolicyConfig.model_validate({**given, "headroom_replicas": 0.0, **settings})


class Fleet:
    """Replicas that take `start_s` to start and share their speed between their requests.

    n tokens in flight are done in alone_s * (1 + n / half): the more, the slower.
    """

    def __init__(
        self,
        config: AutoscalingPolicyConfig,
        target: int = 1,
        start_s: float = 60.0,
        half: float = HALF,
        alone_s: float = SECONDS_ALONE,
    ) -> None:
        self.config, self.target, self.start_s, self.half = config, target, start_s, half
        self.alone_s = alone_s
        self.now = 1_000_000.0
        self.ready_at = [self.now] * target
        self.tokens = 0.0
        self.released = 0.0
        self.state: dict[str, Any] = {}
        self.last: Decision | None = None

    @property
    def running(self) -> int:
        return sum(at <= self.now for at in self.ready_at)

    def step(
        self, work: float, held: float = 0, seconds: float = 1.0, *, request: float = 0.0
    ) -> int:
        """Let requests arrive, of so many tokens each, that keep `work` replicas busy."""
        arriving = work * self.half / self.alone_s
        for _ in range(10):
            self.flow(arriving, seconds / 10)
        return self.look(arriving, held, arriving * request)

    def flow(self, arriving: float, seconds: float) -> None:
        running = max(1, self.running)
        share = self.tokens / running
        self.released = self.tokens / (self.alone_s * (1 + share / self.half))
        # Implicit Euler, for steps that are longer than a request takes.
        rate = self.released / self.tokens if self.tokens else 0.0
        self.tokens = (self.tokens + arriving * seconds) / (1 + rate * seconds)
        self.now += seconds

    def look(self, arriving: float, held: float, squares: float = 0.0) -> int:
        n = self.running
        share = self.tokens / n if n else 0.0
        load = ReplicaLoad(
            CAPACITY, min(share, CAPACITY), max(0.0, share - CAPACITY),
            arriving / max(1, n), self.released / max(1, n),
            arrived_squares_per_s=squares / max(1, n),
        )  # fmt: skip
        self.last = decide(
            self.config,
            [load] * n,
            target=self.target,
            held_requests=held,
            now_s=self.now,
            state=json.loads(json.dumps(self.state)),
        )
        self.state, self.target = self.last.state, self.last.replicas
        self.ready_at = sorted(self.ready_at)[: self.target]
        self.ready_at += [self.now + self.start_s] * (self.target - len(self.ready_at))
        return self.target

    def settle(self, work: float, steps: int = 100, seconds: float = 10.0) -> int:
        return [self.step(work, seconds=seconds) for _ in range(steps)][-1]

    @property
    def cause(self) -> str:
        assert self.last is not None
        return self.last.cause


@pytest.mark.parametrize(
    ("work", "replicas"),
    [(0, 1), (0.7, 1), (0.8, 2), (1.3, 2), (1.6, 3), (3.3, 5), (100, 10)],
)
def test_arriving_work_against_the_busy_share_at_which_requests_are_four_times_slower(
    work: float, replicas: int
) -> None:
    assert Fleet(policy(downscale_delay_s=60)).settle(work) == replicas


def test_caches_that_are_too_small_for_the_slowdown_bound_the_target() -> None:
    small = policy(target_occupancy=0.01)  # 1,000 tokens: half of the time busy
    assert Fleet(small).settle(1.3) == 3


def test_a_clock_that_is_set_back_stops_no_scaling() -> None:
    fleet = Fleet(policy(downscale_delay_s=60))
    for work, replicas in [(0.5, 1), (3.3, 5), (0.5, 1)]:
        fleet.now -= 86400
        fleet.ready_at = [at - 86400 for at in fleet.ready_at]
        assert fleet.settle(work) == replicas


def test_headroom_is_free_capacity_beside_what_the_targets_ask_for() -> None:
    assert Fleet(policy(headroom_replicas=0.75)).settle(0.3) == 2


def test_replicas_that_are_starting_count_so_that_demand_does_not_order_more() -> None:
    fleet = Fleet(policy(drain_s=1e9, lookahead_s=0), start_s=600)
    fleet.settle(0.5)
    assert max(fleet.step(2.9) for _ in range(500)) == 4


def test_a_backlog_asks_for_more_than_what_arrives() -> None:
    fleet = Fleet(policy(drain_s=20, lookahead_s=0), start_s=100)
    fleet.settle(0.5)
    counts = [fleet.step(1.6) for _ in range(90)]
    assert counts[-1] > 3
    assert fleet.settle(1.6) == 3


def test_a_rise_orders_replicas_before_they_are_needed() -> None:
    fleet = Fleet(policy(trend_s=20))
    fleet.settle(0.5)
    causes = []
    for second in range(40):
        fleet.step(0.5 + 0.02 * second)
        causes.append(fleet.cause)
    assert "trend" in causes
    assert fleet.target >= 3


def test_what_waits_counts_like_what_runs() -> None:
    loads = [ReplicaLoad(CAPACITY, 3000, 3000, 500, 500)]
    both = [ReplicaLoad(CAPACITY, 6000, 0, 500, 500)]
    first, other = (
        decide(policy(), told, target=1, held_requests=0, now_s=0, state={})
        for told in (loads, both)
    )
    assert first == other
    assert first.replicas == 2


def test_requests_that_are_turned_away_are_demand_too() -> None:
    fleet = Fleet(policy(), start_s=1e9)
    fleet.settle(0.7)
    fleet.tokens, fleet.released = 20_000.0, TOKENS_PER_S
    fleet.now += 1
    assert fleet.look(arriving=4.0 * TOKENS_PER_S, held=0) >= 6


def test_a_spike_shorter_than_the_delay_starts_nothing() -> None:
    fleet = Fleet(policy(upscale_delay_s=10))
    fleet.settle(0.2)
    assert {fleet.step(2.5) for _ in range(5)} == {1}
    assert {fleet.step(0.2) for _ in range(20)} == {1}
    assert [fleet.step(2.5) for _ in range(20)][-1] > 1


def test_replicas_go_only_after_their_absence_was_possible_for_the_whole_delay() -> None:
    fleet = Fleet(policy(downscale_delay_s=100, lookahead_s=0), target=6)
    fleet.settle(4.4)
    assert {fleet.step(0.4) for _ in range(95)} == {6}
    for _ in range(30):
        fleet.step(4.4)
    assert {fleet.step(0.4) for _ in range(95)} == {6}
    assert fleet.settle(0.4) == 1


def test_a_demand_at_the_edge_does_not_flap() -> None:
    fleet = Fleet(policy(downscale_delay_s=60))
    fleet.settle(1.5)
    assert {fleet.step(1.5 + (0.02 if step % 2 else -0.02)) for step in range(400)} == {3}


def test_the_last_replica_goes_after_silence_and_comes_for_the_first_request() -> None:
    fleet = Fleet(policy(min_replicas=0, downscale_delay_s=10, downscale_to_zero_delay_s=50))
    fleet.step(0.1)
    fleet.tokens = 0.0
    assert {fleet.step(0) for _ in range(45)} == {1}
    causes = []
    while fleet.target:
        fleet.step(0)
        causes.append(fleet.cause)
    assert len(causes) <= 10
    assert causes[-1] == "idle"
    assert fleet.step(0, held=1) == 1
    assert fleet.cause == "held"
    assert {fleet.step(0, held=1) for _ in range(59)} == {1}


def test_the_cause_is_one_of_a_few_words() -> None:
    fleet = Fleet(policy(max_replicas=3, downscale_delay_s=10))
    causes = {}
    for name, work in (("low", 0.1), ("more", 1.0), ("too much", 9.0), ("none", 0.0)):
        fleet.settle(work, steps=1)
        causes[name] = fleet.cause
        fleet.settle(work, steps=20)
    fleet.settle(0)
    assert set(causes.values()) <= set(CAUSES)
    assert causes["low"] == "steady"
    assert causes["too much"] == "bounds"
    assert fleet.target == 1


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
    whole = Window(days=("fri",), start="00:00", end="00:00", min_replicas=0)
    assert [
        whole.holds(datetime(2026, 11, day, 12, tzinfo=UTC).timestamp()) for day in (20, 21)
    ] == [True, False]
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
        {"schedule": [{"start": "08:00", "end": "20:00Z", "min_replicas": 1}]},
        {"schedule": yaml.safe_load("[{start: '08:00', end: 20:00, min_replicas: 1}]")},
        {"target_occupancy": 0},
        {"target_slowdown": 1},
        {"target": 0.5},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        policy(**settings)


loads = st.lists(st.floats(0, 20), min_size=1, max_size=60)


@given(loads, st.integers(0, 3), st.integers(3, 9), st.floats(0, 120))
def test_bounds_hold_and_the_state_is_json_whatever_happens(
    trace: list[float], least: int, most: int, start_s: float
) -> None:
    fleet = Fleet(policy(min_replicas=least, max_replicas=most), max(1, least), start_s)
    for work in trace:
        given = {"held": float(work > 10), "seconds": 7.0, "request": 100 * work}
        assert least <= fleet.step(work, **given) <= most
        assert len(json.dumps(fleet.state)) < 100_000
        assert fleet.cause in CAUSES


@given(
    loads,
    st.floats(0, 20_000),
    st.floats(0, 20_000),
    st.floats(0, 5),
    st.floats(0, 5),
    st.sampled_from([0.0, 10.0, 1000.0]),
)
def test_more_demand_never_means_fewer_replicas(
    before: list[float], one: float, other: float, arriving: float, more: float, request: float
) -> None:
    found = []
    for tokens, work in zip(sorted((one, other)), (arriving, arriving + more), strict=True):
        fleet = Fleet(policy(downscale_delay_s=20))
        for earlier in before:
            fleet.step(earlier, seconds=5.0, request=request)
        fleet.tokens = tokens
        rate = work * TOKENS_PER_S
        found.append(fleet.look(rate, 0, rate * request))
    assert found == sorted(found)


@pytest.mark.slow
@settings(max_examples=30)
@given(
    loads,
    st.floats(0, 7),
    st.floats(0, 300),
    st.integers(1, 10),
    st.floats(1, 5),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_at_a_constant_arrival_rate_the_count_settles_where_the_load_is_within_the_target(
    before: list[float], work: float, start_s: float, first: int, slower: float, headroom: float
) -> None:
    config = policy(downscale_delay_s=50, headroom_replicas=headroom)
    fleet = Fleet(config, first, start_s, half=slower * HALF)
    for earlier in before:
        fleet.step(earlier, seconds=5.0)
    fleet.settle(work, steps=400)
    counts = [fleet.step(work, seconds=10.0) for _ in range(100)]
    assert sum(a != b for a, b in itertools.pairwise(counts)) <= 1
    if counts[-1] < config.max_replicas:
        # As many tokens in flight as make requests four times slower, by what is configured.
        assert fleet.tokens / counts[-1] <= 3 * HALF * 1.01
        assert work <= counts[-1]
    fewer = math.ceil(work / 0.75 * 1.1 + headroom) + 1
    if slower == 1:
        assert counts[-1] <= fewer


class Customers:
    """Ask at random, one independently of the other, for answers of very different lengths."""

    def __init__(self, fleet: Fleet, seed: int, mean_tokens: float) -> None:
        self.fleet, self.chance, self.mean_tokens = fleet, random.Random(seed), mean_tokens
        self.arrived, self.squares = Rate(), Rate()
        self.next_at = fleet.now

    def ask(self, per_s: float, for_s: float) -> tuple[list[int], list[str]]:
        """The counts and the causes of a look every five seconds."""
        fleet, counts, causes = self.fleet, [], []
        end = fleet.now + for_s
        while fleet.now < end:
            fleet.flow(0.0, 5.0)
            while self.next_at < fleet.now:
                tokens = self.mean_tokens * self.chance.lognormvariate(-0.245, 0.7)
                self.arrived.add(tokens, self.next_at)
                self.squares.add(tokens**2, self.next_at)
                fleet.tokens += tokens
                self.next_at += self.chance.expovariate(per_s)
            rates = self.arrived.per_s(fleet.now), self.squares.per_s(fleet.now)
            counts.append(fleet.look(rates[0], 0.0, rates[1]))
            causes.append(fleet.cause)
        return counts, causes


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("per_s", "work", "needed"), [(0.5, 0.9, 2), (0.5, 1.5, 3)])
def test_few_large_requests_at_a_steady_rate_order_hardly_more_than_they_need(
    seed: int, per_s: float, work: float, needed: int
) -> None:
    # Each takes half a minute alone.
    fleet = Fleet(policy(headroom_replicas=0.5), target=needed, alone_s=30.0)
    customers = Customers(fleet, seed, mean_tokens=work * HALF / 30.0 / per_s)
    counts, causes = customers.ask(per_s, for_s=3600)
    assert "trend" not in causes
    assert fmean(counts) <= 1.15 * needed
    assert sum(a != b for a, b in itertools.pairwise(counts)) <= 4


@pytest.mark.parametrize(("tokens", "trend"), [(20.0, True), (2000.0, False)])
def test_what_many_requests_say_of_a_rise_a_few_large_ones_do_not(
    tokens: float, trend: bool
) -> None:
    fleet = Fleet(policy())
    fleet.settle(0.5)
    causes = set()
    for second in range(40):
        fleet.step(0.5 + 0.02 * second, request=tokens)
        causes.add(fleet.cause)
    assert ("trend" in causes) is trend


def after_silence(config: AutoscalingPolicyConfig, target: int, **load: float) -> Decision:
    """What is decided after long silence of online requests, with this on each replica."""
    state: dict[str, Any] = {}
    for second in range(0, 2000, 5):
        found = decide(
            config, [ReplicaLoad(CAPACITY, 0, 0, 0, 0, **load)] * target,
            target=target, held_requests=0, now_s=1e6 + second, state=state,
        )  # fmt: skip
        state = found.state
        if found.replicas != target:
            break
    return found


def test_batch_rows_keep_replicas_up_to_their_budget_and_order_none() -> None:
    budget = policy(batch_replicas=2, downscale_delay_s=60)
    busy = {"batch_tokens": 50_000.0, "batch_rows": 100.0}
    found = after_silence(budget, target=4, **busy)
    assert (found.replicas, found.cause) == (2, "batch")
    assert after_silence(budget, target=1, **busy).replicas == 1
    assert after_silence(budget, target=4).replicas == 1
    assert after_silence(policy(downscale_delay_s=60), target=4, **busy).replicas == 1


def batch_job(config: AutoscalingPolicyConfig, state: dict[str, Any], **told: Any) -> Decision:
    """A look at a fleet of none, or of one that has no online request."""
    given = {"target": 0, "now_s": 1e6, "open_shards": 7, **told}
    loads = [ReplicaLoad(CAPACITY, 0, 0, 0, 0)] * told.pop("running", 0)
    given.pop("running", None)
    return decide(config, loads, held_requests=0, state=state, **given)


def test_a_batch_job_starts_the_first_replica_and_no_other() -> None:
    config = policy(min_replicas=0, batch_replicas=3)
    first = batch_job(config, {})
    assert (first.replicas, first.cause) == (1, "batch")
    for running in (0, 1):  # while it starts, and when it is there
        later = batch_job(config, first.state, target=1, now_s=1e6 + 600, running=running)
        assert later.replicas == 1


def test_a_batch_job_starts_no_replica_past_its_budget() -> None:
    assert batch_job(policy(min_replicas=0), {}).replicas == 0
    night = {"start": "00:00", "end": "00:00", "min_replicas": 0, "max_replicas": 1}
    assert batch_job(policy(min_replicas=0, batch_replicas=1, schedule=[night]), {}).replicas == 1


def test_a_replica_that_batch_jobs_started_goes_when_nobody_has_asked_for_long() -> None:
    config = policy(min_replicas=0, batch_replicas=1, downscale_to_zero_delay_s=600)
    state = batch_job(config, {}).state
    for now_s in (1e6 + 1000, 1e6 + 1300):
        state = batch_job(config, state, target=1, now_s=now_s, running=1).state
    soon = batch_job(config, state, target=1, now_s=1e6 + 1800, running=1, open_shards=0)
    assert soon.replicas == 1
    late = batch_job(config, soon.state, target=1, now_s=1e6 + 1901, running=1, open_shards=0)
    assert (late.replicas, late.cause) == (0, "idle")


def test_online_requests_that_batch_rows_slow_down_order_no_replicas_for_it() -> None:
    # 500 tokens in flight alone are 1,500 when rows with 2,000 more share the replica's speed.
    alone = ReplicaLoad(CAPACITY, 500, 0, 0, 0)
    beside = ReplicaLoad(CAPACITY, 1500, 0, 0, 0, batch_tokens=2000, batch_rows=10)
    found = [
        decide(policy(), [load] * 3, target=1, held_requests=0, now_s=1e6, state={}).replicas
        for load in (alone, beside)
    ]
    assert found[0] == found[1]


ENGINE = EngineConfig(kind="fake", model="m")


def test_batch_work_is_asked_for_though_the_clock_is_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def open_shards(*_: Any) -> Any:
        answer: Future[int] = Future()
        answer.set_result(len(asked))
        asked.append(answer)
        return SimpleNamespace(future=lambda: answer)

    board = SimpleNamespace(open_shards=SimpleNamespace(remote=open_shards))
    boards: list[str] = []
    monkeypatch.setattr(autoscaling, "job_board", lambda name: boards.append(name) or board)
    monkeypatch.setattr(autoscaling, "STATS_S", 0.001)
    shards = OpenShards(ENGINE, 1)
    for clock_s in (2e9, 1e9):
        monkeypatch.setattr(time, "time", lambda now_s=clock_s: now_s)
        shards.look("phi4")
        time.sleep(0.002)
    assert len(asked) == 2
    assert boards == ["phi4"]


def test_a_policy_that_fails_keeps_the_replicas_and_says_why_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exception would end what Serve's controller does for all applications."""
    scale = ScaleByTokens(policy().model_dump(mode="json"), ENGINE.model_dump(mode="json"))
    monkeypatch.setattr(scale._open_shards, "look", lambda _: 1 // 0)
    context: Any = SimpleNamespace(
        aggregated_metrics={}, running_replicas=[], target_num_replicas=3, policy_state={"a": 1},
        total_num_requests=0, current_time=0.0, app_name="phi4",
    )  # fmt: skip
    told: list[Any] = []
    monkeypatch.setattr(autoscaling.logger, "exception", lambda *words: told.append(words))
    assert [scale(context) for _ in range(2)] == [(3, {"a": 1})] * 2
    assert len(told) == 1


def test_two_applications_share_nothing_whatever_their_settings_name_them() -> None:
    """Serve's name is known where it runs, and is the only one that is two applications' never."""
    settings = {"engine": {"kind": "fake", "model": "m"}, "autoscaling": {"max_replicas": 2}}
    a, b = (serve_config({**settings, "name": name}) for name in ("a", "b"))
    assert autoscaling.autoscaling_config(a) == autoscaling.autoscaling_config(b)
