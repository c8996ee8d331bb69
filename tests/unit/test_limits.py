"""How much a tenant may ask: limits a minute and at once, over all replicas together."""

import random

from hypothesis import given
from hypothesis import strategies as st

from phi4ray.serve.limits import Lease, Limiter, Refused, Remaining, Spent
from phi4ray.serve.tenants import Tenant


def tenant(**limits: float) -> Tenant:
    return Tenant.model_validate({"name": "acme", "key_sha256": ["0" * 64], **limits})


def test_requests_a_minute_are_refilled_continuously() -> None:
    limiter, who = Limiter(), tenant(requests_per_minute=60)
    assert all(isinstance(limiter.acquire(who, 0, 0.0), Lease) for _ in range(60))
    assert limiter.acquire(who, 0, 0.0) == Refused("requests", 1)
    assert isinstance(limiter.acquire(who, 0, 1.0), Lease)
    assert limiter.acquire(who, 0, 1.5) == Refused("requests", 1)


def test_tokens_are_taken_at_the_start_and_what_was_not_used_goes_back() -> None:
    limiter, who = Limiter(), tenant(tokens_per_minute=1000)
    lease = limiter.acquire(who, 900, 0.0)
    assert isinstance(lease, Lease)
    assert limiter.acquire(who, 500, 0.0) == Refused("tokens", 24)
    limiter.release(lease, 100)
    assert limiter.remaining(who, 0.0) == Remaining(None, (1000, 900))
    assert isinstance(limiter.acquire(who, 500, 0.0), Lease)


def test_a_request_larger_than_a_minutes_tokens_goes_when_the_bucket_is_full() -> None:
    limiter, who = Limiter(), tenant(tokens_per_minute=1000)
    assert isinstance(limiter.acquire(who, 3000, 0.0), Lease)
    assert limiter.acquire(who, 1, 60.0) == Refused("tokens", 61)
    assert isinstance(limiter.acquire(who, 3000, 180.0), Lease)


def test_requests_at_once() -> None:
    limiter, who = Limiter(), tenant(max_concurrency=1)
    lease = limiter.acquire(who, 0, 0.0)
    assert isinstance(lease, Lease)
    assert limiter.acquire(who, 0, 0.0) == Refused("concurrency", 1)
    limiter.release(lease, None)
    assert isinstance(limiter.acquire(who, 0, 0.0), Lease)


def test_what_was_spent_elsewhere_counts_here() -> None:
    here, there = Limiter(), Limiter()
    who = tenant(requests_per_minute=10, tokens_per_minute=100, max_concurrency=2)
    here.remaining(who, 0.0)
    there.acquire(who, 90, 0.0)
    here.absorb(there.take_spent())
    assert here.remaining(who, 0.0) == Remaining((10, 9), (100, 10))
    assert here.acquire(who, 20, 0.0) == Refused("tokens", 6)
    assert isinstance(here.acquire(who, 5, 0.0), Lease)
    assert here.acquire(who, 1, 0.0) == Refused("concurrency", 1)
    assert here.take_spent() == {"acme": Spent(1.0, 5.0, 1)}


def test_a_limit_that_the_keys_file_changes_holds_at_once() -> None:
    limiter = Limiter()
    for _ in range(5):
        limiter.acquire(tenant(requests_per_minute=100), 0, 0.0)
    assert isinstance(limiter.acquire(tenant(), 0, 0.0), Lease)
    assert isinstance(limiter.acquire(tenant(requests_per_minute=1), 0, 0.0), Lease)
    assert isinstance(limiter.acquire(tenant(requests_per_minute=1), 0, 0.0), Refused)


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 4))
def test_replicas_together_exceed_a_limit_by_no_more_than_one_interval_admits(
    seed: int, per_minute: int, replicas: int
) -> None:
    chance = random.Random(seed)
    who = tenant(requests_per_minute=per_minute)
    limiters = [Limiter() for _ in range(replicas)]
    for limiter in limiters:
        limiter.remaining(who, 0.0)
    admitted, largest, now = 0, 0, 0.0
    for _ in range(100):
        now += 0.5
        burst = [
            isinstance(limiter.acquire(who, 0, now), Lease)
            for limiter in limiters
            for _ in range(chance.randint(0, 5))
        ]
        admitted += sum(burst)
        largest = max(largest, sum(burst))
        spent = [limiter.take_spent() for limiter in limiters]
        for at, limiter in enumerate(limiters):
            others = [s["acme"].requests for n, s in enumerate(spent) if n != at]
            limiter.absorb({"acme": Spent(sum(others))})
        assert admitted <= per_minute + per_minute * now / 60 + largest
