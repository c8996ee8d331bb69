"""How much a tenant may ask: limits a minute and at once, over all replicas together."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from phi4ray.serve.limits import LONGEST_RETRY_S, Lease, Limiter, Refused, Remaining, Spent
from phi4ray.serve.tenants import Tenant


def tenant(**limits: float) -> Tenant:
    return Tenant.model_validate({"name": "acme", "key_sha256": ["0" * 64], **limits})


def admitted(limiter: Limiter, who: Tenant, tries: int, now_s: float, tokens: float = 0) -> int:
    return sum(isinstance(limiter.acquire(who, tokens, now_s), Lease) for _ in range(tries))


def exchange(limiters: Sequence[Limiter], now_s: float) -> None:
    """The protocol of `phi4ray.serve.limits`: each hears once what all the others spent."""
    spent = [limiter.take_spent() for limiter in limiters]
    for at, limiter in enumerate(limiters):
        heard: dict[str, Spent] = {}
        for n, others in enumerate(spent):
            for name, one in others.items() if n != at else ():
                known = heard.setdefault(name, Spent())
                known.requests += one.requests
                known.tokens += one.tokens
                known.running += one.running
        limiter.absorb(heard, now_s)


def test_requests_a_minute_are_refilled_continuously() -> None:
    limiter, who = Limiter(), tenant(requests_per_minute=60)
    assert admitted(limiter, who, 60, 0.0) == 60
    assert limiter.acquire(who, 0, 0.0) == Refused("requests", 1)
    assert admitted(limiter, who, 1, 1.0) == 1
    assert limiter.acquire(who, 0, 1.5) == Refused("requests", 1)


def test_no_second_is_earned_twice_when_an_earlier_time_comes_later() -> None:
    limiter, who = Limiter(), tenant(requests_per_minute=60)
    assert admitted(limiter, who, 100, 100.0) == 60
    assert admitted(limiter, who, 100, 40.0) == 0
    assert admitted(limiter, who, 100, 100.0) == 0


def test_tokens_are_taken_at_the_start_and_what_was_not_used_goes_back() -> None:
    limiter, who = Limiter(), tenant(tokens_per_minute=1000)
    lease = limiter.acquire(who, 900, 0.0)
    assert isinstance(lease, Lease)
    assert limiter.acquire(who, 500, 0.0) == Refused("tokens", 24)
    limiter.release(lease, 100, 0.0)
    assert limiter.remaining(who, 0.0) == Remaining(None, (1000, 900))
    assert admitted(limiter, who, 1, 0.0, tokens=500) == 1


def test_tokens_used_beyond_the_demand_are_taken_when_that_is_known() -> None:
    limiter, who = Limiter(), tenant(tokens_per_minute=1000)
    lease = limiter.acquire(who, 10, 0.0)
    assert isinstance(lease, Lease)
    limiter.release(lease, 510, 60.0)
    assert limiter.remaining(who, 60.0) == Remaining(None, (1000, 500))


def test_tokens_of_an_unknown_use_stay_spent() -> None:
    limiter, who = Limiter(), tenant(tokens_per_minute=1000)
    lease = limiter.acquire(who, 900, 0.0)
    assert isinstance(lease, Lease)
    limiter.release(lease, None, 0.0)
    assert limiter.remaining(who, 0.0) == Remaining(None, (1000, 100))


def test_what_goes_back_never_fills_a_bucket_beyond_a_minutes_worth() -> None:
    limiter, who = Limiter(), tenant(tokens_per_minute=1000)
    lease = limiter.acquire(who, 900, 0.0)
    assert isinstance(lease, Lease)
    limiter.release(lease, 0, 60.0)
    assert limiter.remaining(who, 60.0) == Remaining(None, (1000, 1000))


def test_a_request_larger_than_a_minutes_tokens_goes_when_the_bucket_is_full() -> None:
    limiter, who = Limiter(), tenant(tokens_per_minute=1000)
    assert admitted(limiter, who, 1, 0.0, tokens=3000) == 1
    assert limiter.acquire(who, 1, 60.0) == Refused("tokens", 61)
    assert admitted(limiter, who, 1, 180.0, tokens=3000) == 1


def test_a_refused_request_takes_nothing() -> None:
    limiter, who = Limiter(), tenant(requests_per_minute=10, tokens_per_minute=100)
    assert admitted(limiter, who, 1, 0.0, tokens=90) == 1
    assert admitted(limiter, who, 5, 0.0, tokens=50) == 0
    assert limiter.remaining(who, 0.0) == Remaining((10, 9), (100, 10))


def test_a_requests_tokens_may_be_known_later_than_that_it_comes() -> None:
    limiter, who = Limiter(), tenant(requests_per_minute=10, tokens_per_minute=100)
    lease = limiter.acquire(who, 0, 0.0)
    assert isinstance(lease, Lease)
    assert limiter.charge(lease, 90, 0.0) is None
    assert limiter.charge(lease, 50, 0.0) == Refused("tokens", 24)
    assert limiter.remaining(who, 0.0) == Remaining((10, 9), (100, 10))
    limiter.release(lease, 20, 0.0)
    assert limiter.remaining(who, 0.0) == Remaining((10, 9), (100, 80))


def test_a_request_that_is_cancelled_was_never_there() -> None:
    limiter, who = Limiter(), tenant(requests_per_minute=10, max_concurrency=1)
    lease = limiter.acquire(who, 5, 0.0)
    assert isinstance(lease, Lease)
    limiter.cancel(lease, 1.0)
    assert limiter.remaining(who, 1.0) == Remaining((10, 10), None)
    assert limiter.take_spent() == {}
    assert admitted(limiter, who, 1, 1.0) == 1


def test_requests_at_once() -> None:
    limiter, who = Limiter(), tenant(max_concurrency=1)
    lease = limiter.acquire(who, 0, 0.0)
    assert isinstance(lease, Lease)
    assert limiter.acquire(who, 0, 0.0) == Refused("concurrency", 1)
    limiter.release(lease, None, 0.0)
    assert admitted(limiter, who, 1, 0.0) == 1


@pytest.mark.parametrize(
    ("took_s", "at_once", "retry_after_s"), [(40, 1, 40), (40, 4, 10), (9000, 1, LONGEST_RETRY_S)]
)
def test_a_place_is_waited_for_as_long_as_past_requests_say(
    took_s: float, at_once: int, retry_after_s: int
) -> None:
    limiter, who = Limiter(), tenant(max_concurrency=at_once)
    lease = limiter.acquire(who, 0, 0.0)
    assert isinstance(lease, Lease)
    limiter.release(lease, None, took_s)
    assert admitted(limiter, who, at_once, took_s) == at_once
    assert limiter.acquire(who, 0, took_s) == Refused("concurrency", retry_after_s)


@given(st.floats(0.1, 1000), st.floats(1, 5000), st.floats(1, 5000))
def test_after_retry_after_there_is_room(per_minute: float, first: float, second: float) -> None:
    limiter, who = Limiter(), tenant(tokens_per_minute=per_minute)
    assert isinstance(limiter.acquire(who, first, 0.0), Lease)
    refused = limiter.acquire(who, second, 0.0)
    assume(isinstance(refused, Refused))
    assert isinstance(refused, Refused)
    # A hair is added for a bucket that rounding leaves as much below what is asked for.
    assert admitted(limiter, who, 1, refused.retry_after_s + 1e-3, tokens=second) == 1


def test_what_was_spent_elsewhere_counts_here() -> None:
    here, there = Limiter(), Limiter()
    who = tenant(requests_per_minute=10, tokens_per_minute=100, max_concurrency=2)
    here.open([who], 0.0)
    there.acquire(who, 90, 0.0)
    here.absorb(there.take_spent(), 0.0)
    assert here.remaining(who, 0.0) == Remaining((10, 9), (100, 10))
    assert here.acquire(who, 20, 0.0) == Refused("tokens", 6)
    assert isinstance(here.acquire(who, 5, 0.0), Lease)
    assert here.acquire(who, 1, 0.0) == Refused("concurrency", 1)
    assert here.take_spent() == {"acme": Spent(1.0, 5.0, 1)}


def test_what_was_spent_elsewhere_counts_at_a_replica_that_was_idle_before() -> None:
    here, there, who = Limiter(), Limiter(), tenant(requests_per_minute=60)
    here.open([who], 0.0)
    assert admitted(there, who, 100, 500.0) == 60
    here.absorb(there.take_spent(), 500.0)
    assert admitted(here, who, 100, 500.0) == 0


def test_a_tenant_that_does_nothing_is_not_spoken_of() -> None:
    limiter, who = Limiter(), tenant(max_concurrency=1)
    limiter.open([who], 0.0)
    assert limiter.take_spent() == {}
    lease = limiter.acquire(who, 5, 0.0)
    assert isinstance(lease, Lease)
    assert limiter.take_spent() == {"acme": Spent(1.0, 5.0, 1)}
    assert limiter.take_spent() == {"acme": Spent(0.0, 0.0, 1)}
    limiter.release(lease, None, 0.0)
    assert limiter.take_spent() == {}


def test_a_tenant_that_is_not_spoken_of_runs_nothing_elsewhere() -> None:
    limiter, who = Limiter(), tenant(max_concurrency=1)
    limiter.open([who], 0.0)
    limiter.absorb({"acme": Spent(running=1)}, 0.0)
    assert admitted(limiter, who, 1, 0.0) == 0
    limiter.absorb({}, 0.0)
    assert admitted(limiter, who, 1, 0.0) == 1


def test_what_buckets_lack_is_what_was_spent_and_is_not_refilled() -> None:
    limiter, who = Limiter(), tenant(requests_per_minute=60, tokens_per_minute=600)
    limiter.open([who], 0.0)
    assert limiter.lacking(0.0) == {}
    limiter.acquire(who, 100, 0.0)
    limiter.absorb({"acme": Spent(4.0, 20.0)}, 0.0)
    assert limiter.lacking(0.0) == {"acme": Spent(5.0, 120.0)}
    assert limiter.lacking(1.0) == {"acme": Spent(4.0, 110.0)}
    assert limiter.lacking(5.0) == {"acme": Spent(0.0, 70.0)}
    assert limiter.lacking(12.0) == {}


def test_a_limit_that_the_keys_file_changes_holds_at_once() -> None:
    limiter = Limiter()
    assert admitted(limiter, tenant(requests_per_minute=100), 5, 0.0) == 5
    assert admitted(limiter, tenant(), 1, 0.0) == 1
    assert admitted(limiter, tenant(requests_per_minute=1), 1, 0.0) == 1
    assert isinstance(limiter.acquire(tenant(requests_per_minute=1), 0, 0.0), Refused)


INTERVAL_S = 0.5
# Each is one exchange interval: idle intervals before it, and the tries at each replica in it.
INTERVALS = st.lists(
    st.tuples(st.integers(0, 300), st.lists(st.integers(0, 40), min_size=3, max_size=3)),
    min_size=1,
    max_size=25,
)


def fleet(
    who: Tenant,
    intervals: Sequence[tuple[int, Sequence[int]]],
    ask: Callable[[Limiter, float], float],
) -> list[tuple[float, float]]:
    """Run three replicas that exchange at every interval's end; its time and what was taken."""
    limiters = [Limiter() for _ in range(3)]
    for limiter in limiters:
        limiter.open([who], 0.0)
    now_s, taken = 0.0, []
    for idle, tries in intervals:
        now_s += (1 + idle) * INTERVAL_S
        amounts = [
            ask(limiter, now_s)
            for limiter, n in zip(limiters, tries, strict=True)
            for _ in range(n)
        ]
        taken.append((now_s, sum(amounts)))
        exchange(limiters, now_s)
    return taken


