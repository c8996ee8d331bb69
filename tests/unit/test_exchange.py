"""Limits over a fleet that changes: new, leaving and forgotten replicas give no tenant more."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.serve.exchange import REFILL_S, SILENCE_S, Exchange
from phi4ray.serve.limits import Limiter, Remaining, Spent
from phi4ray.serve.tenants import Tenant
from tests.unit.test_limits import INTERVAL_S, admitted, assert_no_window_exceeds, tenant


class Fleet:
    """Replicas by name, around one exchange."""

    def __init__(self, who: Tenant) -> None:
        self.who, self.exchange = who, Exchange()
        self.limiters: dict[str, Limiter] = {}

    def start(self, name: str, now_s: float) -> Limiter:
        limiter = self.limiters[name] = Limiter()
        limiter.open([self.who], now_s)
        self.meet(name, now_s)
        return limiter

    def meet(self, name: str, now_s: float) -> None:
        limiter = self.limiters[name]
        spent, lacking = limiter.take_spent(), limiter.lacking(now_s)
        limiter.absorb(self.exchange.exchange(name, spent, lacking, now_s), now_s)

    def left(self, name: str, now_s: float) -> Remaining:
        return self.limiters[name].remaining(self.who, now_s)


def test_a_replica_that_starts_has_what_the_others_have_left() -> None:
    fleet = Fleet(tenant(requests_per_minute=100, tokens_per_minute=1000))
    first, second = fleet.start("a", 0.0), fleet.start("b", 0.0)
    assert admitted(first, fleet.who, 50, 0.0, tokens=10) == 50
    assert admitted(second, fleet.who, 30, 0.0, tokens=10) == 30
    fleet.meet("a", 0.0)
    fleet.meet("b", 0.0)
    fleet.start("c", 0.0)
    assert fleet.left("c", 0.0) == Remaining((100, 20), (1000, 200))


def test_what_was_refilled_meanwhile_is_there_for_a_replica_that_starts() -> None:
    fleet = Fleet(tenant(requests_per_minute=60))
    assert admitted(fleet.start("a", 0.0), fleet.who, 60, 0.0) == 60
    fleet.meet("a", 0.0)
    fleet.meet("a", 30.0)
    fleet.start("b", 30.0)
    assert fleet.left("b", 30.0) == Remaining((60, 30), None)


@pytest.mark.parametrize(("silent_s", "left"), [(0, 0), (15, 15), (REFILL_S, 60), (600, 60)])
def test_where_all_replicas_were_replaced_time_has_refilled_what_they_spent(
    silent_s: float, left: float
) -> None:
    fleet = Fleet(tenant(requests_per_minute=60))
    assert admitted(fleet.start("a", 0.0), fleet.who, 60, 0.0) == 60
    fleet.meet("a", 0.0)
    fleet.start("b", silent_s)
    assert fleet.left("b", silent_s) == Remaining((60, left), None)


def test_a_replica_that_was_forgotten_hears_what_it_missed_and_not_its_own() -> None:
    fleet = Fleet(tenant(requests_per_minute=600))
    old, new = fleet.start("old", 0.0), fleet.start("new", 0.0)
    assert admitted(old, fleet.who, 600, 0.0) == 600
    fleet.meet("old", 0.0)
    fleet.meet("new", 0.0)
    later_s = SILENCE_S + 1  # with 110 refilled
    fleet.meet("new", later_s)
    assert admitted(new, fleet.who, 50, later_s) == 50
    fleet.meet("new", later_s)
    fleet.meet("old", later_s)
    assert fleet.left("old", later_s) == Remaining((600, 60), None)


def test_a_replica_that_drains_for_minutes_gives_no_tenant_more() -> None:
    fleet = Fleet(tenant(requests_per_minute=600))
    names = ["0", "1", "2", "3", "draining"]
    for name in names:
        fleet.start(name, 0.0)
    taken = 0
    for look in range(1, 121):
        now_s = look * INTERVAL_S
        for name in names:
            if name != "draining":
                taken += admitted(fleet.limiters[name], fleet.who, 100, now_s)
            fleet.meet(name, now_s)
    assert taken <= 600 + 600 * 120 * INTERVAL_S / REFILL_S + 4 * 600 * INTERVAL_S / REFILL_S


def test_what_runs_at_a_replica_that_is_gone_counts_no_longer_than_it_may_be_silent() -> None:
    fleet = Fleet(tenant(max_concurrency=1))
    assert admitted(fleet.start("gone", 0.0), fleet.who, 1, 0.0) == 1
    fleet.meet("gone", 0.0)
    other = fleet.start("other", 0.0)
    assert admitted(other, fleet.who, 1, 0.0) == 0
    fleet.meet("other", SILENCE_S + 1)
    assert admitted(other, fleet.who, 1, SILENCE_S + 1) == 1


def test_an_exchange_that_was_lost_begins_again_without_counting_twice() -> None:
    fleet = Fleet(tenant(requests_per_minute=100))
    assert admitted(fleet.start("a", 0.0), fleet.who, 40, 0.0) == 40
    fleet.start("b", 0.0)
    for name in ("a", "b"):
        fleet.meet(name, 0.0)
    fleet.exchange = Exchange()
    for name in ("b", "a", "b", "a"):
        fleet.meet(name, 0.0)
    assert fleet.left("a", 0.0) == fleet.left("b", 0.0) == Remaining((100, 60), None)


def test_what_runs_at_the_others_is_told_to_a_replica_that_starts() -> None:
    fleet = Fleet(tenant(max_concurrency=2))
    assert admitted(fleet.start("a", 0.0), fleet.who, 1, 0.0) == 1
    fleet.meet("a", 0.0)
    assert admitted(fleet.start("b", 0.0), fleet.who, 5, 0.0) == 1


def test_nothing_is_told_of_tenants_that_spent_nothing() -> None:
    exchange = Exchange()
    assert exchange.exchange("a", {}, {}, 0.0) == {}
    assert exchange.exchange("b", {"acme": Spent(1.0)}, {"acme": Spent(1.0)}, 0.0) == {}
    assert exchange.exchange("a", {}, {}, 0.0) == {"acme": Spent(1.0)}


# Each is one exchange interval: idle intervals before it, the tries at each of three places, and
# the place whose replica is replaced by a new one before it.
INTERVALS = st.lists(
    st.tuples(
        st.integers(0, 60),
        st.lists(st.integers(0, 40), min_size=3, max_size=3),
        st.none() | st.integers(0, 2),
    ),
    min_size=1,
    max_size=25,
)


@given(INTERVALS, st.integers(1, 300))
def test_replicas_that_are_replaced_give_no_tenant_more(
    intervals: Sequence[tuple[int, Sequence[int], int | None]], per_minute: int
) -> None:
    fleet = Fleet(tenant(requests_per_minute=per_minute))
    names = ["0", "1", "2"]
    for name in names:
        fleet.start(name, 0.0)
    now_s, taken = 0.0, []
    for number, (idle, tries, replaced) in enumerate(intervals):
        for _ in range(idle):  # exchanges go on where nobody asks
            now_s += INTERVAL_S
            for name in names:
                fleet.meet(name, now_s)
        now_s += INTERVAL_S
        if replaced is not None:
            names[replaced] = f"new{number}"
            fleet.start(names[replaced], now_s)
        counts = [
            admitted(fleet.limiters[name], fleet.who, n, now_s)
            for name, n in zip(names, tries, strict=True)
        ]
        taken.append((now_s, float(sum(counts))))
        for name in names:
            fleet.meet(name, now_s)
    # The last of an interval's exchanges hears of all of it, the first only of what was before.
    assert_no_window_exceeds(per_minute, taken, excess_intervals=2)
