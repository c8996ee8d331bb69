"""Which replica a request goes to: prefixes meet, loads stay even."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4ray.serve.routing import (
    BLOCK_CHARS,
    Load,
    PrefixRouter,
    RoutingConfig,
    likely_demand,
    prefix_blocks,
)

SYSTEM = "You are a careful assistant. " * 40


def router(**settings: float) -> PrefixRouter:
    return PrefixRouter(RoutingConfig.model_validate(settings))


def loads(**demand: float) -> dict[str, Load]:
    return {name: Load(1000, tokens, 0.0) for name, tokens in demand.items()}


def first(route: PrefixRouter, prompt: str, tokens: float, now: dict[str, Load]) -> str:
    return route.rank(prompt, tokens, now)[0]


def test_prompts_with_a_shared_beginning_meet_while_load_allows() -> None:
    route, now = router(), loads(a=0, b=0, c=0)
    home = first(route, SYSTEM + "1", 10, now)
    assert {first(route, SYSTEM + str(n), 10, now) for n in range(20)} == {home}


def test_a_full_replica_does_not_get_more_for_its_prefix() -> None:
    route = router(max_imbalance=0.25)
    home = first(route, SYSTEM, 10, loads(a=0, b=0))
    other = "b" if home == "a" else "a"
    busy = {home: Load(1000, 900, 1.0), other: Load(1000, 100, 1.0)}
    assert first(route, SYSTEM, 10, busy) == other
    # Now both hold the prefix, and the emptier one is near again.
    assert first(route, SYSTEM, 10, busy) == other


def test_the_longest_shared_prefix_wins() -> None:
    route = router()
    home = first(route, SYSTEM + "x" * 600, 1, loads(a=0, b=500))
    assert home == "a"
    other = first(route, SYSTEM + "y" * 600, 1, {"b": Load(1000, 0, 1.0)})
    assert other == "b"
    both = {"a": Load(1000, 200, 2.0), "b": Load(1000, 0, 2.0)}
    assert first(route, SYSTEM + "x" * 600 + "z", 1, both) == "a"
    assert first(route, SYSTEM + "y" * 600 + "z", 1, both) == "b"


def test_prompts_without_a_prefix_go_to_the_emptiest_counting_what_was_just_sent() -> None:
    route, now = router(), loads(a=0, b=0, c=0, d=0)
    sent = Counter(first(route, f"{n}", 10, now) for n in range(100))
    assert set(sent.values()) == {25}


def test_news_of_a_replica_replaces_what_was_guessed() -> None:
    route = router()
    assert first(route, "", 500, loads(a=0, b=100)) == "a"
    assert first(route, "", 1, loads(a=0, b=100)) == "b"
    news = {"a": Load(1000, 0, 1.0), "b": Load(1000, 100, 0.0)}
    assert first(route, "", 1, news) == "a"


@pytest.mark.parametrize("limit", [10**9, 10**300, 10**400])
def test_no_limit_that_a_request_states_makes_a_replica_look_full(limit: int) -> None:
    assert likely_demand({"prompt": "a" * 40, "max_tokens": limit, "n": 2}) == 10 + 2 * 4096


def test_a_replica_that_is_gone_is_forgotten() -> None:
    route = router()
    assert first(route, SYSTEM, 1, loads(a=0, b=1)) == "a"
    route.forget({"a"})
    assert first(route, SYSTEM, 1, loads(b=1)) == "b"


def test_what_is_remembered_has_a_bound() -> None:
    route, now = router(remembered_blocks=100), loads(a=0)
    for n in range(200):
        route.rank(f"{n:05d}" * BLOCK_CHARS, 1, now)
    assert len(route._holders) == 100


def test_prefix_routing_can_be_switched_off() -> None:
    route, now = router(prefix_aware=False), loads(a=0, b=0)
    assert Counter(first(route, SYSTEM, 10, now) for _ in range(10)) == {"a": 5, "b": 5}


@given(st.text(max_size=2000), st.text(max_size=2000))
def test_prompts_share_as_many_blocks_as_they_share_whole_blocks_of_text(a: str, b: str) -> None:
    shared = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        shared += 1
    both = [x == y for x, y in zip(prefix_blocks(a), prefix_blocks(b), strict=False)]
    assert sum(both) == shared // BLOCK_CHARS
    assert both == sorted(both, reverse=True)


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_every_replica_is_ranked_once_and_load_stays_within_the_imbalance(
    seed: int, replicas: int
) -> None:
    chance = random.Random(seed)
    route = router(max_imbalance=0.1)
    now = {f"r{n}": Load(1000, 0.0, 0.0) for n in range(replicas)}
    total = Counter[str]()
    for _ in range(200):
        ranked = route.rank(SYSTEM * chance.randint(0, 2), 10, now)
        assert sorted(ranked) == sorted(now)
        total[ranked[0]] += 10
        assert max(total.values()) - min(total[name] for name in now) <= 100 + 10