def assert_no_window_exceeds(
    per_minute: float, taken: Sequence[tuple[float, float]], excess_intervals: int = 1
) -> None:
    """In any time t at most a minute's worth, what t refills, and what so many intervals took."""
    largest = excess_intervals * max(amount for _, amount in taken)
    for first, (began_s, _) in enumerate(taken):
        total = 0.0
        for now_s, amount in taken[first:]:
            total += amount
            assert total <= per_minute + per_minute * (now_s - began_s) / 60 + largest + 1e-6


@given(INTERVALS, st.integers(1, 300))
def test_the_fleet_exceeds_requests_a_minute_by_no_more_than_one_interval_admits(
    intervals: list[tuple[int, list[int]]], per_minute: int
) -> None:
    who = tenant(requests_per_minute=per_minute)
    taken = fleet(who, intervals, lambda at, now_s: admitted(at, who, 1, now_s))
    assert_no_window_exceeds(per_minute, taken)


@given(INTERVALS, st.integers(100, 5000), st.data())
def test_the_fleet_exceeds_tokens_a_minute_by_no_more_than_one_interval_admits(
    intervals: list[tuple[int, list[int]]], per_minute: int, data: st.DataObject
) -> None:
    who = tenant(tokens_per_minute=per_minute)
    tokens = data.draw(st.integers(1, 100))
    taken = fleet(who, intervals, lambda at, now_s: tokens * admitted(at, who, 1, now_s, tokens))
    assert_no_window_exceeds(per_minute, taken)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)), max_size=60))
def test_the_fleet_exceeds_requests_at_once_by_no_more_than_one_interval_admits(
    intervals: list[tuple[int, int, int]],
) -> None:
    who = tenant(max_concurrency=4)
    limiters = [Limiter() for _ in range(3)]
    running: list[list[Lease]] = [[] for _ in limiters]
    for limiter in limiters:
        limiter.open([who], 0.0)
    largest = 0
    for at, asked, ended in intervals:
        began = 0
        for n, limiter in enumerate(limiters):
            for _ in range(asked if n >= at else 0):
                lease = limiter.acquire(who, 0, 0.0)
                if isinstance(lease, Lease):
                    running[n].append(lease)
                    began += 1
        largest = max(largest, began)
        assert sum(map(len, running)) <= 4 + largest
        for lease in running[at][:ended]:
            running[at].remove(lease)
            limiters[at].release(lease, None, 0.0)
        exchange(limiters, 0.0)
