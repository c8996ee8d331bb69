"""Pauses of a process that streams tokens; that others have their turn is in the contracts."""

import gc

import pytest

from phi4ray.pauses import rare_collections


class Node:
    """One of a pair that refer to each other: only the collector finds them."""

    def __init__(self) -> None:
        self.other: Node | None = None


def pair() -> Node:
    one, other = Node(), Node()
    one.other, other.other = other, one
    return one


def full_collections(garbage: int) -> int:
    """How often all objects are looked through while so much is allocated and left behind."""
    before = gc.get_stats()[2]["collections"]
    kept = [pair() for _ in range(garbage)]
    del kept
    return int(gc.get_stats()[2]["collections"] - before)


@pytest.mark.slow
def test_full_collections_are_rare_and_as_before_afterwards() -> None:
    before = gc.get_threshold()
    with rare_collections():
        assert full_collections(300_000) == 0
    assert gc.get_threshold() == before
    assert full_collections(300_000) > 0


def test_what_is_there_is_not_looked_through_again() -> None:
    there = pair()
    with rare_collections():
        assert all(one is not there for one in gc.get_objects())


def test_garbage_is_found_all_the_same() -> None:
    with rare_collections():
        most = 0
        for _ in range(20):
            for _ in range(10_000):
                pair()
            most = max(most, sum(isinstance(one, Node) for one in gc.get_objects()))
    assert most < 50_000


def test_thresholds_come_back_after_an_error() -> None:
    before = gc.get_threshold()
    with pytest.raises(RuntimeError), rare_collections():
        raise RuntimeError
    assert gc.get_threshold() == before
